"""Recordings: the real files, what is refused and why, and the fit to a Cyton."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import edfio
import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.signal import firwin, resample_poly, welch

from gateway import recording_files
from gateway.devices.cyton import DEFAULT_ELECTRODES, microvolts_per_count
from gateway.errors import ConfigError
from gateway.virtual.recordings import CYTON_MONTAGE, Recording, fit_to_cyton, load_recording, resample

SHARED = Path(__file__).parents[3] / ".." / "shared" / "data"

GUI_HEAD = "%OpenBCI Raw EXG Data\r\n%Number of channels = 2\r\n%Sample Rate = 250 Hz\r\n%Board = X\r\n"
GUI_NAMES = (
    "Sample Index, EXG Channel 0, EXG Channel 1, Accel Channel 0, Accel Channel 1, Accel Channel 2, Timestamp\r\n"
)
MUSE_HEAD = "timestamps,TP9,AF7,Marker\n"


def shared(name: str) -> Path:
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"the shared recording {name} is not on this machine")
    return path


@pytest.fixture
def written(tmp_path: Path) -> Callable[[str | bytes], Path]:
    def write(content: str | bytes) -> Path:
        path = tmp_path / "recording"
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


def edf(path: Path, signals: list[edfio.EdfSignal]) -> Path:
    edfio.Edf(signals).write(path)
    return path


def wave(hz: float, rate_hz: float, seconds: float) -> NDArray[np.float64]:
    return 100 * np.sin(2 * np.pi * hz * np.arange(round(seconds * rate_hz)) / rate_hz)


# The real files


def test_openbci_gui_text() -> None:
    recording = load_recording(shared("cyton/cyton_v6_blinks_jaw_alpha.txt"))
    assert recording.channel_names == tuple(f"EXG {number}" for number in range(1, 9))
    assert (len(recording), recording.rate_hz) == (22490, 250)
    assert recording.seconds == pytest.approx(89.96)
    assert recording.uv[0].tolist() == [61379.36, 49492.89, -16597.06, -21309.75, 6703.91, -3284.86, 7223.10, 1740.11]
    assert recording.acceleration_g is not None
    assert recording.acceleration_g[-1].tolist() == [0.028, 0.768, 0.614]
    counts = recording.uv / microvolts_per_count(24)
    assert np.abs(counts - np.rint(counts)).max() < 0.5


def test_muse_csv() -> None:
    recording = load_recording(shared("muse/muse2016_P300_s1_2017-02-04.csv"))
    assert recording.channel_names == ("TP9", "AF7", "AF8", "TP10", "Right AUX")
    assert (len(recording), recording.rate_hz) == (30732, 256)
    assert recording.acceleration_g is None
    assert recording.uv[1].tolist() == [-28.809, 22.949, 40.039, 52.734, 77.148]
    steps = recording.uv / 0.48828125
    assert np.abs(steps - np.rint(steps)).max() < 0.002


def test_edf() -> None:
    recording = load_recording(shared("eeg_edf/eegmmidb_S001R01.edf"))
    assert (len(recording), recording.rate_hz, len(recording.channel_names)) == (9600, 160, 64)
    fitted = fit_to_cyton(recording)
    assert fitted.channel_names == CYTON_MONTAGE == DEFAULT_ELECTRODES
    assert len(fitted) == 14_999
    before = alpha_share(recording.uv[:, recording.channel_names.index("O1")], 160)
    assert before == pytest.approx(0.147, abs=0.001)
    # Nothing between 1 and 45 Hz may change by the resampling.
    assert alpha_share(fitted.uv[:, 6], 250) == pytest.approx(before, abs=0.001)


def alpha_share(uv: NDArray[np.float64], rate_hz: int) -> float:
    frequency_hz, power = welch(uv, rate_hz, nperseg=rate_hz)
    alpha = power[(frequency_hz >= 8) & (frequency_hz < 13)].sum()
    return float(alpha / power[(frequency_hz >= 1) & (frequency_hz < 45)].sum())


# Other shapes of the formats


def test_gui_text_from_before_the_column_names(written: Callable[[str], Path]) -> None:
    head = "%OpenBCI Raw EEG Data\n%Number of channels = 2\n%Sample Rate = 250.0 Hz\n%First Column = SampleIndex\n"
    recording = load_recording(written(head + "0, 1.5, -2, 0.1, 0.2, 0.3, 12:00\n1, 3, 4, 0, 0, 1, 12:00\n"))
    assert recording.uv.tolist() == [[1.5, -2], [3, 4]]
    assert recording.acceleration_g is not None
    assert recording.acceleration_g.tolist() == [[0.1, 0.2, 0.3], [0, 0, 1]]


def test_gui_text_without_acceleration(written: Callable[[str], Path]) -> None:
    names = "Sample Index, EXG Channel 0, EXG Channel 1, Timestamp\n"
    recording = load_recording(written(GUI_HEAD + names + "0, 1, 2, 3\n"))
    assert recording.uv.tolist() == [[1, 2]]
    assert recording.acceleration_g is None


def test_edf_takes_voltages_alone_in_microvolts(tmp_path: Path) -> None:
    signals = [
        edfio.EdfSignal(wave(10, 200, 2), 200, label="EEG Fp1-REF", physical_dimension="uV"),
        edfio.EdfSignal(wave(10, 200, 2) / 1000, 200, label="C3-A2", physical_dimension="mV"),
        edfio.EdfSignal(wave(1, 50, 2), 50, label="Slow", physical_dimension="uV"),
        edfio.EdfSignal(wave(1, 200, 2), 200, label="SpO2", physical_dimension="%"),
    ]
    recording = load_recording(edf(tmp_path / "mixed.edf", signals))
    assert recording.channel_names == ("Fp1", "C3-A2")
    assert recording.uv[:, 0] == pytest.approx(wave(10, 200, 2), abs=0.01)
    assert recording.uv[:, 1] == pytest.approx(wave(10, 200, 2), abs=0.01)


def test_bdf(tmp_path: Path) -> None:
    path = tmp_path / "recording.bdf"
    edfio.Bdf([edfio.BdfSignal(wave(10, 512, 2), 512, label="Cz", physical_dimension="uV")]).write(path)
    recording = load_recording(path)
    assert (recording.channel_names, recording.rate_hz) == (("Cz",), 512)
    assert recording.uv[:, 0] == pytest.approx(wave(10, 512, 2), abs=0.001)


# What is refused

REFUSED = {
    "empty": ("", "line 1: expected OpenBCI GUI text"),
    "other text": ("hello\n", "line 1: expected OpenBCI GUI text"),
    "binary": (b"\xfe\xff\x00\x01" * 100, "line 1: expected OpenBCI GUI text"),
    "endless line": ("%" + "x" * 5000, "line 1: expected at most 4096 characters"),
    "no rate": ("%Number of channels = 2\n" + GUI_NAMES + "0,1,2,0,0,0,0\n", "line 2: expected '%Number of channels"),
    "no channels": ("%Sample Rate = 250 Hz\n" + GUI_NAMES, "line 2: expected '%Number of channels"),
    "mad rate": ("%Number of channels = 2\n%Sample Rate = 2500000 Hz\n" + GUI_NAMES, "line 3: expected '%Number of"),
    "bad rate": ("%Number of channels = 2\n%Sample Rate = 2.5.0 Hz\n", "line 2: '2.5.0' where a number"),
    "fewer channels": (GUI_HEAD.replace("= 2", "= 8") + GUI_NAMES, "line 5: 2 EXG columns, expected 8"),
    "only a head": (GUI_HEAD + GUI_NAMES, "expected rows of numbers, it ends after its header"),
    "cut row": (GUI_HEAD + GUI_NAMES + "0,1,2,0,0,0,0\n1,1,\n", "line 7: 3 columns, expected at least 6"),
    "word": (GUI_HEAD + GUI_NAMES + "0,1,2,0,0,0,0\n1,1,two,0,0,0,0\n", "line 7: 'two' where a number was expected"),
    "nan": (GUI_HEAD + GUI_NAMES + "0,1,nan,0,0,0,0\n", "line 6: 'nan' where a number was expected"),
    "infinite": (GUI_HEAD + GUI_NAMES + "0,1,1e999,0,0,0,0\n", "line 6: '1e999' where a number was expected"),
    "latin-1": ((GUI_HEAD + GUI_NAMES).encode() + b"0,1,\xb52,0,0,0,0\n", "expected OpenBCI GUI text"),
    "muse, no electrode": ("timestamps,Marker\n1,0\n", "line 1: expected timestamps and at least one electrode"),
    "muse, only a head": (MUSE_HEAD, "expected rows of numbers"),
    "muse, word": (MUSE_HEAD + "1.000,1,2,0\n1.004,1,x,0\n", "line 3: 'x' where a number was expected"),
    "muse, other rate": (MUSE_HEAD + "1.0,1,2,0\n1.01,1,2,0\n", "give 100.0 Hz, expected 256 Hz"),
    "muse, time stands": (MUSE_HEAD + "1.0,1,2,0\n1.0,1,2,0\n", "give 0.0 Hz, expected 256 Hz"),
    "edf, only a head": (b"0       " + b" " * 248, "is not sound EDF or BDF"),
    "bdf, only a head": (b"\xffBIOSEMI" + b" " * 20, "is not sound EDF or BDF"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, written: Callable[[str | bytes], Path]) -> None:
    content, reason = REFUSED[case]
    path = written(content)
    with pytest.raises(ConfigError) as refused:
        load_recording(path)
    assert reason in refused.value.message
    assert str(path) in refused.value.message


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        load_recording(tmp_path / "absent.txt")
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load_recording(tmp_path)


def test_too_large_a_file(written: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording_files, "FILE_BYTES_MAX", 10)
    with pytest.raises(ConfigError, match="expected at most 10"):
        load_recording(written(GUI_HEAD))


def test_too_many_rows(written: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording_files, "ROWS_MAX", 2)
    with pytest.raises(ConfigError, match="line 8: expected at most 2 rows"):
        load_recording(written(GUI_HEAD + GUI_NAMES + "0,1,2,0,0,0,0\n" * 3))


def test_an_edf_that_was_cut_or_overwritten_never_crashes(tmp_path: Path) -> None:
    path = edf(
        tmp_path / "whole.edf",
        [edfio.EdfSignal(wave(10, 200, 3), 200, label=name, physical_dimension="uV") for name in ("C3", "C4")],
    )
    sound = path.read_bytes()
    damaged = tmp_path / "damaged.edf"
    random = np.random.default_rng(7)
    for length in (8, 200, 256, 300, 600, 768, 1000, len(sound) - 1):
        damaged.write_bytes(sound[:length])
        with pytest.raises(ConfigError):
            load_recording(damaged)
    refused = 0
    for _ in range(150):
        content = bytearray(sound)
        for position in random.integers(8, 768, size=3):
            content[position] = random.integers(256)
        damaged.write_bytes(content)
        try:
            load_recording(damaged)
        except ConfigError:
            refused += 1
    assert refused


def test_an_edf_without_voltages(tmp_path: Path) -> None:
    path = edf(tmp_path / "x.edf", [edfio.EdfSignal(wave(1, 50, 2), 50, label="SpO2", physical_dimension="%")])
    with pytest.raises(ConfigError, match="expected at least one channel in uV, mV or V"):
        load_recording(path)


# The fit to a Cyton


def test_what_is_at_250_hz_keeps_its_values_exactly() -> None:
    uv = np.random.default_rng(1).normal(size=(100, 10))
    fitted = fit_to_cyton(Recording(tuple("abcdefghij"), 250.0, uv))
    assert fitted.channel_names == tuple("abcdefgh")
    assert np.array_equal(fitted.uv, uv[:, :8])


def test_the_usual_montage_is_chosen_where_it_is_whole() -> None:
    names = ("Cz", "o2", "O1", "P8", "P7", "C4", "C3", "FP2", "Fp1", "Fz")
    fitted = fit_to_cyton(Recording(names, 250.0, np.arange(20.0).reshape(2, 10)))
    assert fitted.channel_names == ("Fp1", "FP2", "C3", "C4", "P7", "P8", "O1", "o2")
    assert fitted.uv[0].tolist() == [8, 7, 6, 5, 4, 3, 2, 1]


def test_acceleration_holds_its_newest_value_when_resampled() -> None:
    acceleration = np.repeat(np.arange(100.0), 2)[:, None] * np.ones(3)
    fitted = fit_to_cyton(Recording(("Cz",), 500.0, np.zeros((200, 1)), acceleration))
    assert fitted.acceleration_g is not None
    assert fitted.acceleration_g[:, 0].tolist() == list(range(100))


@pytest.mark.parametrize(("rate_hz", "hz"), [(256, 10), (256, 100), (160, 60), (500, 40), (1000, 100), (200.5, 40)])
def test_resampling_keeps_a_wave_and_its_time(rate_hz: float, hz: float) -> None:
    offset_uv = 60_000.0
    resampled = resample((wave(hz, rate_hz, 10) + offset_uv)[:, None], rate_hz, 250)[:, 0]
    expected = wave(hz, 250, 10)[: len(resampled)] + offset_uv
    assert len(resampled) == pytest.approx(2500, abs=2)
    inside = slice(150, -150)
    assert np.abs(resampled - expected)[inside].max() < 0.1
    # At the very ends the wave's own continuation is unknown, but the offset must not ring.
    assert np.abs(resampled - expected).max() < 50


def test_resampling_removes_what_would_alias() -> None:
    resampled = resample(wave(190, 500, 10)[:, None], 500, 250)[:, 0]
    assert np.abs(resampled)[150:-150].max() < 0.02


def test_resampling_agrees_with_scipy() -> None:
    spectrum = np.fft.rfft(np.random.default_rng(3).normal(size=(2560, 2)), axis=0)
    spectrum[900:] = 0  # nothing above 90 Hz, where both filters are still flat
    noise = np.fft.irfft(spectrum, axis=0)
    ours = resample(noise, 256, 250)
    theirs = resample_poly(noise, 125, 128, window=firwin(2 * 40 * 128 + 1, 1 / 128, window=("kaiser", 8.0)))
    inside = slice(100, -100)
    count = min(len(ours), len(theirs))
    assert np.abs(ours[:count] - theirs[:count])[inside].max() < 0.002


def test_a_recording_of_one_sample() -> None:
    assert fit_to_cyton(Recording(("Cz",), 256.0, np.array([[5.0]]))).uv == pytest.approx(np.array([[5.0]]))


def test_a_recording_is_read_only_and_checked() -> None:
    recording = Recording(("Cz",), 250.0, np.zeros((4, 1)))
    with pytest.raises(ValueError, match="read-only"):
        recording.uv[0, 0] = 1
    for names, rate_hz, uv in (
        ((), 250.0, np.zeros((4, 0))),
        (("Cz",), 250.0, np.zeros((0, 1))),
        (("a", "b"), 250.0, np.zeros((4, 1))),
        (("Cz",), 0.0, np.zeros((4, 1))),
    ):
        with pytest.raises(ValueError, match=r"rows of|sampling rate"):
            Recording(names, rate_hz, uv)
    with pytest.raises(ValueError, match="acceleration"):
        Recording(("Cz",), 250.0, np.zeros((4, 1)), np.zeros((3, 3)))
