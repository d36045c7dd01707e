"""Recordings of every format as configured devices, the whole way: at real speed, and as fast as possible."""

from __future__ import annotations

import asyncio
import struct
import time
from collections.abc import Callable
from pathlib import Path

import edfio
import numpy as np
import pytest

from gateway.acquisition import Acquisition, Outputs, State
from gateway.clock import HostClock
from gateway.reach import reach
from gateway.samples import EEG, NS_PER_S, VITAL_SIGNS, LossRecord, SampleBlock
from gateway.settings import Device

pytestmark = pytest.mark.timeout(60)

SECONDS = 2.0
ALPHA = [10 * np.sin(2 * np.pi * 10 * np.arange(2000) / rate) for rate in (250, 256, 200)]


def openbci_text(path: Path) -> int:
    count = round(SECONDS * 250)
    rows = [f"{k % 256}, " + ", ".join(f"{ALPHA[0][k] + channel:.3f}" for channel in range(8)) for k in range(count)]
    head = ["%OpenBCI Raw EXG Data", "%Number of channels = 8", "%Sample Rate = 250 Hz"]
    names = ["Sample Index", *(f"EXG Channel {k}" for k in range(8))]
    path.write_text("\n".join([*head, ", ".join(names), *rows]) + "\n")
    return count


def muse_csv(path: Path) -> int:
    count = round(SECONDS * 256)
    rows = [f"{1_500_000_000 + k / 256:.6f},{ALPHA[1][k]:.3f},1,2,3,0" for k in range(count)]
    path.write_text("\n".join(["timestamps,TP9,AF7,AF8,TP10,Right AUX", *rows]) + "\n")
    return count


def edf(path: Path) -> int:
    count = round(SECONDS * 200)
    edfio.Edf([edfio.EdfSignal(ALPHA[2][:count], 200, label="Cz", physical_dimension="uV")]).write(path)
    return count


def bdf(path: Path) -> int:
    count = round(SECONDS * 200)
    edfio.Bdf([edfio.BdfSignal(ALPHA[2][:count], 200, label="Cz", physical_dimension="uV")]).write(path)
    return count


def xdf(path: Path) -> int:
    """One stream of EEG, every sample with its time (XDF specification 1.0)."""
    pytest.importorskip("pyxdf", reason="NOT TESTED: pyxdf (the extra xdf) is not installed")
    count = round(SECONDS * 250)

    def chunk(tag: int, content: bytes) -> bytes:
        return b"\x04" + struct.pack("<IH", len(content) + 2, tag) + content

    info = (
        "<?xml version='1.0'?><info><name>x</name><type>EEG</type><channel_count>1</channel_count>"
        "<nominal_srate>250</nominal_srate><channel_format>float32</channel_format><created_at>0</created_at><desc>"
        "<channels><channel><label>Cz</label><unit>microvolts</unit></channel></channels></desc></info>"
    )
    rows = b"".join(b"\x08" + struct.pack("<df", 100 + k / 250, ALPHA[0][k]) for k in range(count))
    last = 100 + (count - 1) / 250
    footer = (
        f"<?xml version='1.0'?><info><first_timestamp>100</first_timestamp><last_timestamp>{last}</last_timestamp>"
        f"<sample_count>{count}</sample_count></info>"
    )
    one = struct.pack("<I", 1)
    path.write_bytes(
        b"XDF:"
        + chunk(1, b"<?xml version='1.0'?><info><version>1.0</version></info>")
        + chunk(2, one + info.encode())
        + chunk(3, one + b"\x04" + struct.pack("<I", count) + rows)
        + chunk(6, one + footer.encode())
    )
    return count


def nmea_log(path: Path) -> int:
    bodies = [f"GPGGA,10360{k}.00,5327.03942,N,00214.42462,W,1,06,5.88,56.0,M,48.5,M,," for k in range(3)]
    sums = [np.bitwise_xor.reduce(np.frombuffer(body.encode(), dtype=np.uint8)) for body in bodies]
    path.write_text("".join(f"${body}*{check:02X}\r\n" for body, check in zip(bodies, sums, strict=True)), newline="")
    return len(bodies)


FORMATS: dict[str, tuple[Callable[[Path], int], str]] = {
    "openbci.txt": (openbci_text, EEG),
    "muse.csv": (muse_csv, EEG),
    "night.edf": (edf, EEG),
    "night.bdf": (bdf, EEG),
    "lab.xdf": (xdf, EEG),
    "walk.nmea": (nmea_log, VITAL_SIGNS),
}


@pytest.mark.parametrize("paced", [True, False])
@pytest.mark.parametrize("name", FORMATS)
async def test_a_recording_as_a_device(tmp_path: Path, name: str, paced: bool) -> None:
    write, signal = FORMATS[name]
    count = await asyncio.to_thread(write, tmp_path / name)
    device = Device(driver="replay", serial="REC-1", file=str(tmp_path / name), paced=paced)
    found = await reach(device)
    items: list[SampleBlock | LossRecord] = []
    outputs = Outputs(items.append, lambda _birth: None, lambda _device, _features: None)
    acquisition = Acquisition("gw-1", device, found.driver, found.link, HostClock(), outputs)
    begun_ns = time.time_ns()
    await acquisition.run()  # until the recording has ended
    ended_ns = time.time_ns()
    assert acquisition.condition.state is State.WAITING
    assert "was played to its end" in acquisition.condition.reason
    times = np.concatenate([item.times_ns for item in items if isinstance(item, SampleBlock) and item.signal == signal])
    assert len(times) == count
    assert not [item for item in items if isinstance(item, LossRecord)]
    assert np.all(np.diff(times) > 0)
    lasts_ns = (count - 1) * NS_PER_S * SECONDS / count if signal == EEG else (count - 1) * NS_PER_S
    assert times[-1] - times[0] == pytest.approx(lasts_ns, rel=0.02), "its own distances, however fast it is played"
    if paced:
        assert times[0] >= begun_ns - NS_PER_S // 10
        assert ended_ns - begun_ns >= 0.95 * lasts_ns
    else:
        assert times[-1] <= ended_ns, "as if it had just been recorded"
