"""The features' settings from TOML to the engine: what is accepted, what is refused, and that raw samples stay raw."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from gateway import settings
from gateway.acquisition import Acquisition, Outputs
from gateway.assembly import RawAssembler
from gateway.clock import HostClock
from gateway.devices.base import Samples, SignalSpec
from gateway.devices.lsl import LslDecoder
from gateway.devices.registry import DRIVERS
from gateway.errors import ConfigError
from gateway.feature_settings import BandEdges, Features, MeaninglessError
from gateway.samples import BRAIN_STATE, EEG, NS_PER_S, SampleBlock
from gateway.segments import Segments
from gateway.settings import Device, Settings
from gateway.signal.bands import DEFAULT_SETTINGS, Band, FeatureSettings
from gateway.signal.features import Features as State

MINIMAL = '[gateway]\nid = "gw-1"\n[mqtt]\nhost = "broker"\n'
CYTON = '[[device]]\ndriver = "cyton"\nserial = "C-1"\nport = "/dev/ttyUSB0"\n'
MUSE = '[[device]]\ndriver = "muse"\nserial = "M-1"\naddress = "00:22:D0:3A:10:01"\n'
STRAP = '[[device]]\ndriver = "heart_rate"\nserial = "S-1"\naddress = "00:22:d0:3a:10:01"\n'

Load = Callable[[str], Settings]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    def write_and_load(text: str) -> Settings:
        (tmp_path / "gateway.toml").write_text(MINIMAL + text)
        return settings.load(tmp_path / "gateway.toml")

    return write_and_load


def test_nothing_set_is_the_definitions() -> None:
    assert Features().settings() == DEFAULT_SETTINGS


def test_everything_set(load: Load) -> None:
    chosen = load(
        """
        [features]
        mains_hz = 50
        pass_band_hz = [0.5, 70]
        common_average = true
        coherence_band = "beta"
        entropy_band = [2, 40]
        power_time_constant_s = 2
        coherence_time_constant_s = 6.5
        plv_window_s = 3
        [features.bands]
        beta = [13, 25]
        gamma = [25, 48]
        """
        + CYTON
    )
    bands = (*DEFAULT_SETTINGS.bands[:3], Band("beta", 13, 25), Band("gamma", 25, 48))
    found = chosen.device[0].features.settings()
    assert found == FeatureSettings(
        bands, Band("entropy_band", 2, 40), bands[3], 2.0, 6.5, 3.0, 50, (0.5, 70.0), common_average=True
    )


def test_a_device_goes_over_the_gateway(load: Load) -> None:
    chosen = load(
        """
        [features]
        mains_hz = 50
        pass_band_hz = [0.5, 70]
        common_average = true
        bands = { alpha = [8, 12], beta = [12, 30] }
        """
        + CYTON
        + "[device.features]\nmains_hz = 0\npass_band_hz = []\ncoherence_band = [9, 11]\nbands = { alpha = [7, 12] }\n"
        + MUSE
    )
    cyton, muse = (device.features.settings() for device in chosen.device)
    assert (cyton.mains_hz, cyton.pass_band_hz, cyton.common_average) == (None, None, True)
    assert cyton.coherence_band == Band("coherence_band", 9, 11)
    assert [band.low_hz for band in cyton.bands] == [1, 4, 7, 12, 30]
    assert (muse.mains_hz, muse.pass_band_hz, muse.common_average) == (50, (0.5, 70.0), True)
    assert muse.coherence_band == Band("alpha", 8, 12)


@pytest.mark.parametrize(
    ("text", "key", "what"),
    [
        ("[features]\nmains_hz = 55", "features.mains_hz", "not one of the possible values"),
        ("[features]\nmain_hz = 50", "features.main_hz", "did you mean 'mains_hz'"),
        ("[features]\npass_band_hz = [70, 0.5]", "features.pass_band_hz", "expected 0 < low < high"),
        ("[features]\npass_band_hz = [1]", "features.pass_band_hz", "expected two, or none"),
        ("[features]\npass_band_hz = [1, 2, 3]", "features.pass_band_hz", "length <= 2"),
        ("[features]\ncoherence_band = 'mu'", "features.coherence_band", "'mu'"),
        ("[features]\ncoherence_band = [8.2, 8.8]", "features.coherence_band", "none of the 1 Hz bins"),
        ("[features]\nentropy_band = [10, 11]", "features.entropy_band", "expected two or more"),
        ("[features]\nentropy_band = [1, 51]", "features.entropy_band", "<= 50 Hz"),
        ("[features]\npower_time_constant_s = 0.1", "features.power_time_constant_s", "0.2 s or more"),
        ("[features]\ncoherence_time_constant_s = 1", "features.coherence_time_constant_s", "2 s or more"),
        ("[features]\nplv_window_s = nan", "features.plv_window_s", "expected 1..60 s"),
        ("[features]\ncommon_average = 1", "features.common_average", "true or false"),
        ("[features.bands]\nalpha = [13, 8]", "features.bands.alpha", "low < high"),
        ("[features.bands]\nalpha = [8]", "features.bands.alpha", "length 2"),
        ("[features.bands]\nmu = [8, 12]", "features.bands.mu", "no such key"),
        (CYTON + "[device.features.bands]\ndelta = [0, 4]", "device[0].features.bands.delta", "expected 0 < low"),
        (CYTON + "features = { pass_band_hz = [1, 125] }", "device[0].features", "sampling rate of 250 Hz"),
        ("[features]\npass_band_hz = [1, 126]\n" + MUSE + CYTON, "device[1].features", "sampling rate of 250 Hz"),
        (STRAP + "features = { mains_hz = 50 }", "device[0].features", "a heart_rate has no EEG"),
    ],
)
def test_what_has_no_meaning_is_refused_by_its_key(load: Load, text: str, key: str, what: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load(text)
    said = f"{refused.value.message} {refused.value.hint}"
    assert f": {key}: " in said
    assert what in said


def test_a_device_without_brain_state_may_have_any_rate(load: Load) -> None:
    load("[features]\npass_band_hz = [1, 126]\n" + CYTON + "brain_state = false\n" + STRAP)


def test_the_error_says_where() -> None:
    with pytest.raises(MeaninglessError) as error:
        Features(bands=BandEdges(gamma=(30, 60))).settings()
    assert error.value.key == "bands.gamma"


# --- in the stream

SCALE = 4.5e6 / 24 / (2**23 - 1)


def counts(seconds: float, rate_hz: int, channels: int) -> NDArray[np.int32]:
    """Noise on a large offset, and hum."""
    rng = np.random.default_rng(11)
    time_s = np.arange(round(seconds * rate_hz)) / rate_hz
    uv = 20 * rng.standard_normal((len(time_s), channels)) + 300 * np.sin(2 * np.pi * 50 * time_s)[:, np.newaxis]
    return np.round((uv + 10_000) / SCALE).astype(np.int32)


def assembled(table: NDArray[np.int32], chosen: FeatureSettings) -> tuple[list[SampleBlock], list[State]]:
    names = tuple(f"E{k}" for k in range(table.shape[1]))
    spec = SignalSpec(EEG, 250.0, names, ("uV",) * len(names), (-(2**23), 2**23 - 1))
    blocks: list[Any] = []
    states: list[State] = []
    assembler = RawAssembler(
        "C-1", spec, 0, HostClock(), blocks.append, brain_state=chosen, on_state=states.append, raw=True
    )
    for start in range(0, len(table), 25):
        columns = {name: table[start : start + 25, k].copy() for k, name in enumerate(names)}
        arrival_ns = 10**12 + (start + 25) * NS_PER_S // 250
        assembler.take(Samples(EEG, start, columns, arrival_ns, dict.fromkeys(names, SCALE)))
    assembler.finish()
    return blocks, states


def test_filters_reach_the_features_and_never_the_raw_samples() -> None:
    table = counts(12, 250, 3)
    plain_blocks, plain_states = assembled(table, DEFAULT_SETTINGS)
    filtered = FeatureSettings(mains_hz=50, pass_band_hz=(5, 40), common_average=True)
    blocks, states = assembled(table, filtered)
    for found in (plain_blocks, blocks):
        raw = [block for block in found if block.signal == EEG]
        for k in range(3):
            column = np.concatenate([block.columns[f"E{k}"] for block in raw])
            np.testing.assert_array_equal(column, table[:, k])
        assert any(block.signal == BRAIN_STATE for block in found)
    # A high-pass at 5 Hz leaves little of delta, and white noise has 3/44 of its power there.
    assert plain_states[-1].delta == pytest.approx(3 / 44, abs=0.03)
    assert states[-1].delta < plain_states[-1].delta / 5
    assert len(states) == len(plain_states)


def test_a_stream_outside_of_the_definitions_is_read_without_brain_states(caplog: pytest.LogCaptureFixture) -> None:
    items: list[Any] = []
    outputs = Outputs(items.append, lambda _meta: None, lambda _device, _state: None)
    device = Device(driver="lsl", serial="L-1", stream="lab")

    def blocks_at(rate_hz: float) -> set[str]:
        items.clear()
        caplog.clear()
        names = ("C3", "C4")
        driver = replace(DRIVERS["lsl"], decoder=lambda _options: LslDecoder("EEG", rate_hz, names, ("uV", "uV")))
        with caplog.at_level(logging.WARNING):
            reader = Acquisition("gw", device, driver, lambda: pytest.fail("no link is opened"), HostClock(), outputs)
        decoder = driver.decoder(device.options)
        segment = Segments(reader.read_as, decoder, HostClock(), items.append, outputs.on_state, lambda: (0, {}))
        count = round(10 * rate_hz)
        rng = np.random.default_rng(2)
        for start in range(0, count, 50):
            columns = {name: rng.standard_normal(50) for name in names}
            segment.take(Samples(EEG, start, columns, 10**12 + round((start + 50) / rate_hz * NS_PER_S)))
        segment.finish()
        return {item.signal for item in items}

    assert blocks_at(200.0) == {EEG, BRAIN_STATE}
    assert not caplog.records
    assert blocks_at(50.0) == {EEG}
    assert "L-1: its samples are read, but there will be no brain state: sampling rate is 50.0 Hz" in caplog.text
