"""Losses that a short packet counter cannot show: whole turns of it, seen by how late the stream has become.

Pure: the only time is that of arrivals. Knows no device's packets.
"""

from __future__ import annotations

from gateway.samples import NS_PER_S

DRIFT_MAX = 0.01
"""A device's clock against the host's: 0.25 % has been measured, so 1 % is never drift."""
DRIFT_NS_PER_CHUNK_MAX = NS_PER_S // 10
"""However long a silence, it does not move the expected arrival by more than this."""


class HiddenLoss:
    """Tells a stream that lost whole turns of its counter from one that is only late.

    Both are late by a multiple of the turn. But a host that slept, or a transport that stalled, catches up at once;
    a loss stays. So what is late is to be held until one or the other is clear.
    """

    def __init__(self, sample_period_ns: float, turn_samples: int, confirm_ns: int, held_samples_max: int) -> None:
        """`turn_samples`: after so many samples the counter is the same again.

        `confirm_ns`: a stream that is still late after so long has lost samples; `held_samples_max`: so it has
        when so many wait.
        """
        self._sample_period_ns = sample_period_ns
        self._turn_samples = turn_samples
        self._turn_ns = sample_period_ns * turn_samples
        self._confirm_ns = confirm_ns
        self._held_samples_max = held_samples_max
        self._baseline_ns: float | None = None
        self._last_arrival_ns = 0
        self._turns_late = 0

    @property
    def last_arrival_ns(self) -> int:
        """When samples came last."""
        return self._last_arrival_ns

    @property
    def suspected_samples(self) -> int:
        """How many samples are missing, should the lateness at the last arrival have been a loss."""
        return self._turns_late * self._turn_samples

    def judge(self, next_index: int, arrival_ns: int, held_since_ns: int, held_samples: int) -> int | None:
        """Samples that went missing unseen before those that are held; None: not clear yet, hold them.

        `next_index`: number of the sample that is expected next, by the counter alone.
        """
        lateness_ns = arrival_ns - next_index * self._sample_period_ns
        if self._baseline_ns is None:
            self._baseline_ns = lateness_ns
        drift_ns = DRIFT_MAX * (arrival_ns - self._last_arrival_ns)
        self._last_arrival_ns = arrival_ns
        # The earliest arrivals tell what is expected; the clocks may drift apart.
        self._baseline_ns = min(lateness_ns, self._baseline_ns + min(drift_ns, DRIFT_NS_PER_CHUNK_MAX))
        self._turns_late = int((lateness_ns - self._baseline_ns + self._turn_ns / 2) // self._turn_ns)
        waited = arrival_ns - held_since_ns >= self._confirm_ns or held_samples >= self._held_samples_max
        return self.suspected_samples if waited or not self._turns_late else None
