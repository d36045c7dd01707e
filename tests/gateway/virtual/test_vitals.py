"""The virtual vitals sensors through our own decoders, with ideal arrivals."""

from __future__ import annotations

from datetime import timedelta

import pytest

from gateway.devices import gatt
from gateway.devices.base import Decoder, Event, Facts, Reading, Rejected
from gateway.devices.blood_pressure import BloodPressureDecoder
from gateway.devices.pulse_oximeter import PulseOximeterDecoder
from gateway.devices.thermometer import ThermometerDecoder
from gateway.links.base import Chunk
from gateway.samples import NS_PER_S
from gateway.virtual.sensor import VirtualSensor
from gateway.virtual.vitals import BloodPressureCuff, PulseOximeter, Thermometer


def listened(sensor: VirtualSensor, uuid: str, decoder: Decoder, periods: int) -> list[Event]:
    """Events of one characteristic over so many periods of the sensor."""
    events: list[Event] = []
    sensor.listen(
        lambda heard, value: (
            events.extend(decoder.receive(Chunk(value, round(sensor.time_s * NS_PER_S), heard)))
            if heard == uuid
            else None
        )
    )
    sensor.subscribed(uuid)
    for _ in range(periods):
        for each, value in sensor.measurements():
            sensor.send(each, value)
    return events


def values(events: list[Event], field: str) -> list[float]:
    return [event.fields[field] for event in events if isinstance(event, Reading) and field in event.fields]


def rejected(events: list[Event]) -> list[str]:
    return [event.reason for event in events if isinstance(event, Rejected)]


def oximetry(oximeter: PulseOximeter, seconds: int) -> list[Event]:
    return listened(oximeter, gatt.PLX_CONTINUOUS, PulseOximeterDecoder(), seconds)


def pressures(cuff: BloodPressureCuff, seconds: int) -> list[Event]:
    return listened(cuff, gatt.BLOOD_PRESSURE_MEASUREMENT, BloodPressureDecoder(), seconds)


def temperatures(thermometer: Thermometer, periods: int) -> list[Event]:
    return listened(thermometer, gatt.TEMPERATURE_MEASUREMENT, ThermometerDecoder(), periods)


@pytest.mark.parametrize("seed", range(3))
def test_an_hour_of_oximetry(seed: int) -> None:
    events = oximetry(PulseOximeter(seed=seed), 3600)
    assert not rejected(events)
    spo2, rate, perfusion = (values(events, field) for field in ("spo2", "heart_rate", "perfusion_index"))
    assert len(spo2) == len(rate) == len(perfusion) == 3600
    assert min(spo2) >= 93
    assert max(spo2) <= 100
    assert len(set(spo2)) >= 3
    assert min(rate) >= 60
    assert max(rate) <= 80
    assert 2 < min(perfusion) < max(perfusion) < 6


def test_the_faults_of_an_oximeter() -> None:
    oximeter = PulseOximeter()
    oximeter.contact = False
    assert set(rejected(oximetry(oximeter, 3))) == {
        "not to be trusted: no measurement available, sensor is not on the user"
    }
    oximeter.contact, oximeter.without_value = True, True
    events = oximetry(oximeter, 2)
    assert not values(events, "spo2")
    assert len(rejected(events)) == 6
    oximeter.without_value, oximeter.measurement_status = False, 1 << 14
    assert rejected(oximetry(oximeter, 1)) == ["not to be trusted: questionable measurement"]
    oximeter.measurement_status, oximeter.malformed = 0, True
    (reason,) = rejected(oximetry(oximeter, 1))
    assert "too short" in reason
    oximeter.malformed, oximeter.silent = False, True
    assert oximetry(oximeter, 3) == []
    oximeter.silent = False
    assert len(values(oximetry(oximeter, 3), "spo2")) == 3


def test_a_spot_check_and_one_from_its_memory() -> None:
    oximeter = PulseOximeter()
    events: list[Event] = []
    decoder = PulseOximeterDecoder()
    oximeter.listen(lambda uuid, value: events.extend(decoder.receive(Chunk(value, 0, uuid))))
    oximeter.spot_check()
    oximeter.spot_check(stored=True)
    assert len(values(events, "spo2")) == 1
    assert rejected(events) == ["PLX Spot-Check Measurement: a stored measurement, and how old it is cannot be known"]


@pytest.mark.parametrize("kilopascal", [False, True])
def test_a_day_of_blood_pressures(*, kilopascal: bool) -> None:
    events = pressures(BloodPressureCuff(kilopascal=kilopascal), 86_400)
    assert not rejected(events)
    systolic, diastolic, rate = (values(events, field) for field in ("systolic_bp", "diastolic_bp", "heart_rate"))
    assert len(systolic) == len(diastolic) == len(rate) == 96
    assert all(60 < low < high - 20 < 125 for low, high in zip(diastolic, systolic, strict=True))


def test_a_cuff_tells_the_pressure_that_it_is_inflated_to_before_a_result() -> None:
    cuff = BloodPressureCuff(interval_s=60)
    cuff.subscribed(gatt.BLOOD_PRESSURE_MEASUREMENT)
    sent = [uuid for _ in range(60) for uuid, _ in cuff.measurements()]
    assert sent == [gatt.INTERMEDIATE_CUFF_PRESSURE] * 29 + [gatt.BLOOD_PRESSURE_MEASUREMENT]
    with pytest.raises(ValueError, match="30 s"):
        BloodPressureCuff(interval_s=30)


def test_what_a_cuff_measured_without_a_listener_comes_later_with_its_own_time() -> None:
    cuff = BloodPressureCuff(interval_s=600)
    for _ in range(3000):
        assert gatt.BLOOD_PRESSURE_MEASUREMENT not in dict(cuff.measurements())
    decoder = BloodPressureDecoder()
    now_ns = round(cuff.time_s * NS_PER_S)
    decoder.receive(Chunk(cuff.read(gatt.DATE_TIME), now_ns, gatt.DATE_TIME))
    events: list[Event] = []
    cuff.listen(lambda uuid, value: events.extend(decoder.receive(Chunk(value, now_ns, uuid))))
    cuff.subscribed(gatt.BLOOD_PRESSURE_MEASUREMENT)
    assert [event.arrival_ns // NS_PER_S for event in events if isinstance(event, Reading)] == [
        600,
        1200,
        1800,
        2400,
        3000,
    ]
    assert cuff.measured == 5
    cuff.subscribed(gatt.BLOOD_PRESSURE_MEASUREMENT)
    assert len(values(events, "systolic_bp")) == 5, "what was sent is kept no longer"
    cuff.link_down()
    before = cuff.clock
    for _ in range(600):
        cuff.measurements()
    assert cuff.clock - before == timedelta(seconds=600)
    assert len(values(events, "systolic_bp")) == 5


def test_the_faults_of_a_cuff() -> None:
    cuff = BloodPressureCuff(interval_s=60)
    cuff.status = 1 << 1
    assert rejected(pressures(cuff, 60)) == ["questionable: the cuff was loose"]
    cuff.status, cuff.without_value = 0, True
    events = pressures(cuff, 60)
    assert not values(events, "systolic_bp")
    assert values(events, "heart_rate")
    cuff.without_value, cuff.malformed = False, True
    assert len(rejected(pressures(cuff, 60))) == 1
    cuff.malformed, cuff.silent = False, True
    assert pressures(cuff, 120) == []
    cuff.silent = False
    assert len(values(pressures(cuff, 60), "systolic_bp")) == 3, "kept while it was silent"


@pytest.mark.parametrize("fahrenheit", [False, True])
def test_a_day_of_temperatures(*, fahrenheit: bool) -> None:
    events = temperatures(Thermometer(fahrenheit=fahrenheit), 8640)
    assert not rejected(events)
    measured = values(events, "temperature")
    assert len(measured) == 8640 - 5, "the first minute it warms up"
    assert 36.2 < min(measured) < 36.6
    assert 37.0 < max(measured) < 37.4


def test_a_thermometer_without_value() -> None:
    thermometer = Thermometer()
    thermometer.without_value = True
    assert set(rejected(temperatures(thermometer, 20))) == {"temperature: the sensor has no value"}


@pytest.mark.parametrize("kind", [PulseOximeter, BloodPressureCuff, Thermometer])
def test_the_same_seed_is_the_same_patient(kind: type[PulseOximeter | BloodPressureCuff | Thermometer]) -> None:
    def lived(seed: int) -> list[tuple[str, bytes]]:
        sensor = kind(seed=seed)
        sensor.subscribed(gatt.BLOOD_PRESSURE_MEASUREMENT)
        return [each for _ in range(2000) for each in sensor.measurements()]

    assert lived(4) == lived(4)
    assert lived(4) != lived(5)


@pytest.mark.parametrize("kind", [PulseOximeter, BloodPressureCuff, Thermometer])
def test_what_it_says_of_itself(kind: type[PulseOximeter | BloodPressureCuff | Thermometer]) -> None:
    sensor = kind(name="Ward sensor", battery_pct=40)
    decoder = PulseOximeterDecoder()
    facts = [
        event
        for uuid in (gatt.MODEL_NUMBER, gatt.FIRMWARE_REVISION, gatt.BATTERY_LEVEL)
        for event in decoder.receive(Chunk(sensor.read(uuid), 0, uuid))
    ]
    assert facts == [Facts(model="Ward sensor"), Facts(firmware="1.0.0"), Facts(battery_pct=40.0)]
