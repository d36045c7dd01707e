"""Nanoseconds of a sample to the whole microseconds that PostgreSQL keeps, and back.

The one rule of borders: a sample lies in the period [start, end) that holds its time rounded down to the
microsecond. All borders are whole microseconds, so a sample is in exactly one of two periods that touch.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

NS_PER_US = 1000
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_US = timedelta(microseconds=1)


def us_of(time_ns: int) -> int:
    """The microsecond that holds a time in ns."""
    return time_ns // NS_PER_US


def instant(time_us: int) -> datetime:
    """A time in us since 1970 as PostgreSQL takes it."""
    return EPOCH + timedelta(microseconds=time_us)


def instant_of_ns(time_ns: int) -> datetime:
    """A time in ns since 1970, rounded down, as PostgreSQL takes it."""
    return instant(us_of(time_ns))


def us_of_instant(moment: datetime) -> int:
    """A time from PostgreSQL in us since 1970, exactly."""
    return (moment - EPOCH) // _US
