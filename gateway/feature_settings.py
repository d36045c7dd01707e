"""How the brain state is computed, as it stands in TOML: `[features]`, and over it the `features` of a `[[device]]`.

Turns both into the settings that the features know. Opens nothing, knows no samples.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

from gateway.config import Section
from gateway.signal.bands import BANDS, DEFAULT_SETTINGS, Band, FeatureSettings

S = TypeVar("S", bound=Section)

Edges = Annotated[tuple[float, float], Meta(description="two frequencies in Hz, as [8, 13]")]
PassBand = Annotated[
    tuple[float, ...], Meta(max_length=2, description="two frequencies in Hz, as [0.5, 70], or [] for no filter")
]
BandName = Literal["delta", "theta", "alpha", "beta", "gamma"]


class MeaninglessError(ValueError):
    """A value that the features have no meaning for."""

    def __init__(self, key: str, message: str) -> None:
        """`key`: below `[features]`."""
        super().__init__(message)
        self.key = key


class BandEdges(Section, frozen=True):
    """Lower edge, which belongs to a band, and upper edge, which does not."""

    delta: Edges | None = None
    theta: Edges | None = None
    alpha: Edges | None = None
    beta: Edges | None = None
    gamma: Edges | None = None


class Features(Section, frozen=True):
    """What may be set. None: of a device as the gateway has it, of the gateway the default."""

    bands: BandEdges = BandEdges()
    entropy_band: Edges | None = None
    coherence_band: BandName | Edges | None = None
    """Of coherence and PLV: one of the bands, or edges of its own."""
    power_time_constant_s: float | None = None
    coherence_time_constant_s: float | None = None
    plv_window_s: float | None = None
    mains_hz: Literal[0, 50, 60] | None = None
    """A notch there; 0: none."""
    pass_band_hz: PassBand | None = None
    common_average: bool | None = None
    """Refer each sample to the mean of the usable electrodes."""

    def over(self, general: Features) -> Features:
        """These settings, and for what they leave open the general ones."""
        return msgspec.structs.replace(_over(self, general), bands=_over(self.bands, general.bands))

    def settings(self) -> FeatureSettings:
        """What the features are given. Raises `MeaninglessError`."""
        bands = {band.name: _band(band.name, getattr(self.bands, band.name), band, "bands.") for band in BANDS}
        coherence = self.coherence_band or "alpha"
        given: dict[str, object] = {
            "bands": tuple(bands.values()),
            "entropy_band": _band("entropy_band", self.entropy_band, DEFAULT_SETTINGS.entropy_band),
            "coherence_band": bands[coherence]
            if isinstance(coherence, str)
            else _band("coherence_band", coherence, DEFAULT_SETTINGS.coherence_band),
            "power_time_constant_s": self.power_time_constant_s,
            "coherence_time_constant_s": self.coherence_time_constant_s,
            "plv_window_s": self.plv_window_s,
            "mains_hz": self.mains_hz or None,
            "pass_band_hz": self.pass_band_hz or None,
            "common_average": self.common_average,
        }
        chosen = DEFAULT_SETTINGS
        for key, value in given.items():
            if value is not None:
                chosen = _changed(chosen, key, value)
        return chosen


def _over(special: S, general: S) -> S:
    names = special.__struct_fields__
    left_open = {name: getattr(general, name) for name in names if getattr(special, name) is None}
    return msgspec.structs.replace(special, **left_open)


def _band(name: str, edges: tuple[float, float] | None, usual: Band, below: str = "") -> Band:
    try:
        return usual if edges is None else Band(name, *edges)
    except ValueError as error:
        raise MeaninglessError(below + name, str(error)) from None


def _changed(settings: FeatureSettings, key: str, value: object) -> FeatureSettings:
    change: dict[str, Any] = {key: value}
    try:
        return replace(settings, **change)
    except ValueError as error:
        raise MeaninglessError(key, str(error)) from None
