"""Rows of the bench: the feature kernels of every build against numpy, scipy, mne-connectivity and brainflow.

8 channels at 250 Hz. The peers get a window of 2 s, three half-overlapping segments, for each step. All of them and all
builds run in turns, on one thread, whose own time counts; ratios are those of the medians.

Each peer does no more than `WindowAnalysis` on the same samples, and is called as well as we know how:

- numpy: the same definitions, vectorised, in float64, without the checks for unusable samples and flat channels.
- scipy: `welch` of each channel and `csd` of each pair, as its manual has it, and once more with all pairs in one call.
  Coherence would still have to be made of them, and there is no PLV.
- mne-connectivity: coherence and PLV in one call, the segments as `EpochsArray`, and otherwise its defaults, as its
  manual has it: multitaper, `n_jobs=1`. The rows without a goal are what a user gets who knows it better: the bare
  array, and with it `mode="fourier"`, which is the Hann segments of all the others. Its PLV is one over three segments.
- brainflow: band powers alone.
"""

from __future__ import annotations

import importlib.resources
import statistics
import sys
import time
import types
from collections.abc import Callable, Mapping
from typing import TypedDict

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from gateway.kernels import BASELINE, PLAIN, V3
from gateway.signal import numpy_features
from gateway.signal.bands import BANDS
from gateway.signal.features import implementations
from gateway.signal.spectra import hann

RATE_HZ = 250.0
CHANNELS = 8
WINDOW = 500
SEGMENT = 250
STEP = 50
STEPS_PER_SECOND = 5
BLOCKS = 40
"""Steps' samples that are there before the clock runs; an engine gets them over and over."""
TURNS = 25
TURN_S = 0.006
PHASE_BINS = slice(16, 26)
"""8..13 Hz in the spectrum of 2 s."""
BINS = slice(1, 45)
PAIRS = np.triu_indices(CHANNELS, 1)
CORE_SHARE = {BASELINE: 0.0008, V3: 0.0004}
GOALS = {
    BASELINE: {"step": 60.0, "numpy": 16.0, "scipy": 135.0, "mne": 230.0, "brainflow": 180.0},
    V3: {"step": 110.0, "numpy": 30.0, "scipy": 270.0, "mne": 430.0, "brainflow": 180.0},
}

Floats = NDArray[np.float64]
Work = Callable[[], object]


class Row(TypedDict):
    """A line of the table. `goal` None: shown for comparison."""

    name: str
    ratio: float
    peer: str
    goal: float | None
    ok: bool


def rows() -> list[Row]:
    """All rows of this file. A peer that is not installed, or does not run here, has a row that says so."""
    uv = noise(WINDOW, CHANNELS)
    peers, missing = found_peers(uv)
    builds = {name: module for name, module in implementations().items() if name != PLAIN}
    if not builds:
        return [Row(name="features", ratio=0.0, peer="the compiled features are not built", goal=1.0, ok=False)]
    works: dict[str, tuple[Work, int]] = {name: (work, 1) for name, work in peers.items()}
    works["twin"] = streaming(numpy_features, CHANNELS)
    for build, module in builds.items():
        works[f"step {build}"] = streaming(module, CHANNELS)
        works[f"step 64 {build}"] = streaming(module, 64)
        works[f"window {build}"] = (bound(module.WindowAnalysis(RATE_HZ, CHANNELS, WINDOW).analyse, uv), 1)
        alone = module.WindowAnalysis(RATE_HZ, CHANNELS, WINDOW, with_pairs=False)
        works[f"power {build}"] = (bound(alone.analyse, uv), 1)
    return [row for build in builds for row in rows_of(build, medians(works), missing)]


def rows_of(build: str, seconds: Mapping[str, float], missing: Mapping[str, str]) -> list[Row]:
    """The rows of one build from the medians of all works."""
    goals = GOALS[build]
    kind = build.removeprefix("compiled ")

    def row(work: str, ours: str, peer: str, goal: float | None, said: str) -> Row:
        if peer in missing:
            return Row(name=f"{work} ({kind})", ratio=0.0, peer=missing[peer], goal=goal, ok=False)
        ratio = seconds[peer] / seconds[f"{ours} {build}"]
        return Row(
            name=f"{work} ({kind})", ratio=round(ratio, 1), peer=said, goal=goal, ok=goal is None or ratio >= goal
        )

    share = seconds[f"step 64 {build}"] * STEPS_PER_SECOND
    limit = CORE_SHARE[build]
    return [
        row("streaming step", "step", "numpy", goals["step"], "numpy, window of 3 segments"),
        row(
            "streaming step, shipped definitions",
            "step",
            "twin",
            goals["step"],
            "numpy, the same definitions",
        ),
        row("window at once", "window", "numpy", goals["numpy"], "numpy"),
        row("window at once", "window", "scipy", goals["scipy"], "scipy csd, pair by pair"),
        row("window at once", "window", "scipy at once", None, "scipy csd, all pairs in one call"),
        row("window at once", "window", "mne", goals["mne"], "mne-connectivity"),
        row("window at once", "window", "mne array", None, "mne-connectivity, bare array"),
        row("window at once", "window", "mne fourier", None, "mne-connectivity, bare array, Fourier"),
        row("bands and entropy of a window", "power", "brainflow", goals["brainflow"], "brainflow, bands alone"),
        row("bands and entropy, streaming with all else", "step", "brainflow", None, "brainflow, bands alone"),
        Row(
            name=f"streaming step, 64 channels, 2,016 pairs, 5 Hz: {share:.4%} of a core ({kind})",
            ratio=round(limit / share, 1),
            peer=f"{limit:.2%} of a core",
            goal=1.0,
            ok=share <= limit,
        ),
    ]


def medians(works: Mapping[str, tuple[Work, int]]) -> dict[str, float]:
    """Seconds of each work, by turns; a work of several units counts for as many."""
    repeats = {name: max(1, int(TURN_S / once(work, 3))) for name, (work, _) in works.items()}
    taken: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(TURNS):
        for name, (work, units) in works.items():
            taken[name].append(once(work, repeats[name]) / units)
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


def once(work: Work, count: int) -> float:
    """Seconds of this thread for a call, as the mean of `count`: on a shared machine others' turns do not count."""
    begun = time.thread_time()
    for _ in range(count):
        work()
    return (time.thread_time() - begun) / count


def noise(count: int, channels: int) -> Floats:
    """Noise with a part that all channels share, uV."""
    rng = np.random.default_rng(1)
    return np.asarray(10 * rng.standard_normal((count, channels)) + 8 * rng.standard_normal((count, 1)))


def bound(analyse: Callable[[Floats], object], uv: Floats) -> Work:
    """A call without arguments."""
    return lambda: analyse(uv)


def streaming(module: types.ModuleType, channels: int) -> tuple[Work, int]:
    """Steps of an engine that has been running for a while, and how many."""
    engine = module.FeatureEngine(RATE_HZ, channels)
    push, step = engine.push, engine.step
    uv = noise(BLOCKS * STEP, channels)
    blocks = [np.ascontiguousarray(uv[start : start + STEP]) for start in range(0, len(uv), STEP)]

    def work() -> None:
        for block in blocks:
            push(block)
            step()

    for _ in range(3):
        work()
    state = step()
    assert state is None
    return work, BLOCKS


def found_peers(uv: Floats) -> tuple[dict[str, Work], dict[str, str]]:
    """The peers, and why some of them are missing."""
    peers: dict[str, Work] = {"numpy": bound(by_numpy, uv)}
    missing: dict[str, str] = {}
    for names, find in (
        (("scipy", "scipy at once"), scipy_peers),
        (("mne", "mne array", "mne fourier"), mne_peers),
        (("brainflow",), brainflow_peer),
    ):
        try:
            peers.update(find(uv))
        except (ImportError, OSError) as error:
            missing.update(dict.fromkeys(names, f"{names[0]} is not there: {error}"))
    return peers, missing


def by_numpy(uv: Floats) -> tuple[Floats, Floats, Floats, Floats]:
    """Relative power, entropy, coherence of all bands and PLV, as `WindowAnalysis` gives them."""
    segments = sliding_window_view(uv, SEGMENT, axis=0)[:: SEGMENT // 2]
    segments = (segments - segments.mean(axis=-1, keepdims=True)) * HANN
    spectra = np.fft.rfft(segments, axis=-1)[..., BINS]
    power = (np.abs(spectra) ** 2).mean(axis=0)
    cross = np.einsum("sik,sjk->ijk", spectra, spectra.conj()) / len(spectra)
    coherence = np.abs(cross) ** 2 / (power[:, np.newaxis] * power[np.newaxis])
    in_bands = [slice(band.bins().start - BINS.start, band.bins().stop - BINS.start) for band in BANDS]
    band_power = np.stack([power[:, rows].sum(axis=-1) for rows in in_bands])
    share = power / power.sum(axis=-1, keepdims=True)
    entropy = -(share * np.log(share)).sum(axis=-1) / np.log(share.shape[-1])
    spectrum = np.fft.fft(uv - uv.mean(axis=0), axis=0)
    kept = np.zeros_like(spectrum)
    kept[PHASE_BINS] = spectrum[PHASE_BINS]
    analytic = np.fft.ifft(kept, axis=0)
    unit = analytic / np.abs(analytic)
    plv = np.abs(unit.T @ unit.conj()) / len(uv)
    return (
        band_power / band_power.sum(axis=0),
        entropy,
        np.stack([coherence[..., rows].mean(axis=-1)[PAIRS] for rows in in_bands]),
        plv[PAIRS],
    )


HANN = hann(SEGMENT)


def scipy_peers(uv: Floats) -> dict[str, Work]:
    """Power and cross-spectra of all pairs."""
    from scipy.signal import csd, welch  # noqa: PLC0415 - a peer may be missing

    channels = np.ascontiguousarray(uv.T)

    def pair_by_pair() -> object:
        power = [welch(x, RATE_HZ, "hann", SEGMENT, detrend="constant") for x in channels]
        cross = [csd(channels[i], channels[j], RATE_HZ, "hann", SEGMENT, detrend="constant") for i, j in zip(*PAIRS)]  # noqa: B905
        return power, cross

    def at_once() -> object:
        i, j = PAIRS
        power = welch(channels, RATE_HZ, "hann", SEGMENT, detrend="constant")
        return power, csd(channels[i], channels[j], RATE_HZ, "hann", SEGMENT, detrend="constant")

    return {"scipy": pair_by_pair, "scipy at once": at_once}


def mne_peers(uv: Floats) -> dict[str, Work]:
    """Coherence and PLV of all pairs in all bands, the three segments as its epochs."""
    from mne import EpochsArray, create_info  # noqa: PLC0415 - a peer may be missing
    from mne_connectivity import spectral_connectivity_epochs  # noqa: PLC0415 - a peer may be missing

    epochs = sliding_window_view(uv, SEGMENT, axis=0)[:: SEGMENT // 2].copy()
    info = create_info(CHANNELS, RATE_HZ, "eeg", verbose="ERROR")
    wanted = {
        "method": ["coh", "plv"],
        "sfreq": RATE_HZ,
        "fmin": tuple(band.low_hz for band in BANDS),
        "fmax": tuple(band.high_hz - 1e-6 for band in BANDS),
        "faverage": True,
        "verbose": "ERROR",
    }
    works: dict[str, Work] = {
        "mne": lambda: spectral_connectivity_epochs(EpochsArray(epochs, info, verbose="ERROR"), **wanted),
        "mne array": lambda: spectral_connectivity_epochs(epochs, **wanted),
        "mne fourier": lambda: spectral_connectivity_epochs(epochs, mode="fourier", **wanted),
    }
    for work in works.values():
        work()
    return works


def brainflow_peer(uv: Floats) -> dict[str, Work]:
    """Relative band powers of all channels."""
    if "pkg_resources" not in sys.modules:
        # Under Python 3.11 it looks for its library by way of this module, which setuptools no longer has.
        stand_in = types.ModuleType("pkg_resources")
        vars(stand_in)["resource_filename"] = lambda _, path: str(importlib.resources.files("brainflow") / path)
        sys.modules["pkg_resources"] = stand_in
    from brainflow.data_filter import DataFilter  # noqa: PLC0415 - a peer may be missing

    channels = np.ascontiguousarray(uv.T)
    numbers = list(range(CHANNELS))

    def work() -> object:
        return DataFilter.get_avg_band_powers(channels, numbers, int(RATE_HZ), False)  # noqa: FBT003 - its own interface

    work()
    return {"brainflow": work}
