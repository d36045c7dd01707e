"""When a sensor that keeps its measurements took one of them, by the sensor's own clock.

A Date Time has no zone, and whether the clock was ever set cannot be known: it is never taken for a time of day.
What can be trusted is a difference: a sensor that tells its clock when it is connected (Date Time 2A08, Current
Time 2A2B) tells with a measurement's stamp how old that measurement is. Where it does not, a measurement counts
from its arrival, and one that the sensor itself calls stored is dropped rather than given a wrong time.
"""

from __future__ import annotations

from datetime import datetime, timedelta

from gateway.devices import gatt
from gateway.devices.base import Event
from gateway.links.base import Chunk

STORED_AFTER = timedelta(minutes=2)
"""A measurement this old was kept for us; younger ones are on their way: a cuff deflates, connects, sends."""
AGE_MAX = timedelta(days=7)
"""An older one is more likely due to a clock that was set in between."""
_NS_PER_US = 1000


class MeasurementClock:
    """The clock of one sensor during one connection."""

    CHARACTERISTICS = (gatt.DATE_TIME, gatt.CURRENT_TIME)
    """To be read after connecting, before the measurements come."""

    def __init__(self) -> None:
        self._now: datetime | None = None
        self._now_arrival_ns = 0

    def learn(self, chunk: Chunk) -> list[Event]:
        """Take the value of one of `CHARACTERISTICS`. Raises `gatt.MalformedValueError`."""
        # A Current Time goes on with the day of the week, 1/256 s and why it was set.
        now = gatt.date_time(chunk.data[: gatt.DATE_TIME_BYTES])
        if now is not None:
            self._now, self._now_arrival_ns = now, chunk.arrival_ns
        return []

    def age(self, stamp: datetime | None, arrival_ns: int) -> timedelta | None:
        """How old a measurement with this stamp was when it arrived; None where that cannot be known."""
        if stamp is None or self._now is None:
            return None
        since = timedelta(microseconds=(arrival_ns - self._now_arrival_ns) // _NS_PER_US)
        return self._now - stamp + since

    def measured_ns(self, stamp: datetime | None, arrival_ns: int, *, stored: bool = False) -> int:
        """When a measurement was taken, on the scale of arrivals, ns.

        `stored`: the sensor says that it had kept it. Raises `gatt.MalformedValueError` where the time of a stored
        measurement cannot be known.
        """
        age = self.age(stamp, arrival_ns)
        if age is None:
            if stored:
                raise gatt.MalformedValueError("a stored measurement, and how old it is cannot be known")
            return arrival_ns
        if age > AGE_MAX:
            raise gatt.MalformedValueError(f"a stored measurement {age.days} days old by the sensor's clock")
        if age < STORED_AFTER:
            return arrival_ns
        return arrival_ns - age // timedelta(microseconds=1) * _NS_PER_US
