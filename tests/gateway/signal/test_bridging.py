"""Short gaps become straight lines, within their share; every other gap is lost, to the sample."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from gateway.signal.bridging import BRIDGE_S, SHARE_MAX, Bridged, GapBridge

RATE_HZ = 250.0
LONGEST = 12
SECOND = 250
SHARE = 25


class Stream:
    """A bridge and all that came out of it."""

    def __init__(self, channels: int = 2, rate_hz: float = RATE_HZ) -> None:
        self.bridge = GapBridge(rate_hz, channels)
        self.channels = channels
        self.parts: list[Bridged] = []
        self.went_in = 0

    def give(self, count: int, *, gone: tuple[int, ...] = (), bad: tuple[int, ...] = ()) -> Stream:
        """Samples whose value is their number, times 1, 2, ... in each channel."""
        numbers = np.arange(self.went_in, self.went_in + count, dtype=np.float64)
        uv = numbers[:, np.newaxis] * np.arange(1, self.channels + 1)
        marks = np.zeros((2, count, self.channels), np.bool_)
        marks[0][:, list(bad)] = True
        marks[1][:, list(gone)] = True
        uv[marks[1]] = 0
        self.parts.append(self.bridge.push(uv, marks[0] | marks[1], marks[1] if gone else None))
        self.went_in += count
        return self

    def miss(self, count: int) -> Stream:
        self.parts.append(self.bridge.miss(count))
        self.went_in += count
        return self

    def end(self) -> Stream:
        self.parts.append(self.bridge.give_up())
        return self

    @property
    def out(self) -> int:
        return sum(map(len, self.parts))

    @property
    def uv(self) -> NDArray[np.float64]:
        return np.concatenate([part.uv for part in self.parts])

    @property
    def bad(self) -> NDArray[np.bool_]:
        return np.concatenate([part.bad for part in self.parts])

    @property
    def lost(self) -> NDArray[np.bool_]:
        return np.concatenate([np.zeros(p.uv.shape, np.bool_) if p.lost is None else p.lost for p in self.parts])

    def lost_in(self, channel: int) -> list[int]:
        return np.flatnonzero(self.lost[:, channel]).tolist()


def is_a_line(stream: Stream) -> bool:
    return np.allclose(stream.uv, np.arange(stream.out)[:, np.newaxis] * np.arange(1, stream.channels + 1))


def test_the_longest_gap_holds_a_packet_of_a_muse() -> None:
    assert int(BRIDGE_S * 256) == 12
    assert int(BRIDGE_S * RATE_HZ) == LONGEST
    assert int(SHARE_MAX * SECOND) == SHARE


@pytest.mark.parametrize("count", [1, 2, LONGEST])
def test_a_short_gap_of_all_channels_is_a_straight_line(count: int) -> None:
    stream = Stream().give(5).miss(count)
    assert stream.out == 5, "the sample after it is not there yet"
    stream.give(1)
    assert stream.out == 6 + count
    assert is_a_line(stream)
    assert not stream.bad.any()
    assert not stream.lost.any()


def test_a_short_gap_of_one_channel_is_a_straight_line_and_the_other_stays_as_it_is() -> None:
    stream = Stream().give(5).give(LONGEST, gone=(1,))
    assert stream.out == 5
    stream.give(5)
    assert is_a_line(stream)
    assert not stream.bad.any()


def test_gaps_that_overlap_come_out_as_far_as_they_are_closed() -> None:
    stream = Stream().give(5).give(6, gone=(0,)).give(4, gone=(1,))
    assert stream.out == 11
    stream.give(1)
    assert stream.out == 16
    assert is_a_line(stream)


@pytest.mark.parametrize("pieces", [(LONGEST + 1,), (LONGEST, 1), (1,) * (LONGEST + 1)])
def test_one_sample_more_is_lost_however_it_is_told_and_nothing_waits_for_its_end(pieces: tuple[int, ...]) -> None:
    stream = Stream().give(5)
    for count in pieces:
        stream.miss(count)
    assert stream.out == 5 + LONGEST + 1
    stream.miss(3).give(5)
    assert stream.lost_in(0) == stream.lost_in(1) == list(range(5, 5 + LONGEST + 4))
    assert np.array_equal(stream.bad, stream.lost)


def test_beside_what_is_not_usable_nothing_is_bridged() -> None:
    before = Stream().give(5).give(1, bad=(0,)).miss(2).give(5)
    assert (before.lost_in(0), before.lost_in(1)) == ([6, 7], [])
    after = Stream().give(5).miss(2).give(1, bad=(0,)).give(5)
    assert (after.lost_in(0), after.lost_in(1)) == ([5, 6], [])
    assert Stream().miss(2).give(5).lost_in(0) == [0, 1]
    assert Stream().give(5).miss(2).end().lost_in(0) == [5, 6]


def test_a_value_that_no_electrode_delivers_is_no_neighbour() -> None:
    stream = Stream(1)
    stream.parts.append(stream.bridge.push(np.array([[1.0], [1e9]]), np.zeros((2, 1), np.bool_)))
    stream.miss(1).give(2)
    assert stream.lost_in(0) == [2]


@pytest.mark.parametrize("apart", [40, 100])
def test_the_share_of_a_second_is_bounded_in_each_channel(apart: int) -> None:
    stream = Stream()
    third = 3 * apart + 40
    for gap in range(3):
        stream.give(apart).give(10, gone=(1,))
        assert stream.give(10).lost_in(1) == ([] if gap < 2 else list(range(third, third + 10)))
    stream.give(SECOND).give(10, gone=(1,)).give(10)
    assert len(stream.lost_in(1)) == 10, "a second later there is room again"
    assert stream.lost_in(0) == []


def test_after_a_reset_nothing_is_known() -> None:
    stream = Stream().give(5).miss(2)
    stream.bridge.reset()
    assert stream.give(3).out == 8
    stream.bridge.reset()
    assert stream.miss(1).give(1).lost_in(0) == [8]


def test_with_no_gap_the_samples_are_the_very_same() -> None:
    bridge = GapBridge(RATE_HZ, 2)
    uv, bad = np.ones((7, 2)), np.zeros((7, 2), np.bool_)
    given = bridge.push(uv, bad)
    assert given.uv is uv
    assert given.bad is bad
    assert given.lost is None


Told = tuple[str, int, tuple[int, ...]]
TOLD = st.tuples(
    st.sampled_from(["give", "give", "gone", "bad", "miss"]),
    st.integers(1, 30),
    st.sets(st.integers(0, 2), min_size=1).map(tuple),
)


@settings(max_examples=300, deadline=None)
@given(told=st.lists(TOLD, max_size=60))
def test_whatever_is_lost_all_comes_out_in_order_and_no_second_holds_more_than_its_share(told: list[Told]) -> None:
    stream = Stream(3)
    absent: list[NDArray[np.bool_]] = []
    for what, count, channels in told:
        gone = np.zeros((count, 3), np.bool_)
        if what == "miss":
            gone[:] = True
            stream.miss(count)
        elif what == "gone":
            gone[:, list(channels)] = True
            stream.give(count, gone=channels)
        else:
            stream.give(count, bad=channels if what == "bad" else ())
        absent.append(gone)
        assert stream.went_in - stream.out <= LONGEST, "more is held than the longest gap"
    stream.end()
    assert stream.out == stream.went_in
    did_not_come = np.concatenate([*absent, np.zeros((0, 3), np.bool_)])
    usable = ~stream.bad
    assert np.allclose(stream.uv[usable], np.outer(np.arange(stream.out), [1, 2, 3])[usable])
    assert not (stream.lost & ~did_not_come).any()
    bridged = did_not_come & ~stream.lost
    assert not (bridged & stream.bad).any()
    sums = np.concatenate([np.zeros((1, 3), np.int64), np.cumsum(bridged, axis=0)])
    for stop in range(1, len(sums)):
        assert (sums[stop] - sums[max(0, stop - SECOND)] <= SHARE).all()
