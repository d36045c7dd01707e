"""Blocks and loss records as rows of the outbox; and the record of what found no room to become one. Pure."""

from __future__ import annotations

import dataclasses

from gateway.samples import LOSS, LossCause, LossRecord, SampleBlock
from gateway.spool import retention
from gateway.spool.store import Row, StreamKey
from gateway.wire import codec
from gateway.wire.codec import Identity


def encoded(gateway: str, content: SampleBlock | LossRecord, epoch: str, number: int, boot: str, offset_ns: int) -> Row:
    """The row of a block or loss record with this identity; `boot`, `offset_ns`: of provisional times."""
    is_loss = isinstance(content, LossRecord)
    key = (content.device, LOSS if is_loss else content.signal)
    return Row(
        *key,
        epoch,
        number,
        first_ns=content.first_ns,
        last_ns=content.last_ns,
        samples=0 if isinstance(content, LossRecord) else len(content),
        lost=content.sample_count if isinstance(content, LossRecord) else 0,
        lost_signal=content.signal if is_loss else "",
        payload=codec.encode(Identity(gateway, *key, epoch, number), content),
        boot=boot,
        offset_ns=offset_ns,
    )


class Unaccepted:
    """What found no room even in memory: one growing record a stream and cause."""

    def __init__(self) -> None:
        self._records: dict[tuple[StreamKey, LossCause], LossRecord] = {}

    def __len__(self) -> int:
        return len(self._records)

    def add(self, content: SampleBlock | LossRecord) -> None:
        """A block or a loss record is refused."""
        if isinstance(content, LossRecord):
            record = dataclasses.replace(content, sequences=None, epoch="", block_runs=())
        else:
            record = LossRecord(
                content.device, content.signal, LossCause.SHED, content.first_ns, content.last_ns, len(content)
            )
        key = ((record.device, record.signal), record.cause)
        before = self._records.get(key)
        self._records[key] = retention.joined(before, record) if before else record

    def taken(self) -> list[LossRecord]:
        """The records; from now on there are none."""
        records = list(self._records.values())
        self._records.clear()
        return records
