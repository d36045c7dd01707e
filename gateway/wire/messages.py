"""The messages of the contract as typed values; the JSON Schemas in `schemas/` are made from them.

Times are integers: UTC in ns since 1970. Unknown keys are ignored, so that a later minor addition does not break
an older reader; an unknown version or schema is an error.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from gateway.wire.topics import NAME_PATTERN, VERSION

SAMPLES_MAX = 4096
"""Samples in a block: 1 s at 2,000 Hz, twice over."""
CHANNELS_MAX = 256
"""Channels in a raw block: the largest research headsets."""
RANGES_MAX = 4096
"""Ranges in one receipt entry; a bridge splits what is longer."""

Name = Annotated[str, Meta(pattern=NAME_PATTERN)]
Text = Annotated[str, Meta(max_length=200)]
TimeNs = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
Sequence = Annotated[int, Meta(ge=0, le=2**63 - 2)]
Count = Annotated[int, Meta(ge=1, le=2**53)]
Version = Literal[1]
assert VERSION == 1


class Header(Struct, frozen=True):
    """What every message begins with."""

    v: int
    schema: str


class Clock(Struct, frozen=True):
    """Trust in the times of a block."""

    state: Literal["synced", "unsynced", "unknown"]
    error_ns: Annotated[int, Meta(ge=0)]


class _Block(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Identity and time axis that all blocks share: either `t0` and `dt` with `n`, or `t`."""

    v: Version
    gateway: Name
    device: Name
    signal: Name
    epoch: Name
    seq: Sequence
    segment: Annotated[int, Meta(ge=0)] = 0
    clock: Clock
    n: Annotated[int, Meta(ge=1, le=SAMPLES_MAX)]
    t0: TimeNs | None = None
    dt: Annotated[int, Meta(ge=1)] | None = None
    t: Annotated[list[TimeNs], Meta(min_length=1, max_length=SAMPLES_MAX)] | None = None


Values = Annotated[list[float | None], Meta(min_length=1, max_length=SAMPLES_MAX)]


class BrainState(_Block, frozen=True, kw_only=True):
    """Features of the EEG at 5 Hz: relative band powers, coherence, PLV, spectral entropy."""

    schema: Literal["brain_state"]
    fields: dict[
        Literal["delta", "theta", "alpha", "beta", "gamma", "coherence", "plv", "entropy"],
        Values,
    ]


class VitalSigns(_Block, frozen=True, kw_only=True):
    """Vital signs as a device reports them; null where it gave no value."""

    schema: Literal["vital_signs"]
    fields: dict[
        Literal[
            "heart_rate",
            "spo2",
            "systolic_bp",
            "diastolic_bp",
            "temperature",
            "gps_longitude",
            "gps_latitude",
            "rr_interval",
            "perfusion_index",
            "respiration_rate",
        ],
        Values,
    ]


class Raw(_Block, frozen=True, kw_only=True):
    """Raw samples in device counts; physical value = counts x scale. CBOR only.

    `counts` is an RFC 8746 array (n, channels) of signed integers, or the packed form of `gateway.wire.packing`;
    `quality` is one integer for all samples or an RFC 8746 array of n.
    """

    schema: Literal["raw"]
    channels: Annotated[list[Name], Meta(min_length=1, max_length=CHANNELS_MAX)]
    scales: Annotated[list[float], Meta(min_length=1, max_length=CHANNELS_MAX)]
    counts: Any
    quality: Any = 0


class Loss(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Samples that were produced and will not come, with the cause."""

    v: Version
    schema: Literal["loss"]
    gateway: Name
    device: Name
    signal: Name
    """The signal that the samples belonged to; the record itself travels in the sequence `loss`."""
    epoch: Name
    seq: Sequence
    cause: Literal["radio", "shed", "corrupt", "clock"]
    first: TimeNs
    last: TimeNs
    count: Count
    sequences: tuple[Sequence, Sequence] | None = None


class CommittedRanges(Struct, frozen=True):
    """Sequences of one (device, signal, epoch) that are safely stored, as inclusive ranges."""

    device: Name
    signal: Name
    epoch: Name
    ranges: Annotated[list[tuple[Sequence, Sequence]], Meta(max_length=RANGES_MAX)]


class Receipt(Struct, frozen=True, kw_only=True):
    """What the cloud has safely stored: the gateway may forget it."""

    v: Version
    schema: Literal["receipt"]
    gateway: Name
    committed: Annotated[list[CommittedRanges], Meta(max_length=1024)]


class WantedRange(Struct, frozen=True):
    """Sequences that a gateway still holds."""

    device: Name
    signal: Name
    epoch: Name
    first: Sequence
    last: Sequence


class ReceiptRequest(Struct, frozen=True, kw_only=True):
    """A gateway asks which of the blocks that it holds are safely stored."""

    v: Version
    schema: Literal["receipt_request"]
    gateway: Name
    wanted: Annotated[list[WantedRange], Meta(max_length=1024)]


class Status(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Retained presence of a gateway or a bridge; its last will says `online` false."""

    v: Version
    schema: Literal["status"]
    name: Name
    online: bool
    version: Text = ""
    since: TimeNs | None = None


class SignalMeta(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What one signal of a device is."""

    signal: Name
    channels: Annotated[list[Name], Meta(max_length=CHANNELS_MAX)]
    units: Annotated[list[Text], Meta(max_length=CHANNELS_MAX)]
    """UCUM units, one a channel."""
    rate_hz: float | None = None


class DeviceMeta(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Retained birth of a device: what it is, and how it is now."""

    v: Version
    schema: Literal["meta"]
    gateway: Name
    device: Name
    driver: Name
    signals: Annotated[list[SignalMeta], Meta(max_length=32)]
    model: Text | None = None
    firmware: Text | None = None
    battery_pct: Annotated[float, Meta(ge=0, le=100)] | None = None
