"""One body for the compiled packing and the plain one; the golden vectors hold it to the bytes of version 1."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from gateway.wire import _packing, packing

PLAIN = SimpleNamespace(planes_of=packing.planes_of_plain, counts_of=packing.counts_of_plain)
COMPILED = _packing
INT32 = np.iinfo(np.int32)


@pytest.fixture(params=["plain", "compiled"])
def kernels(request: pytest.FixtureRequest) -> Any:
    return PLAIN if request.param == "plain" else COMPILED


def table(*rows: list[int]) -> NDArray[np.int32]:
    return np.array(rows, dtype=np.int32)


def planes_by_definition(counts: NDArray[np.int32]) -> bytes:
    steps = []
    for channel in counts.T.tolist():
        steps += [(value - before) % 2**32 for before, value in zip([0, *channel], channel, strict=False)]
    return b"".join(bytes(step >> 8 * place & 0xFF for step in steps) for place in range(4))


def test_the_compiled_one_runs_where_it_is_built() -> None:
    assert packing.IMPLEMENTATION == "compiled"
    assert packing.planes_of is COMPILED.planes_of
    assert packing.counts_of is COMPILED.counts_of


@pytest.mark.parametrize(
    "counts",
    [
        table([1, 258], [3, 2]),
        table([INT32.min, INT32.max], [INT32.max, INT32.min], [0, -1]),
        table([7]),
        np.zeros((0, 8), dtype=np.int32),
        np.zeros((5, 0), dtype=np.int32),
    ],
)
def test_the_definition_and_back(kernels: Any, counts: NDArray[np.int32]) -> None:
    planes = kernels.planes_of(counts)
    assert planes == planes_by_definition(counts)
    back = kernels.counts_of(planes, *counts.shape)
    assert back.dtype == np.int32
    assert back.shape == counts.shape
    assert (back == counts).all()


def test_counts_in_any_order_of_memory_and_read_only(kernels: Any) -> None:
    counts = np.random.default_rng(1).integers(INT32.min, INT32.max, (40, 16), dtype=np.int32, endpoint=True)
    for view in (counts, np.asfortranarray(counts), counts[::-1, ::3], counts[5:6], counts.T):
        expected = planes_by_definition(view)
        view.flags.writeable = False
        assert kernels.planes_of(view) == expected
        assert (kernels.counts_of(expected, *view.shape) == view).all()


def test_what_does_not_fit_is_refused(kernels: Any) -> None:
    for wrong in (np.zeros((2, 2)), np.zeros((2, 2), dtype=np.uint32), np.zeros(4, dtype=np.int32)):
        with pytest.raises(ValueError, match=r"\w"):
            kernels.planes_of(wrong)
    for size in (0, 23, 25):
        with pytest.raises(ValueError, match="are not 2 x 3 counts"):
            kernels.counts_of(bytes(size), 2, 3)
    for samples, channels in ((-1, 3), (3, -1), (-1, -1), (2**40, 2**40), (packing.VALUES_MAX + 1, 1)):
        with pytest.raises(ValueError, match="at once"):
            kernels.counts_of(b"", samples, channels)
    # One value, seen as many: it takes no memory.
    with pytest.raises(ValueError, match="at once"):
        kernels.planes_of(np.broadcast_to(np.int32(0), (packing.VALUES_MAX // 64 + 1, 64)))


@given(st.integers(0, 40), st.integers(0, 20), st.integers(0, 31), st.integers(0, 2**32 - 1))
def test_both_give_the_same_bytes(samples: int, channels: int, shift: int, seed: int) -> None:
    every = np.random.default_rng(seed).integers(INT32.min, INT32.max, (samples, channels), dtype=np.int32)
    counts = every >> shift
    planes = COMPILED.planes_of(counts)
    assert planes == PLAIN.planes_of(counts)
    assert COMPILED.counts_of(planes, samples, channels).tolist() == counts.tolist()
    assert PLAIN.counts_of(planes, samples, channels).tolist() == counts.tolist()


def test_what_is_unpacked_is_what_was_packed() -> None:
    counts = np.cumsum(np.random.default_rng(2).integers(-300, 300, (256, 8)), axis=0, dtype=np.int32)
    packed = packing.pack(counts)
    assert len(packed["data"]) < counts.nbytes / 2
    assert (packing.unpack(packed, (256, 8)) == counts).all()
