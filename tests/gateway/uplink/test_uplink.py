"""The gateway's end of MQTT on a real broker: presence, births, receipts asked for and taken, garbage survived."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest

from gateway.errors import UnavailableError
from gateway.mqtt import Inbound
from gateway.samples import LossCause
from gateway.uplink import uplink as uplink_module
from gateway.wire import codec, control, topics
from gateway.wire.messages import CommittedRanges, DeviceMeta, Status, WantedRange
from gateway.wire.topics import TopicKind

SECONDS_MAX = 20.0


def of_kind(cloud: Any, kind: TopicKind) -> list[Inbound]:
    return [message for message in cloud.got if topics.parse(message.topic).kind is kind]


def statuses(cloud: Any) -> list[bool]:
    return [control.decode(message.payload, Status).online for message in of_kind(cloud, TopicKind.STATUS)]


async def test_presence_is_told_and_retained_and_its_end_too(chain: Any) -> None:
    async with chain.cloud() as cloud, chain.outbox() as outbox:
        async with chain.uplink(outbox):
            await chain.until(lambda: statuses(cloud) == [True])
            (message,) = of_kind(cloud, TopicKind.STATUS)
            assert message.topic == f"wardlink/v1/{chain.gateway}/status"
            assert (message.content_type, message.properties) == ("application/json", {"schema": "status"})
            status = control.decode(message.payload, Status)
            assert status.name == chain.gateway
            assert status.since is not None
            assert status.version
            async with chain.cloud() as late:
                await chain.until(lambda: statuses(late) == [True])
                assert of_kind(late, TopicKind.STATUS)[0].retain
        await chain.until(lambda: statuses(cloud) == [True, False])
        async with chain.cloud() as late:
            await chain.until(lambda: statuses(late) == [False])
            assert of_kind(late, TopicKind.STATUS)[0].retain


async def test_a_gateway_that_is_gone_without_a_word_is_told_by_its_last_will(chain: Any) -> None:
    async with chain.cloud() as cloud, chain.outbox() as outbox, chain.uplink(outbox) as uplink:
        await chain.until(lambda: statuses(cloud) == [True])
        uplink.session._connection._opened.shutdown(2)  # as a cable that is cut
        await chain.until(lambda: statuses(cloud)[:2] == [True, False])
        await chain.until(lambda: statuses(cloud) == [True, False, True])


async def test_a_goodbye_is_as_its_last_will(chain: Any) -> None:
    async with chain.cloud() as cloud, chain.outbox() as outbox:
        async with chain.uplink(outbox) as uplink:
            await chain.until(lambda: statuses(cloud) == [True])
            await uplink.say_goodbye()
            await chain.until(lambda: statuses(cloud) == [True, False])
        await chain.until(lambda: len(statuses(cloud)) == 3)
        first, second = of_kind(cloud, TopicKind.STATUS)[1:]
        assert first.payload == second.payload
        await asyncio.wait_for(uplink.say_goodbye(), SECONDS_MAX)  # with no connection it is no error


async def test_births_are_retained_told_on_every_connection_and_only_when_they_change(chain: Any) -> None:
    def births(cloud: Any) -> list[DeviceMeta]:
        return [control.decode(message.payload, DeviceMeta) for message in of_kind(cloud, TopicKind.META)]

    async with chain.cloud() as cloud, chain.outbox() as outbox, chain.uplink(outbox) as uplink:
        uplink.announce(chain.birth())  # not connected yet
        await chain.until(lambda: births(cloud) == [chain.birth()])
        uplink.announce(chain.birth())
        uplink.announce(chain.birth(battery_pct=50.0))
        uplink.announce(chain.birth("OTHER"))
        expected = [chain.birth(), chain.birth(battery_pct=50.0), chain.birth("OTHER")]
        await chain.until(lambda: births(cloud) == expected)
        (_, message, _) = of_kind(cloud, TopicKind.META)
        assert message.topic == f"wardlink/v1/{chain.gateway}/meta/DEV"
        assert (message.content_type, message.properties) == ("application/json", {"schema": "meta"})
        async with chain.cloud() as late:
            await chain.until(lambda: len(births(late)) == 2)
            assert all(message.retain for message in of_kind(late, TopicKind.META))
            assert {birth.battery_pct for birth in births(late)} == {None, 50.0}
        uplink.session._connection._opened.shutdown(2)
        await chain.until(lambda: births(cloud) == expected + expected[1:])


def epoch(entry: WantedRange) -> str:
    return entry.epoch


async def test_receipts_are_asked_for_on_connection_and_when_a_bridge_appears(chain: Any) -> None:
    async with chain.outbox() as outbox:
        former = outbox.epoch
        outbox.append(chain.block())
    async with chain.outbox() as outbox:
        for at in range(4):
            outbox.append(chain.block(at=at))
        outbox.append(chain.block("STRAP", "vital_signs", n=1))
        await outbox.commit()
        await outbox.forget("DEV", "eeg", outbox.epoch, [(0, 0)])
        wanted = [
            *sorted(
                [WantedRange("DEV", "eeg", outbox.epoch, 1, 3), WantedRange("DEV", "eeg", former, 0, 0)], key=epoch
            ),
            WantedRange("STRAP", "vital_signs", outbox.epoch, 0, 0),
        ]
        async with chain.cloud() as cloud, chain.uplink(outbox) as uplink:
            await chain.until(cloud.requests)
            assert [request.gateway for request in cloud.requests()] == [chain.gateway]
            assert sorted(cloud.requests()[0].wanted, key=lambda entry: (entry.device, entry.epoch)) == wanted
            (message,) = of_kind(cloud, TopicKind.RECEIPT_REQUEST)
            assert (message.properties, message.retain) == ({"schema": "receipt_request"}, False)
            await cloud.present(online=True)
            await chain.until(lambda: len(cloud.requests()) == 2)
            await cloud.present(online=True)  # nothing new
            await cloud.present(online=False)
            await cloud.present(online=True)
            await chain.until(lambda: len(cloud.requests()) == 3)
            uplink.session._connection._opened.shutdown(2)
            await chain.until(lambda: len(cloud.requests()) == 4)
            async with chain.cloud(present=True) as second:  # one bridge is enough
                await chain.until(lambda: second.bridge in uplink._bridges_online)
            assert len(cloud.requests()) == 4


async def test_overdue_receipts_are_asked_for(chain: Any) -> None:
    async with chain.cloud() as cloud, chain.outbox() as outbox:
        outbox.append(chain.block())
        await outbox.commit()
        async with chain.uplink(outbox) as uplink:
            await chain.until(lambda: len(cloud.requests()) == 1)
            uplink.sender.on_overdue()
            await chain.until(lambda: len(cloud.requests()) == 2)


async def test_a_bridge_that_was_given_up_is_not_present(chain: Any) -> None:
    async with chain.cloud(present=True) as cloud, chain.outbox() as outbox, chain.uplink(outbox) as uplink:
        await chain.until(lambda: uplink.sender.bridge_present)
        await cloud.send(topics.bridge_status(cloud.bridge), b"")
        await chain.until(lambda: not uplink.sender.bridge_present)


async def test_now_and_then_it_asks_without_a_cause(chain: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uplink_module, "ASK_S", 0.05)
    async with chain.cloud() as cloud, chain.outbox() as outbox:
        outbox.append(chain.block())
        await outbox.commit()
        async with chain.uplink(outbox):
            await chain.until(lambda: len(cloud.requests()) >= 3)


async def test_what_the_disk_took_is_asked_for_and_what_the_cloud_has_not_got_is_on_record(chain: Any) -> None:
    async with chain.outbox() as outbox:
        former = outbox.epoch
        for at in range(6):
            outbox.append(chain.block(at=at))
    chain.path.unlink()
    chain.path.with_name("outbox.db-wal").unlink(missing_ok=True)
    async with chain.outbox() as outbox, chain.cloud() as cloud, chain.uplink(outbox, resend_after_s=0.3) as uplink:
        await chain.until(cloud.requests)
        assert cloud.requests()[0].wanted == [WantedRange("DEV", "eeg", former, 0, 5)]
        ranges = [(1, 2)]
        answer = cloud.receipt_message([CommittedRanges("DEV", "eeg", former, ranges, (0, 5))])
        await cloud.session.publish(answer)  # no bridge has been there for long: some may still be on their way
        await cloud.session.publish(cloud.receipt_message([CommittedRanges("DEV", "eeg", former, ranges)]))
        await chain.until(lambda: not uplink._inbox.qsize())
        assert len(await outbox.suspects()) == 1
        await cloud.present(online=True)
        await chain.until(uplink._is_bridge_settled)
        await chain.until(lambda: len(cloud.requests()) >= 3)
        await cloud.session.publish(answer)
        await chain.until(lambda: len(cloud.blocks) == 2)
    lost: list[Any] = [codec.decode(message.payload, message.content_type).content for message in cloud.blocks]
    assert [(loss.cause, loss.epoch, loss.sequences, loss.sample_count) for loss in lost] == [
        (LossCause.CORRUPT, former, (0, 0), 10),
        (LossCause.CORRUPT, former, (3, 5), 30),
    ]


async def test_an_empty_outbox_asks_for_nothing(chain: Any) -> None:
    async with chain.cloud() as cloud, chain.outbox() as outbox, chain.uplink(outbox) as uplink:
        await chain.until(lambda: statuses(cloud) == [True])
        outbox.append(chain.block())
        await chain.until(lambda: cloud.blocks)
        assert cloud.requests() == []
        assert not uplink._asking.is_set()


async def test_many_streams_are_asked_for_in_parts(chain: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uplink_module, "WANTED_MAX", 3)
    async with chain.cloud() as cloud, chain.outbox() as outbox:
        for number in range(7):
            outbox.append(chain.block(f"DEV-{number}"))
        await outbox.commit()
        async with chain.uplink(outbox):
            await chain.until(lambda: len(cloud.requests()) == 3)
        assert [len(request.wanted) for request in cloud.requests()] == [3, 3, 1]
        assert len({wanted.device for request in cloud.requests() for wanted in request.wanted}) == 7


async def test_a_receipt_that_was_waiting_for_the_gateway_is_taken_when_it_comes_back(chain: Any) -> None:
    async with chain.cloud() as cloud:
        async with chain.outbox() as outbox:
            async with chain.uplink(outbox):
                for at in range(3):
                    outbox.append(chain.block(at=at))
                await chain.until(lambda: len(cloud.blocks) == 3)
            epoch = outbox.epoch
        await cloud.receipt(epoch, [(0, 1)])
        async with chain.outbox() as outbox, chain.uplink(outbox):
            await chain.until(lambda: outbox.holding.rows == 1)


async def test_a_receipt_of_another_epoch_removes_nothing(chain: Any) -> None:
    async with chain.cloud() as cloud, chain.outbox() as outbox, chain.uplink(outbox):
        for at in range(4):
            outbox.append(chain.block(at=at))
        await chain.until(lambda: len(cloud.blocks) == 4)
        await cloud.receipt("another-epoch", [(0, 3)])
        await cloud.receipt(outbox.epoch, [(2, 2)])
        await chain.until(lambda: outbox.holding.rows < 4)  # the second was read, so the first was too
        assert [stored.row.sequence for stored in await outbox.fetch(0, 100, 100)] == [0, 1, 3]


async def test_a_receipt_of_many_streams_and_ranges_and_of_what_was_never_here(chain: Any) -> None:
    async with chain.cloud() as cloud, chain.outbox() as outbox, chain.uplink(outbox):
        for at in range(10):
            outbox.append(chain.block(at=at))
            outbox.append(chain.block("STRAP", "vital_signs", at=at, n=1))
        outbox.append(chain.loss())
        await chain.until(lambda: len(cloud.blocks) == 21)
        epoch = outbox.epoch
        committed = [
            CommittedRanges("DEV", "eeg", epoch, [(0, 2), (5, 10**12)]),
            CommittedRanges("NOBODY", "eeg", epoch, [(0, 10)]),
            CommittedRanges("STRAP", "vital_signs", epoch, [(number, number) for number in range(0, 10, 2)]),
            CommittedRanges("STRAP", "eeg", epoch, []),
            CommittedRanges("DEV", "loss", epoch, [(0, 0)]),
        ]
        await cloud.session.publish(cloud.receipt_message(committed))
        await chain.until(lambda: outbox.holding.rows == 7)
        left = [(stored.row.signal, stored.row.sequence) for stored in await outbox.fetch(0, 100, 100)]
        assert sorted(left) == [("eeg", 3), ("eeg", 4), *(("vital_signs", number) for number in range(1, 10, 2))]


GARBAGE = [
    b"",
    b"\x00\xff\xfe",
    b"{",
    b"[]",
    b"null",
    b'{"v":1}',
    b'{"v":1,"schema":"status","name":"x","online":true}',
    b'{"v":2,"schema":"receipt","gateway":"x","committed":[]}',
    b'{"v":1,"schema":"receipt","gateway":"x"}',
    b'{"v":1,"schema":"receipt","gateway":"x","committed":[{"device":"D","signal":"eeg","epoch":"e","ranges":[[-1,5]]}]}',
    b'{"v":1,"schema":"receipt","gateway":"x","committed":[{"device":"D","signal":"eeg","epoch":"e","ranges":[[0]]}]}',
    b"[" * 10_000,
    b'{"a":' * 10_000,
    b"\x00" * 900_000,
]


async def test_garbage_where_receipts_come_is_logged_and_harmless(chain: Any, caplog: pytest.LogCaptureFixture) -> None:
    receipts = f"wardlink/v1/{chain.gateway}/receipt"
    async with chain.cloud() as cloud, chain.outbox() as outbox, chain.uplink(outbox) as uplink:
        outbox.append(chain.block())
        await chain.until(lambda: cloud.blocks)
        for payload in GARBAGE:
            await cloud.send(receipts, payload)
            await cloud.send(f"wardlink/v1/_cloud/status/{cloud.bridge}", payload)
        await cloud.receipt(outbox.epoch, [(0, 0)])
        await asyncio.wait_for(outbox.empty.wait(), SECONDS_MAX)
        assert not uplink.sender.bridge_present or uplink._bridges_online == {cloud.bridge}
        problems = [record for record in caplog.records if record.name == "gateway.uplink.uplink"]
        on_receipts = [record for record in problems if f"message on {receipts} not understood" in record.getMessage()]
        assert len(on_receipts) == len(GARBAGE)
        assert len(problems) >= 2 * len(GARBAGE) - 2  # an empty status is that of a bridge that was given up
        assert all(record.exc_info is None for record in problems)


class Troubled:
    """A real store of which calls fail so often."""

    def __init__(self, chain: Any, **failures: int) -> None:
        self.store = chain.store()
        self.failures = failures

    def __getattr__(self, name: str) -> Any:
        if self.failures.get(name):
            self.failures[name] -= 1
            raise UnavailableError("the disk does not answer")
        return getattr(self.store, name)


async def test_a_flood_of_receipts_that_the_disk_cannot_take_stays_with_the_broker(
    chain: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(uplink_module, "RECEIPTS_BYTES_MAX", 40_000)
    monkeypatch.setattr(uplink_module, "DISK_RETRY_S", 0.01)
    caplog.set_level(logging.CRITICAL)
    store = Troubled(chain, find=10**9)
    async with chain.cloud() as cloud, chain.outbox(store) as outbox, chain.uplink(outbox) as uplink:
        outbox.append(chain.block())
        await chain.until(lambda: cloud.blocks)
        message = cloud.receipt_message([CommittedRanges("DEV", "eeg", outbox.epoch, [(7, 7)] * 1000)])
        fit = 1 + 40_000 // len(message.payload)
        flood = [cloud.session.publish(message) for _ in range(100)]
        await asyncio.wait_for(asyncio.gather(*flood), SECONDS_MAX)
        await cloud.receipt(outbox.epoch, [(0, 0)])
        await chain.until(lambda: uplink._inbox.qsize() >= fit - 1)
        for _ in range(50):
            await asyncio.sleep(0.001)
            assert uplink._inbox.qsize() <= fit + 1
        store.failures["find"] = 0
        await asyncio.wait_for(outbox.empty.wait(), SECONDS_MAX)


async def test_a_disk_that_does_not_answer_delays_receipts_and_requests_but_ends_nothing(
    chain: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(uplink_module, "DISK_RETRY_S", 0.01)
    store = Troubled(chain, find=3, held=3)
    async with chain.cloud(present=True) as cloud, chain.outbox(store) as outbox:
        outbox.append(chain.block())
        await outbox.commit()
        async with chain.uplink(outbox):
            await chain.until(lambda: cloud.requests() and cloud.blocks)
            await cloud.receipt(outbox.epoch, [(0, 0)])
            await asyncio.wait_for(outbox.empty.wait(), SECONDS_MAX)
    assert store.failures == {"find": 0, "held": 0}
    assert caplog.text.count("a receipt waits: the disk does not answer") == 3
    assert caplog.text.count("receipts cannot be asked for: the disk does not answer") == 3


async def test_a_broker_that_is_away_at_the_start_is_found_when_it_comes(chain: Any) -> None:
    await asyncio.to_thread(chain.mosquitto.kill)
    async with chain.outbox() as outbox, chain.uplink(outbox) as uplink:
        outbox.append(chain.block(at=0))
        await chain.until(lambda: outbox.holding.rows == 1 and uplink.session.last_error != "not yet tried")
        await asyncio.to_thread(chain.mosquitto.start)
        async with chain.cloud() as cloud:
            await asyncio.wait_for(uplink.session.connected.wait(), SECONDS_MAX)
            outbox.append(chain.block(at=1))
            await chain.until(lambda: 1 in cloud.counts())
