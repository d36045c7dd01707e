from __future__ import annotations

from itertools import pairwise

import pytest

from gateway.devices import gatt
from gateway.devices.base import Event, Facts, Reading, Rejected
from gateway.devices.heart_rate import HeartRateDecoder
from gateway.links.base import Chunk
from gateway.virtual.peripheral import Characteristic, Peripheral, Service
from gateway.virtual.strap import Heart, HeartRateStrap

NS_PER_S = 1_000_000_000


def decoded(strap: HeartRateStrap, seconds: int) -> list[Event]:
    """What our decoder makes of the strap's next measurements, one a second, with ideal arrivals."""
    decoder = HeartRateDecoder()
    events: list[Event] = []
    for second in range(seconds):
        events += decoder.receive(Chunk(strap.measurement(), second * NS_PER_S, gatt.HEART_RATE_MEASUREMENT))
    return events


def values(events: list[Event], field: str) -> list[float]:
    return [event.fields[field] for event in events if isinstance(event, Reading) and field in event.fields]


def test_the_same_seed_is_the_same_heart() -> None:
    assert Heart(7).beats_until(600) == Heart(7).beats_until(600)
    assert Heart(7).beats_until(600) != Heart(8).beats_until(600)


def test_beats_do_not_depend_on_how_often_one_asks() -> None:
    heart = Heart(7)
    assert [beat for second in range(601) for beat in heart.beats_until(second)] == Heart(7).beats_until(600)


@pytest.mark.parametrize("seed", range(5))
def test_the_rate_wanders_between_60_and_80_and_breathes(seed: int) -> None:
    beats = Heart(seed).beats_until(3600)
    intervals = [later - earlier for earlier, later in pairwise(beats)]
    minutes = [sum(1 for beat in beats if minute <= beat / 60 < minute + 1) for minute in range(60)]
    assert min(minutes) >= 60
    assert max(minutes) <= 80
    assert max(minutes) - min(minutes) >= 3
    assert all(60 / 90 < interval < 60 / 55 for interval in intervals)
    variation = [abs(later - earlier) for earlier, later in pairwise(intervals)]
    assert 0.01 < sum(variation) / len(variation) < 0.06


def test_our_decoder_gets_every_interval_and_they_add_up() -> None:
    events = decoded(HeartRateStrap(seed=3), 3600)
    beats = Heart(3).beats_until(3600)
    assert not any(isinstance(event, Rejected) for event in events[5:])
    intervals = values(events, "rr_interval")
    assert len(intervals) == len(beats) - 1
    assert sum(intervals) / 1000 == pytest.approx(beats[-1] - beats[0], abs=1 / 1024)
    assert all(60 <= rate <= 82 for rate in values(events, "heart_rate")[10:])


def test_contact_lost_gives_no_value_and_comes_back() -> None:
    strap = HeartRateStrap()
    decoded(strap, 10)
    strap.contact = False
    lost = decoded(strap, 5)
    assert not values(lost, "heart_rate")
    assert not values(lost, "rr_interval")
    assert sum(isinstance(event, Rejected) for event in lost) == 5
    strap.contact = True
    assert len(values(decoded(strap, 10), "heart_rate")) >= 8


def test_intervals_without_a_rate() -> None:
    strap = HeartRateStrap()
    decoded(strap, 10)
    strap.rr_without_heart_rate = True
    events = decoded(strap, 10)
    assert not values(events, "heart_rate")
    assert len(values(events, "rr_interval")) >= 9


def test_what_it_says_of_itself() -> None:
    strap = HeartRateStrap(name="Ward strap", battery_pct=40)
    decoder = HeartRateDecoder()
    facts = [event for uuid in decoder.READ for event in decoder.receive(Chunk(strap.read(uuid), 0, uuid))]
    assert facts == [Facts(model="Ward strap"), Facts(firmware="1.0.0"), Facts(battery_pct=40.0)]


def test_the_battery_falls_with_its_own_time() -> None:
    strap = HeartRateStrap(battery_pct=50)
    decoded(strap, 8 * 3600)
    assert strap.battery_pct() == 48


async def test_run_notifies_in_order_and_a_silent_strap_does_not() -> None:
    strap = HeartRateStrap(seed=3, speed=2000)
    twin = HeartRateStrap(seed=3)
    expected = [twin.measurement() for _ in range(50)]
    got: list[bytes] = []

    class EnoughError(Exception):
        pass

    def listen(uuid: str, value: bytes) -> None:
        if uuid == gatt.HEART_RATE_MEASUREMENT:
            got.append(value)
        if len(got) == 50:
            raise EnoughError

    strap.listen(listen)
    with pytest.raises(EnoughError):
        await strap.run()
    assert got == expected


def test_distortion_decides_what_arrives() -> None:
    peripheral = Peripheral("00:55:DA:00:00:01", "any", [Service("s", (Characteristic("c", ("notify",)),))])
    got: list[bytes] = []
    peripheral.listen(lambda uuid, value: got.append(value))
    peripheral.notify("c", b"1")
    peripheral.distort = lambda uuid, value: ()
    peripheral.notify("c", b"2")
    peripheral.distort = lambda uuid, value: (value, value)
    peripheral.notify("c", b"3")
    peripheral.listen(None)
    peripheral.notify("c", b"4")
    assert got == [b"1", b"3", b"3"]
    assert peripheral.read("c") == b"4"


@pytest.mark.parametrize("address", ["", "00:55:DA:00:00", "00:55:da:00:00:01", "0055DA000001"])
def test_an_address_has_six_octets(address: str) -> None:
    with pytest.raises(ValueError, match="address"):
        Peripheral(address, "any", [])


def test_a_characteristic_is_there_once() -> None:
    with pytest.raises(ValueError, match="twice"):
        Peripheral("00:55:DA:00:00:01", "any", [Service("s", (Characteristic("c", ()), Characteristic("c", ())))])
