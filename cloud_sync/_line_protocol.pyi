from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

def encode(
    prefix: bytes,
    times_ns: NDArray[np.int64],
    columns: Sequence[tuple[bytes, NDArray[np.float64] | NDArray[np.float32] | NDArray[np.int64], bool]],
    decimals: int = -1,
) -> tuple[bytes, int]: ...
