"""The messages of the contract as typed values; the JSON Schemas in `schemas/` are made from them.

Times are integers: UTC in ns since 1970. Unknown keys are ignored, so that a later minor addition does not break
an older reader; an unknown version or schema is an error.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from msgspec import UNSET, Meta, Struct, UnsetType

from gateway.samples import ElectrodeState
from gateway.wire.topics import NAME_PATTERN, NAME_RULE, VERSION

SAMPLES_MAX = 4096
"""Samples in a block: 1 s at 2,000 Hz, twice over."""
CHANNELS_MAX = 256
"""Channels in a raw block: the largest research headsets."""
RANGES_MAX = 4096
"""Ranges in one receipt entry; a bridge splits what is longer."""
ENTRIES_MAX = 1024
"""Entries of a receipt or a request."""
SIGNALS_MAX = 32
"""Signals of one device."""
INT64_MAX = 2**63 - 1
EXACT_MAX = 2**53
"""Largest integer up to which a float64, and so any JSON reader, holds every one."""

Name = Annotated[str, Meta(pattern=NAME_PATTERN, description=NAME_RULE)]
Text = Annotated[str, Meta(max_length=200)]
TimeNs = Annotated[int, Meta(ge=-(2**63), le=INT64_MAX, description="UTC, ns since 1970-01-01")]
Sequence = Annotated[int, Meta(ge=0, le=INT64_MAX - 1, description="number of a block in its sequence, never reused")]
Count = Annotated[int, Meta(ge=1, le=EXACT_MAX)]
Epoch = Annotated[Name, Meta(description="names the opening of the outbox that gave the sequence number")]
Signal = Annotated[Name, Meta(description="signal, as its sender names it")]
Gateway = Annotated[Name, Meta(description="id of the gateway")]
Device = Annotated[Name, Meta(description="serial number of the device")]
Version = Literal[1]
assert VERSION == 1


class Header(Struct, frozen=True):
    """What every message begins with."""

    v: int
    schema: str


class Clock(Struct, frozen=True):
    """Trust in the times of a block."""

    state: Annotated[
        Literal["synced", "unsynced", "unknown"],
        Meta(description="whether the gateway's clock was disciplined; unknown: it cannot tell"),
    ]
    error_ns: Annotated[int, Meta(ge=0, le=INT64_MAX, description="bound of |stated - true| time of any sample, ns")]


class _Block(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Identity and time axis that all blocks share: either `t0` and `dt` with `n`, or `t`."""

    v: Version
    gateway: Gateway
    device: Device
    signal: Signal
    epoch: Epoch
    seq: Sequence
    segment: Annotated[
        int, Meta(ge=0, le=INT64_MAX, description="uninterrupted run of the device; never join across two")
    ] = 0
    clock: Clock
    n: Annotated[int, Meta(ge=1, le=SAMPLES_MAX, description="samples in the block")]
    t0: Annotated[int, Meta(ge=-(2**63), le=INT64_MAX, description="time of the first sample, UTC ns")] | UnsetType = (
        UNSET
    )
    dt: Annotated[int, Meta(ge=1, le=INT64_MAX, description="from one sample to the next, ns")] | UnsetType = UNSET
    t: (
        Annotated[
            list[TimeNs],
            Meta(min_length=1, max_length=SAMPLES_MAX, description="time of each sample, strictly increasing"),
        ]
        | UnsetType
    ) = UNSET


Values = Annotated[
    list[float | None], Meta(min_length=1, max_length=SAMPLES_MAX, description="one a sample; null: no value")
]


VitalSignsField = Literal[
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
]
VITAL_SIGNS_FIELDS: tuple[str, ...] = get_args(VitalSignsField)


class BrainState(_Block, frozen=True, kw_only=True):
    """Features of the EEG at 5 Hz: relative band powers, coherence, PLV, spectral entropy."""

    schema: Literal["brain_state"]
    signal: Literal["brain_state"]
    fields: Annotated[
        dict[Literal["delta", "theta", "alpha", "beta", "gamma", "coherence", "plv", "entropy"], Values],
        Meta(min_length=1, description="columns by name, dimensionless: band powers with sum 1, the others 0..1"),
    ]


class VitalSigns(_Block, frozen=True, kw_only=True):
    """Vital signs as a device reports them; null where it gave no value."""

    schema: Literal["vital_signs"]
    signal: Annotated[
        Literal["vital_signs", "patient_vitals"],
        Meta(description="the old name is still met in the wild; receipts repeat the sender's own"),
    ]
    fields: Annotated[
        dict[VitalSignsField, Values],
        Meta(
            min_length=1,
            description="columns by name: heart_rate /min, spo2 %, systolic_bp and diastolic_bp mm[Hg], "
            "respiration_rate /min (stored as integers); temperature Cel, gps_longitude and gps_latitude deg, "
            "rr_interval ms, perfusion_index %",
        ),
    ]


class Raw(_Block, frozen=True, kw_only=True):
    """Raw samples in device counts, in CBOR; physical value = counts x scale.

    `counts` is an RFC 8746 array (n, channels) of signed integers, or the packed form of `gateway.wire.packing`;
    `quality` is one integer for all samples or an RFC 8746 array of n.
    """

    schema: Literal["raw"]
    channels: Annotated[list[Name], Meta(min_length=1, max_length=CHANNELS_MAX, description="electrodes, in order")]
    scales: Annotated[
        list[float], Meta(min_length=1, max_length=CHANNELS_MAX, description="uV (the signal's unit) a count")
    ]
    counts: Annotated[
        Any,
        Meta(
            description="RFC 8746: tag 40 over [[n, channels], typed array of int8, uint8, int16 or int32, "
            "little-endian]; or {codec: 'delta-shuffle-zstd', data: bytes}: int32 (n, channels), differences along n "
            "modulo 2^32 from 0, laid out channel after channel, split into 4 planes of bytes of equal weight (least "
            "first), one zstd frame that states its size"
        ),
    ]
    quality: Annotated[
        Any,
        Meta(
            description="bit k set: electrode k of channels is not usable; an integer for all samples, or a "
            "one-dimensional RFC 8746 array of n, never negative"
        ),
    ] = 0


class Loss(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Samples that were produced and will not come, with the cause."""

    v: Version
    schema: Literal["loss"]
    gateway: Gateway
    device: Device
    signal: Annotated[
        Name, Meta(description="the signal that the samples belonged to; the record itself is numbered in `loss`")
    ]
    epoch: Epoch
    seq: Sequence
    cause: Annotated[
        Literal["radio", "shed", "corrupt", "clock"],
        Meta(description="never arrived; given up by a full outbox; damaged on disk; could not be given a time"),
    ]
    first: Annotated[TimeNs, Meta(description="time of the first missing sample, UTC ns")]
    last: Annotated[TimeNs, Meta(description="time of the last missing sample, UTC ns, not before the first")]
    count: Annotated[Count, Meta(description="missing samples")]
    sequences: (
        Annotated[
            tuple[Sequence, Sequence],
            Meta(description="first and last block that are gone, where whole blocks were given up"),
        ]
        | UnsetType
    ) = UNSET
    lost_epoch: (
        Annotated[Name, Meta(description="epoch of `sequences`, where it is another than that of the record")]
        | UnsetType
    ) = UNSET
    blocks: (
        Annotated[
            list[tuple[Count, Count]],
            Meta(
                min_length=1,
                max_length=RANGES_MAX,
                description="the blocks of `sequences` in order, as runs of [blocks, samples in each]; sum: count",
            ),
        ]
        | UnsetType
    ) = UNSET


class CommittedRanges(Struct, frozen=True, omit_defaults=True):
    """Sequences of one (device, signal, epoch) that are safely stored, as inclusive ranges."""

    device: Name
    signal: Name
    epoch: Name
    ranges: Annotated[
        list[tuple[Sequence, Sequence]],
        Meta(max_length=RANGES_MAX, description="[first, last], both included"),
    ]
    asked: (
        Annotated[
            tuple[Sequence, Sequence],
            Meta(description="in an answer: between these, both included, nothing but `ranges` is stored"),
        ]
        | UnsetType
    ) = UNSET


class Receipt(Struct, frozen=True, kw_only=True):
    """What the cloud has safely stored: the gateway may forget it."""

    v: Version
    schema: Literal["receipt"]
    gateway: Name
    committed: Annotated[list[CommittedRanges], Meta(max_length=ENTRIES_MAX)]


class WantedRange(Struct, frozen=True):
    """What a gateway still holds of one epoch; between `first` and `last` some may be gone, too."""

    device: Name
    signal: Name
    epoch: Name
    first: Annotated[
        Sequence,
        Meta(description="lowest that it holds: all below is receipted, or on record as lost, and cannot come"),
    ]
    last: Annotated[Sequence, Meta(description="highest that it holds")]


class ReceiptRequest(Struct, frozen=True, kw_only=True):
    """A gateway asks which of the blocks that it holds are safely stored.

    It names all that it holds, in as many messages as that takes: of an epoch that it does not name it holds nothing.
    """

    v: Version
    schema: Literal["receipt_request"]
    gateway: Name
    wanted: Annotated[list[WantedRange], Meta(max_length=ENTRIES_MAX)]


class TimeRequest(Struct, frozen=True, kw_only=True):
    """A gateway asks for the time. Asked and answered with QoS 0: a late answer is worth nothing."""

    v: Version
    schema: Literal["time_request"]
    gateway: Name
    asked: Annotated[int, Meta(ge=0, le=INT64_MAX, description="the gateway's own clock of any origin, ns: repeated")]


class TimeReply(Struct, frozen=True, kw_only=True):
    """What time it was at a bridge when a request came and when this answer left (RFC 5905: T2 and T3)."""

    v: Version
    schema: Literal["time"]
    gateway: Name
    bridge: Name
    asked: Annotated[int, Meta(ge=0, le=INT64_MAX, description="repeated from the request (T1)")]
    received: Annotated[TimeNs, Meta(description="when the request came (T2), UTC ns")]
    replied: Annotated[TimeNs, Meta(description="when the answer left (T3), UTC ns, not before it came")]
    clock: Annotated[Clock, Meta(description="trust in the bridge's own clock")]


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
    units: Annotated[list[Text], Meta(max_length=CHANNELS_MAX, description="UCUM units, one a channel")]
    rate_hz: float | None = None
    loinc: (
        Annotated[list[Text | None], Meta(max_length=CHANNELS_MAX, description="LOINC codes, one a channel")] | None
    ) = None
    mdc: (
        Annotated[
            list[Text | None],
            Meta(max_length=CHANNELS_MAX, description="ISO/IEEE 11073-10101 codes, one a channel"),
        ]
        | None
    ) = None


class ElectrodeMeta(Struct, frozen=True, omit_defaults=True):
    """How one electrode is."""

    name: Name
    state: Annotated[
        ElectrodeState,
        Meta(description="noisy: drowned in mains, moved or too large; railed: at the end of the range; off: no skin"),
    ]
    reason: Text = ""


class DeviceMeta(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Retained birth of a device: what it is, and how it is now."""

    v: Version
    schema: Literal["meta"]
    gateway: Name
    device: Name
    driver: Name
    signals: Annotated[list[SignalMeta], Meta(max_length=SIGNALS_MAX)]
    model: Text | None = None
    firmware: Text | None = None
    battery_pct: Annotated[float, Meta(ge=0, le=100)] | None = None
    electrodes: (
        Annotated[list[ElectrodeMeta], Meta(max_length=CHANNELS_MAX, description="as judged last, in order")] | None
    ) = None
