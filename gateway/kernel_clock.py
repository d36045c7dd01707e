"""What the kernel says of its clocks: whether anybody disciplines them, how wrong they may be, which boot this is.

Linux, through ctypes.
"""

from __future__ import annotations

import ctypes
import time
from dataclasses import dataclass
from pathlib import Path

from gateway.errors import UnavailableError
from gateway.samples import NS_PER_S, ClockState

UNKNOWN_ERROR_NS = 16 * NS_PER_S
"""The kernel's own figure for a clock that nobody disciplines (NTP_PHASE_MAX)."""

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_STA_UNSYNC = 0x0040
_STA_NANO = 0x2000
_TIME_ERROR = 5


class _Timex(ctypes.Structure):
    """`struct timex` of <sys/timex.h>, as far as it is read; the rest is room for the kernel."""

    _fields_ = (
        ("modes", ctypes.c_uint),
        ("offset", ctypes.c_long),
        ("freq", ctypes.c_long),
        ("maxerror", ctypes.c_long),
        ("esterror", ctypes.c_long),
        ("status", ctypes.c_int),
        ("rest", ctypes.c_char * 256),
    )


@dataclass(frozen=True, slots=True)
class Discipline:
    """What the kernel says of its own clock."""

    state: ClockState
    error_ns: int


_libc = ctypes.CDLL(None, use_errno=True)


def kernel_discipline() -> Discipline:
    """Ask the kernel (adjtimex, no privilege needed) whether the clock is disciplined, and its maximal error."""
    timex = _Timex()
    outcome = _libc.adjtimex(ctypes.byref(timex))
    if outcome < 0:
        return Discipline(ClockState.UNKNOWN, UNKNOWN_ERROR_NS)
    # what is still to be slewed is an error of this moment, too
    error_ns = timex.maxerror * 1000 + abs(timex.offset) * (1 if timex.status & _STA_NANO else 1000)
    if outcome == _TIME_ERROR or timex.status & _STA_UNSYNC:
        return Discipline(ClockState.UNSYNCED, max(error_ns, UNKNOWN_ERROR_NS))
    return Discipline(ClockState.SYNCED, error_ns)


def boot_id() -> str:
    """Names this boot: a time since boot means something only together with it. Raises `UnavailableError`. Blocks."""
    try:
        return _BOOT_ID.read_text(encoding="ascii").strip()
    except OSError as error:
        raise UnavailableError(f"{_BOOT_ID} cannot be read: {error.strerror}", hint="is /proc mounted?") from None


def boot_ns() -> int:
    """Time since boot, ns, the time that the machine slept included (CLOCK_BOOTTIME)."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)
