"""Any board that BrainFlow knows: the only file that knows the library `brainflow` (an extra).

BrainFlow talks to the board and gives a table of numbers; a chunk is rows of this table, float64, little-endian.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.resources
import platform
import sys
import time
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from gateway.errors import ConfigError, UnavailableError
from gateway.links.polled import PolledLink

POLL_S = 0.02
"""How often BrainFlow's buffer is emptied: its own threads fill it, and it wakes nobody."""
BUFFER_SAMPLES = 45_000
"""BrainFlow's own ring: three minutes at 250 Hz."""
ARCHITECTURE = "x86_64"
INSTALL_HINT = (
    "pip install wardlink[brainflow]; its wheel has libraries for x86-64 only, elsewhere (a Raspberry Pi) BrainFlow"
    " must be built from its source"
)


@dataclass(frozen=True, slots=True)
class BoardAddress:
    """Where a board is; what BrainFlow's documentation asks for with this board."""

    serial_port: str = ""
    mac_address: str = ""
    ip_address: str = ""
    ip_port: int = 0
    serial_number: str = ""
    timeout_s: int = 0


def board_description(board_id: int) -> Mapping[str, Any]:
    """What BrainFlow says of a board: rows of its table by name, sampling rate, names. Loads the library: it blocks.

    Raises `ConfigError` where BrainFlow is not installed, cannot run, or does not know the board.
    """
    library = _library()
    try:
        description: Mapping[str, Any] = library.BoardShim.get_board_descr(board_id)
    except library.BrainFlowError as error:
        raise ConfigError(
            f"BrainFlow knows no board {board_id}: {error}", hint="brainflow.readthedocs.io lists the boards"
        ) from error
    return description


class BrainFlowLink(PolledLink):
    """A `Link` to a board. Chunks are rows of its table: read them with the board's description."""

    def __init__(self, board_id: int, address: BoardAddress | None = None) -> None:
        """`board_id`: BrainFlow's number of the board; -1 is its synthetic one."""
        place = address or BoardAddress()
        where = place.serial_port or place.mac_address or place.ip_address
        super().__init__(f"BrainFlow board {board_id} {where}".rstrip(), lambda: _Board(board_id, place))


class _Board:
    """One session with a board, see `gateway.links.polled.Source`."""

    def __init__(self, board_id: int, address: BoardAddress) -> None:
        self._board_id = board_id
        self._address = address
        self._board: Any = None

    def open(self) -> None:
        library = _library()
        parameters = library.BrainFlowInputParams()
        parameters.serial_port = self._address.serial_port
        parameters.mac_address = self._address.mac_address
        parameters.ip_address = self._address.ip_address
        parameters.ip_port = self._address.ip_port
        parameters.serial_number = self._address.serial_number
        parameters.timeout = self._address.timeout_s
        library.BoardShim.disable_board_logger()
        try:
            board = library.BoardShim(self._board_id, parameters)
            board.prepare_session()
            self._board = board
            board.start_stream(BUFFER_SAMPLES)
        except library.BrainFlowError as error:
            raise UnavailableError(
                f"BrainFlow cannot open board {self._board_id}: {error}",
                hint="is it on, in reach, and not in use by another program?",
            ) from error

    def poll(self) -> bytes:
        library = _library()
        time.sleep(POLL_S)
        try:
            table = self._board.get_board_data()
        except library.BrainFlowError as error:
            raise UnavailableError(f"BrainFlow lost board {self._board_id}: {error}") from error
        return np.ascontiguousarray(table.T, dtype="<f8").tobytes()

    def close(self) -> None:
        board, self._board = self._board, None
        if board is None:
            return
        library = _library()
        for release in (board.stop_stream, board.release_session):
            with contextlib.suppress(library.BrainFlowError):
                release()


@functools.cache
def _library() -> types.ModuleType:
    """BrainFlow's module, its shared library loaded. Raises `ConfigError`."""
    try:
        from brainflow import board_shim  # noqa: PLC0415 - an extra
    except ImportError:
        raise ConfigError("BrainFlow is not installed", hint=INSTALL_HINT) from None
    try:
        with _package_resources():
            board_shim.BoardControllerDLL.get_instance()
    except (OSError, board_shim.BrainFlowError) as error:
        raise ConfigError(f"BrainFlow cannot run on {platform.machine()}: {error}", hint=INSTALL_HINT) from error
    module: types.ModuleType = board_shim
    return module


@contextlib.contextmanager
def _package_resources() -> Iterator[None]:
    """A stand-in for `pkg_resources`, which setuptools 82 has no more: BrainFlow 5.23 asks it for a path, once."""
    name = "pkg_resources"
    if name in sys.modules:
        yield
        return
    stand_in = types.ModuleType(name)

    def resource_filename(package: str, resource: str) -> str:
        return str(importlib.resources.files(package.rpartition(".")[0]) / resource)

    setattr(stand_in, "resource_filename", resource_filename)  # noqa: B010 - a module has no such attribute to assign
    sys.modules[name] = stand_in
    try:
        yield
    finally:
        del sys.modules[name]
