from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.devices import gatt, polar
from gateway.devices.base import Decoder, Event, Missing, Reading, Rejected, Samples, Send, Streaming
from gateway.devices.polar import PMD_CONTROL, PMD_DATA, PolarDecoder, SampleAxis
from gateway.errors import DeviceError
from gateway.links.base import Chunk
from gateway.samples import NS_PER_S

ARRIVAL_NS = 5_000_000_000_000
VECTOR = "00 0094357700000000 00 0280ff 028000 d2ffff 0a0000"
SETTINGS_ANSWER = "f0 01 00 00 00 00 01 8200 01 01 0e00"
START_ANSWER = "f0 02 00 00 00"


def chunk(octets: str, channel: str = PMD_DATA, arrival_ns: int = ARRIVAL_NS) -> Chunk:
    return Chunk(bytes.fromhex(octets), arrival_ns, channel)


def frame(time_ns: int, values: list[int]) -> bytes:
    samples = b"".join(value.to_bytes(3, "little", signed=True) for value in values)
    return b"\0" + time_ns.to_bytes(8, "little") + b"\0" + samples


def started() -> PolarDecoder:
    decoder = PolarDecoder()
    decoder.start()
    decoder.receive(chunk(SETTINGS_ANSWER, PMD_CONTROL))
    decoder.receive(chunk(START_ANSWER, PMD_CONTROL))
    return decoder


def test_the_vector() -> None:
    decoded = polar.ecg_frame(bytes.fromhex(VECTOR))
    assert decoded.time_ns == 2_000_000_000
    assert decoded.microvolts.dtype == np.int32
    assert decoded.microvolts.tolist() == [-32766, 32770, -46, 10]
    (samples,) = started().receive(chunk(VECTOR))
    assert isinstance(samples, Samples)
    assert (samples.signal, samples.index, samples.arrival_ns, samples.scales) == ("ecg", 0, ARRIVAL_NS, {"ecg": 1.0})
    assert samples.columns["ecg"].tolist() == [-32766, 32770, -46, 10]


def test_the_decoder_follows_the_protocol() -> None:
    decoder: Decoder = PolarDecoder()
    assert [(spec.signal, spec.rate_hz, spec.channels, spec.units) for spec in decoder.signals] == [
        ("ecg", 130.0, ("ecg",), ("uV",)),
        ("vital_signs", None, ("heart_rate", "rr_interval"), ("/min", "ms")),
    ]


def test_the_start_sequence() -> None:
    decoder = PolarDecoder()
    assert decoder.start() == [Send(b"\x01\x00", PMD_CONTROL)]
    assert decoder.receive(chunk("0f 05" + "00" * 15, PMD_CONTROL)) == []
    start = bytes.fromhex("02 00 00 01 82 00 01 01 0e 00")
    assert decoder.receive(chunk(SETTINGS_ANSWER, PMD_CONTROL)) == [Send(start, PMD_CONTROL)]
    assert decoder.receive(chunk(START_ANSWER, PMD_CONTROL)) == [Streaming()]
    assert isinstance(decoder.receive(chunk(START_ANSWER, PMD_CONTROL))[0], Rejected), "nothing was asked any more"


def test_an_ecg_that_somebody_else_started_is_ours_too() -> None:
    decoder = PolarDecoder()
    decoder.receive(chunk(SETTINGS_ANSWER, PMD_CONTROL))
    assert decoder.receive(chunk("f0 02 00 06 00", PMD_CONTROL)) == [Streaming()]


@pytest.mark.parametrize("error", [code for code in range(1, 16) if code != polar.ALREADY_STREAMING] + [99])
def test_a_refusal_is_told_with_its_reason(error: int) -> None:
    decoder = PolarDecoder()
    decoder.receive(chunk(SETTINGS_ANSWER, PMD_CONTROL))
    with pytest.raises(DeviceError, match=rf"does not start the ECG: .*\(error {error}\)") as caught:
        decoder.receive(chunk(f"f0 02 00 {error:02x}", PMD_CONTROL))
    if error in {10, 13}:
        assert caught.value.hint


@pytest.mark.parametrize(
    ("octets", "says"),
    [
        ("0f 04", "no ECG"),
        ("f0 01 00 00 00 00 01 c800 01 01 0e00", "expected 130 Hz"),
        ("f0 01 00 00 00 00 01 8200", "14 bit"),
        ("f0 01 00 02", "unknown kind of measurement"),
    ],
)
def test_a_sensor_that_cannot_give_it(octets: str, says: str) -> None:
    with pytest.raises(DeviceError, match=says):
        PolarDecoder().receive(chunk(octets, PMD_CONTROL))


@pytest.mark.parametrize(
    "octets", ["", "f0", "f0 01 00", "aa 01 00 00", "f0 01 00 00 00 00 09 82", "f0 03 00 00", "0f"]
)
def test_a_malformed_answer_leads_nowhere(octets: str) -> None:
    (event,) = PolarDecoder().receive(chunk(octets, PMD_CONTROL))
    assert isinstance(event, Rejected)


@pytest.mark.parametrize(
    "octets",
    ["", VECTOR[:-2], VECTOR[:-4], VECTOR[: 2 * 10 + 5], "02" + VECTOR[2:], VECTOR.replace("00 0280ff", "80 0280ff")],
)
def test_a_frame_that_is_none(octets: str) -> None:
    decoder = started()
    (event,) = decoder.receive(chunk(octets))
    assert isinstance(event, Rejected)
    assert event.byte_count == len(bytes.fromhex(octets))
    (samples,) = decoder.receive(chunk(VECTOR))
    assert isinstance(samples, Samples)


def times(count: int, period_ns: float) -> list[int]:
    return [599_616_000 * NS_PER_S + round(k * period_ns) for k in range(count)]


@pytest.mark.parametrize("rate_error", [-0.005, -0.001, 0.0, 0.001, 0.005])
@given(kept=st.lists(st.booleans(), min_size=2, max_size=60), size=st.integers(20, 73))
def test_every_lost_frame_is_counted(rate_error: float, kept: list[bool], size: int) -> None:
    period_ns = NS_PER_S / 130 * (1 + rate_error)
    decoder = started()
    stamps = times(len(kept) * size, period_ns)
    events: list[Event] = []
    # What is lost before the first frame cannot be known.
    kept[0] = True
    for number, arrives in enumerate(kept):
        if arrives:
            values = list(range(number * size, (number + 1) * size))
            events += decoder.receive(Chunk(frame(stamps[(number + 1) * size - 1], values), ARRIVAL_NS, PMD_DATA))
    assert not any(isinstance(event, Rejected) for event in events)
    found = np.concatenate([event.columns["ecg"] for event in events if isinstance(event, Samples)])
    index = np.concatenate([event.index + np.arange(len(event)) for event in events if isinstance(event, Samples)])
    assert (found == index).all(), "the number of a sample is the number that it was made with"
    last_kept = max(number for number, arrives in enumerate(kept) if arrives)
    missing = [event for event in events if isinstance(event, Missing)]
    assert sum(event.count for event in missing) == size * kept[: last_kept + 1].count(False)
    for event in missing:
        assert not set(range(event.index, event.index + event.count)) & set(index.tolist())


def test_frames_of_different_sizes() -> None:
    axis = SampleAxis()
    stamps = times(400, NS_PER_S / 130)
    assert axis.place(stamps[72], 73) == 0
    assert axis.place(stamps[92], 20) == 0
    assert axis.place(stamps[165], 73) == 0
    assert axis.place(stamps[258], 73) == 20
    assert axis.next_index == 259


def test_a_repeated_frame_and_a_late_one_are_rejected() -> None:
    decoder = started()
    stamps = times(300, NS_PER_S / 130)
    frames = [frame(stamps[73 * k + 72], [k] * 73) for k in range(4)]
    events = [decoder.receive(Chunk(frames[k], ARRIVAL_NS, PMD_DATA)) for k in (0, 0, 2, 1, 3)]
    assert [[type(event) for event in some] for some in events] == [
        [Samples],
        [Rejected],
        [Missing, Samples],
        [Rejected],
        [Samples],
    ]


@pytest.mark.parametrize("leap_s", [-3600, -61, 61, 20 * 365 * 86_400])
def test_a_clock_that_is_set_begins_anew(leap_s: int) -> None:
    decoder = started()
    decoder.receive(Chunk(frame(10**18, [0] * 73), ARRIVAL_NS, PMD_DATA))
    with pytest.raises(DeviceError, match="clock was set"):
        decoder.receive(Chunk(frame(10**18 + leap_s * NS_PER_S, [0] * 73), ARRIVAL_NS, PMD_DATA))


def test_a_clock_that_is_set_back_by_little_is_noticed_too() -> None:
    decoder = started()
    decoder.receive(Chunk(frame(10**18, [0] * 73), ARRIVAL_NS, PMD_DATA))
    late = [frame(10**18 - (60 - k) * NS_PER_S // 2, [0] * 73) for k in range(20)]
    for each in late[: polar.LATE_FRAMES_MAX]:
        assert isinstance(decoder.receive(Chunk(each, ARRIVAL_NS, PMD_DATA))[0], Rejected)
    with pytest.raises(DeviceError, match="clock was set"):
        decoder.receive(Chunk(late[-1], ARRIVAL_NS, PMD_DATA))


def test_a_heart_rate_without_an_ecg_is_a_failure() -> None:
    decoder = started()

    def beats(seconds: int) -> list[Event]:
        return decoder.receive(chunk("00 48", gatt.HEART_RATE_MEASUREMENT, ARRIVAL_NS + seconds * NS_PER_S))

    assert isinstance(beats(9)[0], Reading)
    decoder.receive(chunk(VECTOR, PMD_DATA, ARRIVAL_NS + 10 * NS_PER_S))
    beats(15)
    with pytest.raises(DeviceError, match="no ECG"):
        beats(16)


@given(
    st.lists(
        st.tuples(st.binary(max_size=600), st.sampled_from([*PolarDecoder.NOTIFY, *PolarDecoder.READ])), max_size=8
    )
)
def test_any_bytes_give_events_that_stand_for_them(chunks: list[tuple[bytes, str]]) -> None:
    decoder = PolarDecoder()
    for data, channel in chunks:
        try:
            events = decoder.receive(Chunk(data, ARRIVAL_NS, channel))
        except DeviceError:
            return
        assert sum(event.byte_count for event in events if isinstance(event, Rejected)) <= len(data)
        assert sum(len(event) * 3 for event in events if isinstance(event, Samples)) <= len(data)
