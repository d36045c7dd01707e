"""The sender on a real broker: what goes out, in which order, when again, and what a fault may not do to it."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import sqlite3
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gateway.errors import RefusedError, UnavailableError
from gateway.mqtt import Outbound
from gateway.spool.outbox import Outbox
from gateway.spool.store import Row
from gateway.uplink import sender as sender_module
from gateway.uplink import unreceipted as unreceipted_module
from gateway.uplink import window as window_module
from gateway.uplink.sender import Sender
from gateway.uplink.window import Window
from gateway.wire import codec, topics
from gateway.wire.codec import Payload
from tests.gateway.uplink.conftest import Chain
from wardlink.servers import Mosquitto

ALL = 10**9
numbers = itertools.count(1)
ROW_BYTES = 445
"""Of a block of these tests, on its way."""


def rows(count: int) -> int:
    """A window that has room for so many blocks of each lane."""
    return ROW_BYTES * count - ROW_BYTES // 2


def damage(chain: Any, *numbers: int) -> None:
    with contextlib.closing(sqlite3.connect(chain.path, isolation_level=None)) as connection:
        for number in numbers:
            connection.execute("UPDATE block SET payload = x'00' WHERE id = ?", (number,))


async def filled(chain: Any, count: int) -> None:
    """An outbox from before, with so many blocks."""
    async with chain.outbox() as outbox:
        for at in range(count):
            outbox.append(chain.block(at=at))


async def test_every_row_goes_to_its_topic_with_payload_content_type_and_properties(chain: Any) -> None:
    async with chain.cloud() as cloud, chain.outbox() as outbox, chain.uplink(outbox) as uplink:
        await asyncio.wait_for(uplink.session.connected.wait(), 20)
        contents = [
            chain.block(),
            chain.block(signal="brain_state", n=5),
            chain.block("STRAP", "vital_signs", n=1),
            chain.loss("STRAP", "vital_signs"),
        ]
        for content in contents:
            outbox.append(content)
        await chain.until(lambda: len(cloud.blocks) == 4)
        rows = [stored.row for stored in await outbox.fetch(0, ALL, ALL)]
    head = f"wardlink/v1/{chain.gateway}"
    expected = [
        (f"{head}/data/DEV/eeg", "application/cbor", "raw"),
        (f"{head}/data/DEV/brain_state", "application/json", "brain_state"),
        (f"{head}/data/STRAP/vital_signs", "application/json", "vital_signs"),
        (f"{head}/loss/STRAP", "application/json", "loss"),
    ]
    for message, row, (topic, content_type, schema) in zip(cloud.blocks, rows, expected, strict=True):
        assert (message.topic, message.content_type) == (topic, content_type)
        assert message.properties == {"schema": schema, "historical": "0"}
        assert message.payload == row.payload.data
        assert not message.retain
        decoded = codec.decode_on(message.topic, message.payload, message.content_type)
        assert decoded.identity == outbox.identity_of(row)


async def test_what_waited_before_the_connection_is_marked_historical(chain: Any) -> None:
    await filled(chain, 5)
    async with chain.cloud() as cloud, chain.outbox() as outbox, chain.uplink(outbox):
        await chain.until(lambda: len(cloud.blocks) == 5)
        outbox.append(chain.block(at=5))
        await chain.until(lambda: len(cloud.blocks) == 6)
    assert cloud.seconds() == list(range(6))
    assert [message.properties["historical"] for message in cloud.blocks] == ["1"] * 5 + ["0"]


async def test_the_acknowledgement_frees_the_window_but_not_the_disk(chain: Any) -> None:
    async with chain.cloud() as cloud, chain.outbox() as outbox, chain.uplink(outbox, bytes_max=rows(2)) as uplink:
        for at in range(50):
            outbox.append(chain.block(at=at))
        await chain.until(lambda: len(cloud.blocks) == 50 and not uplink.sender._window)
        assert outbox.holding.rows == 50
        assert not outbox.empty.is_set()
    assert cloud.counts() == Counter(range(50))
    async with chain.outbox() as outbox:
        assert outbox.holding.rows == 50


async def test_no_more_are_on_their_way_than_the_window_allows(chain: Any) -> None:
    await filled(chain, 30)
    async with chain.cloud() as cloud, chain.outbox() as outbox, chain.uplink(outbox, bytes_max=rows(3)) as uplink:
        await chain.until(lambda: len(cloud.blocks) == 30 and not uplink.sender._window)
        chain.freeze_broker()
        for at in range(30, 50):
            outbox.append(chain.block(at=at))
        in_both_lanes = 3 + 3
        await chain.until(lambda: outbox.holding.rows == 50 and len(uplink.sender._window) == in_both_lanes)
        for _ in range(20):
            uplink.sender.wake()
            await asyncio.sleep(0.001)
            assert len(uplink.sender._window) == in_both_lanes
        chain.thaw_broker()
        await chain.until(lambda: len(cloud.blocks) == 50)
    assert cloud.counts() == Counter(range(50))


async def test_live_data_goes_before_the_backlog(chain: Any) -> None:
    await filled(chain, 400)
    async with chain.cloud() as cloud, chain.outbox() as outbox, chain.uplink(outbox, bytes_max=rows(2)) as uplink:
        await chain.until(lambda: len(cloud.blocks) > 10)
        chain.freeze_broker()
        known = len(uplink.sender._window)
        outbox.append(chain.block("STRAP", "vital_signs", n=1))
        await chain.until(lambda: outbox.holding.rows == 401)
        chain.thaw_broker()
        await chain.until(lambda: len(cloud.blocks) == 401)
    at = [topics.parse(message.topic).device for message in cloud.blocks].index("STRAP")
    assert at < 400 - 1
    assert known <= 2
    assert cloud.blocks[at].properties["historical"] == "0"
    assert cloud.seconds() == list(range(400))


async def test_a_receipt_removes_rows_for_good(chain: Any) -> None:
    async with (
        chain.cloud(present=True) as cloud,
        chain.outbox() as outbox,
        chain.uplink(outbox, resend_after_s=0.1) as uplink,
    ):
        for at in range(6):
            outbox.append(chain.block(at=at))
        await chain.until(lambda: len(cloud.blocks) >= 6)
        await cloud.receipt(outbox.epoch, [(0, 1), (4, 5)])
        await chain.until(lambda: outbox.holding.rows == 2)
        assert await outbox.held() == {("DEV", "eeg", outbox.epoch): (2, 3)}
        assert not set(uplink.sender._unreceipted) - {3, 4}
        before = cloud.counts()
        await chain.until(lambda: (cloud.counts() - before)[3] >= 2)
        again = cloud.counts() - before
        assert not set(again) & {0, 1, 4, 5}
        await cloud.receipt(outbox.epoch, [(2, 3)])
        await asyncio.wait_for(outbox.empty.wait(), 20)
        assert not uplink.sender._unreceipted


async def test_nothing_is_sent_again_while_no_bridge_is_there(chain: Any) -> None:
    loop = asyncio.get_running_loop()
    async with chain.cloud() as cloud, chain.outbox() as outbox, chain.uplink(outbox, resend_after_s=0.1) as uplink:
        for at in range(3):
            outbox.append(chain.block(at=at))
        await chain.until(lambda: len(cloud.blocks) == 3)
        await asyncio.sleep(0.5)  # five times as long as a hole may stand: it is the time that is tested
        assert cloud.counts() == Counter(range(3))
        assert uplink.sender.resent == 0
        appeared_s = loop.time()
        await cloud.present(online=True)
        await chain.until(lambda: len(cloud.blocks) >= 6)
        assert loop.time() - appeared_s >= 0.1
        assert uplink.sender.resent >= 3
        assert {message.properties["historical"] for message in cloud.blocks[3:]} == {"1"}
        await cloud.present(online=False)
        await chain.until(lambda: not uplink.sender.bridge_present)
        resent = uplink.sender.resent
        await asyncio.sleep(0.5)
        assert uplink.sender.resent == resent


async def test_a_hole_may_stand_for_a_while_before_anything_is_sent_again(chain: Any) -> None:
    loop = asyncio.get_running_loop()
    async with (
        chain.cloud(present=True) as cloud,
        chain.outbox() as outbox,
        chain.uplink(outbox, resend_after_s=0.6) as uplink,
    ):
        await chain.until(lambda: uplink.sender.bridge_present)
        began_s = loop.time()
        outbox.append(chain.block(at=0))
        await chain.until(lambda: cloud.counts()[0] == 2)
        assert loop.time() - began_s >= 0.6
        assert uplink.sender.resent == 1


async def test_a_broker_that_loses_what_it_acknowledged_gets_it_again(chain: Any) -> None:
    async with (
        chain.cloud(present=True) as cloud,
        chain.outbox() as outbox,
        chain.uplink(outbox, resend_after_s=0.2, bytes_max=rows(8)) as uplink,
    ):
        for at in range(40):
            outbox.append(chain.block(at=at))
        await chain.until(lambda: len(cloud.counts()) == 40 and not uplink.sender._window)
        await asyncio.to_thread(chain.mosquitto.kill)
        await chain.until(lambda: not uplink.session.connected.is_set())
        for at in range(40, 60):
            outbox.append(chain.block(at=at))
        await chain.until(lambda: outbox.holding.rows == 60)
        cloud.got.clear()  # as if the broker had taken them and told nobody
        await asyncio.to_thread(chain.mosquitto.start)
        await asyncio.wait_for(cloud.session.connected.wait(), 20)
        await cloud.present(online=True)
        await chain.until(lambda: len(cloud.counts()) == 60)
        await cloud.receipt(outbox.epoch, [(0, 59)])
        await asyncio.wait_for(outbox.empty.wait(), 20)


async def test_kill_after_kill_of_the_broker_everything_arrives(chain: Any) -> None:
    async with chain.cloud(present=True) as cloud, chain.outbox() as outbox:
        cloud.receipting = True
        arrived: set[int] = set()
        async with chain.uplink(outbox, resend_after_s=0.2, bytes_max=rows(4)):
            for round_number in range(3):
                for at in range(round_number * 50, round_number * 50 + 50):
                    outbox.append(chain.block(at=at))
                await chain.until(lambda: cloud.blocks)
                await asyncio.to_thread(chain.mosquitto.kill)
                await chain.until(lambda: not cloud.session.connected.is_set())
                arrived |= set(cloud.counts())
                cloud.got.clear()
                await asyncio.to_thread(chain.mosquitto.start)
                await asyncio.wait_for(cloud.session.connected.wait(), 20)
                await cloud.present(online=True)
            await asyncio.wait_for(outbox.empty.wait(), 20)
        assert arrived | set(cloud.counts()) == set(range(150))


async def test_damaged_rows_hide_none_of_those_behind_them(chain: Any) -> None:
    await filled(chain, 20)
    damage(chain, 1, 2, 7, 20)
    gone: list[int] = []

    def all_gone(cloud: Any) -> bool:
        gone.clear()
        for message in cloud.blocks:
            if topics.parse(message.topic).kind is topics.TopicKind.LOSS:
                loss: Any = codec.decode_on(message.topic, message.payload, message.content_type).content
                gone.extend(range(loss.sequences[0], loss.sequences[1] + 1))
        return len(gone) >= 4

    async with chain.cloud() as cloud, chain.outbox() as outbox, chain.uplink(outbox, bytes_max=rows(4)):
        await chain.until(lambda: len(cloud.counts()) == 16 and all_gone(cloud))
    assert sorted(gone) == [0, 1, 6, 19]
    assert cloud.counts() == Counter(set(range(20)) - set(gone))


async def test_with_too_much_to_remember_the_backlog_waits_and_nothing_is_forgotten(
    chain: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unreceipted_module, "ROWS_MAX", 5)
    await filled(chain, 30)
    async with (
        chain.cloud() as cloud,
        chain.outbox() as outbox,
        chain.uplink(outbox, bytes_max=rows(4), resend_after_s=0.1) as uplink,
    ):
        await chain.until(lambda: len(cloud.blocks) >= 5 and not uplink.sender._window)
        for _ in range(50):
            uplink.sender.wake()
            await asyncio.sleep(0.001)
        assert 5 <= len(cloud.blocks) < 5 + 4
        for at in range(30, 36):
            outbox.append(chain.block(at=at))
            await chain.until(lambda at=at: at in cloud.counts())
        assert len(uplink.sender._unreceipted) == 5
        cloud.got.clear()  # all of this is lost behind the broker, remembered or not
        cloud.receipting = True
        await cloud.present(online=True)
        await asyncio.wait_for(outbox.empty.wait(), 20)
    assert set(cloud.counts()) == set(range(36))


async def test_a_row_that_was_too_much_to_remember_is_remembered_when_there_is_room_though_it_is_under_way(
    chain: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unreceipted_module, "ROWS_MAX", 1)
    session = Scripted()
    async with chain.outbox() as outbox, sending(outbox, session) as sender:
        for at in range(2):
            outbox.append(chain.block(at=at))
        await chain.until(lambda: len(session.published) == 2)
        assert (set(sender._unreceipted), set(sender._window)) == ({1}, {1, 2})
        sender.receipted([1])
        await chain.until(lambda: sender._lanes.backlog() is None)
        assert set(sender._unreceipted) == {2}
        assert len(session.published) == 2


async def test_an_outbox_that_cannot_be_read_holds_the_sender_up_but_does_not_end_it(
    chain: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sender_module, "FETCH_RETRY_S", 0.01)
    await filled(chain, 3)
    failures = 3

    class Unreadable:
        def __init__(self) -> None:
            self._store = chain.store()

        def __getattr__(self, name: str) -> Any:
            return getattr(self._store, name)

        def fetch(self, after: int, through: int, limit: int) -> Any:
            nonlocal failures
            if failures:
                failures -= 1
                raise UnavailableError("the disk cannot be read")
            return self._store.fetch(after, through, limit)

    async with chain.cloud() as cloud, chain.outbox(Unreadable()) as outbox, chain.uplink(outbox):
        await chain.until(lambda: len(cloud.blocks) == 3)
    assert failures == 0


def oversized(sequence: int, size: int = (1 << 20) + 1) -> Row:
    """Of a size that the broker does not take: by default the fixture's."""
    data = bytes(size)
    return Row("DEV", "ppg", "E", sequence, 1, 2, 1, 0, "", Payload("application/cbor", "raw", data))


async def test_a_row_that_makes_the_broker_hang_up_is_set_aside_and_the_others_go_on(
    chain: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Mosquitto answers a message beyond its limit with the end of the connection."""
    monkeypatch.setattr(sender_module, "NEXT_ATTEMPT_S", 0.1)
    async with chain.cloud() as cloud, chain.outbox() as outbox, chain.uplink(outbox, bytes_max=rows(2)) as uplink:
        await asyncio.wait_for(uplink.session.connected.wait(), 20)
        outbox._take(oversized(0))
        for at in range(20):
            outbox.append(chain.block(at=at))
        await chain.until(lambda: "block 1 of the outbox does not get through" in caplog.text)
        await chain.until(lambda: len(cloud.counts()) == 20 and not uplink.sender._window)
        assert caplog.text.count("connection to broker") <= 3
        assert outbox.holding.rows == 21
        assert 1 in uplink.sender._unreceipted


class Narrow(Mosquitto):
    """Takes no packet beyond a limit, and says so in its CONNACK."""

    packet_bytes_max = 20_000

    def _prepare(self) -> None:
        super()._prepare()
        path = self.folder / "mosquitto.conf"
        path.write_text(f"{path.read_text()}\nmax_packet_size {self.packet_bytes_max}\n", encoding="utf-8")


@pytest.fixture
def narrow(servers_folder: Path, tmp_path: Path) -> Iterator[Any]:
    server = Narrow(servers_folder / f"narrow-{next(numbers)}")
    server.start()
    chain = Chain(server, server.gateway("gw-narrow"), tmp_path / "outbox.db")
    yield chain
    server.stop()


async def test_what_a_real_broker_is_too_narrow_for_is_on_record_until_its_limit_is_raised(
    narrow: Any, caplog: pytest.LogCaptureFixture
) -> None:
    chain = narrow
    async with (
        chain.cloud(present=True) as cloud,
        chain.outbox() as outbox,
        chain.uplink(outbox, resend_after_s=0.4) as uplink,
    ):
        cloud.receipting = True
        await chain.until(lambda: uplink.sender.bridge_present)
        outbox._take(oversized(0, 30_000))
        for at in range(20):
            outbox.append(chain.block(at=at))
        await chain.until(lambda: len(cloud.counts()) == 20 and outbox.holding.rows == 1)
        await chain.until(lambda: list(uplink.sender.refused) == [1])
        assert "its maximum packet size is 20000" in uplink.sender.refused[1]
        connection = uplink.session._connection
        for at in range(20, 40):  # its time to be tried again comes and goes, and the others are taken all the while
            outbox.append(chain.block(at=at))
            await asyncio.sleep(0.05)
        await chain.until(lambda: len(cloud.counts()) == 40)
        assert uplink.session._connection is connection
        assert caplog.text.count("does not get through") == 1
        await asyncio.to_thread(chain.mosquitto.stop)
        chain.mosquitto.packet_bytes_max = 100_000
        await asyncio.to_thread(chain.mosquitto._prepare)
        await asyncio.to_thread(chain.mosquitto.start)
        await asyncio.wait_for(cloud.session.connected.wait(), 20)
        await cloud.present(online=True)
        await chain.until(lambda: not uplink.sender.refused)
        await chain.until(lambda: any(len(message.payload) == 30_000 for message in cloud.blocks))


async def test_that_receipts_are_overdue_is_told_before_anything_is_sent_again(chain: Any) -> None:
    session = Scripted()
    resent: list[int] = []
    async with chain.outbox() as outbox, sending(outbox, session, resend_after_s=2.0) as sender:
        sender.bridge_present = True
        sender.on_overdue = lambda: resent.append(sender.resent)
        outbox.append(chain.block())
        await chain.until(lambda: len(session.published) == 1)
        session.published[0][1].set_result(None)
        await chain.until(lambda: len(session.published) == 2)
    assert resent
    assert resent[0] == 0


async def test_a_refused_block_that_is_given_up_is_no_longer_on_record_as_refused(chain: Any) -> None:
    session = Scripted()
    async with chain.outbox() as outbox, sending(outbox, session, resend_after_s=0.1) as sender:
        outbox.append(chain.block(at=0))
        await chain.until(lambda: len(session.published) == 1)
        session.published[0][1].set_exception(RefusedError("more than the broker takes"))
        await chain.until(lambda: sender.refused == {1: "more than the broker takes"})
        await outbox.forget("DEV", "eeg", outbox.epoch, [(0, 0)])  # the sender is not told, as when it is shed
        sender.bridge_present = True
        await chain.until(lambda: not sender.refused)


class Scripted:
    """A session that answers as the test says: for what no mosquitto can be made to do."""

    def __init__(self) -> None:
        self.connected = asyncio.Event()
        self.connected.set()
        self.published: list[tuple[Outbound, asyncio.Future[None]]] = []
        self.declines = False
        self.on_publish: Callable[[], None] = lambda: None

    def publish(self, message: Outbound) -> asyncio.Future[None]:
        self.on_publish()
        answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.published.append((message, answer))
        if self.declines:
            answer.set_exception(UnavailableError("not authorized"))
        return answer


@contextlib.asynccontextmanager
async def sending(
    outbox: Outbox, session: Any, *, bytes_max: int = 256 << 10, resend_after_s: float = 60.0
) -> AsyncIterator[Sender]:
    window = Window(delay_s=0.5, bytes_max=bytes_max)
    sender = Sender(outbox, session, "gw", window=window, resend_after_s=resend_after_s)
    outbox.on_commit = sender.wake
    task = asyncio.create_task(sender.run())
    try:
        yield sender
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert task.cancelled()


async def test_a_row_that_is_too_large_for_the_broker_is_not_tried_in_circles(
    chain: Any, caplog: pytest.LogCaptureFixture
) -> None:
    session = Scripted()
    async with chain.outbox() as outbox, sending(outbox, session, resend_after_s=0.1) as sender:
        outbox.append(chain.block(at=0))
        await chain.until(lambda: len(session.published) == 1)
        session.published[0][1].set_exception(RefusedError("more than the broker takes"))
        outbox.append(chain.block(at=1))
        await chain.until(lambda: len(session.published) == 2)
        session.published[1][1].set_result(None)
        await chain.until(lambda: not sender._window)
        assert "block 1 of the outbox does not get through: more than the broker takes" in caplog.text
        assert len(session.published) == 2
        sender.bridge_present = True
        await chain.until(lambda: len(session.published) >= 4)  # after its time it may be tried again like any other


def sequences(session: Scripted) -> list[int]:
    return [codec.decode(message.payload, message.content_type).identity.sequence for message, _ in session.published]


async def test_a_lost_connection_gives_everything_unacknowledged_back_at_once(chain: Any) -> None:
    session = Scripted()
    async with chain.outbox() as outbox, sending(outbox, session) as sender:
        for at in range(6):
            outbox.append(chain.block(at=at))
        await chain.until(lambda: len(session.published) == 6)
        session.published[1][1].set_result(None)
        await chain.until(lambda: len(sender._window) == 5)
        session.connected.clear()
        for _, answer in session.published:
            if not answer.done():
                answer.set_exception(UnavailableError("lost"))
        await chain.until(lambda: not sender._window)
        assert set(sender._unreceipted) == {2}
        session.published.clear()
        session.connected.set()
        await chain.until(lambda: len(session.published) == 5)
        assert sequences(session) == [0, 2, 3, 4, 5]
        assert all(message.gives_way for message, _ in session.published)


async def test_live_raw_data_that_the_link_does_not_keep_up_with_becomes_backlog(
    chain: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is small goes at once, and so does the next raw block as soon as there is room: the newest, not the next."""
    monkeypatch.setattr(window_module, "BYTES_START", rows(2))
    session = Scripted()
    async with chain.outbox() as outbox, sending(outbox, session) as sender:
        for at in range(10):
            outbox.append(chain.block(at=at))
        outbox.append(chain.block("STRAP", "vital_signs", n=1))
        outbox.append(chain.loss())
        await outbox.commit()
        await chain.until(lambda: len(session.published) == 2 + 2 + 2)
        sent = [(message.topic.rpartition("/")[2], message.gives_way) for message, _ in session.published]
        assert sent == [*[("eeg", False)] * 2, ("vital_signs", False), ("DEV", False), *[("eeg", True)] * 2]
        for _, answer in session.published[:4]:
            answer.set_result(None)
        outbox.append(chain.block(at=10))
        await chain.until(lambda: len(session.published) == 7)
        assert (sequences(session)[-1], session.published[-1][0].gives_way) == (10, False)
        while len(session.published) < outbox.holding.rows:
            for _, answer in session.published:
                if not answer.done():
                    answer.set_result(None)
            await asyncio.sleep(0)
        assert len(sender._unreceipted) == 13
    assert sorted(sequences(session)) == sorted([*range(11), 0, 0])


async def test_live_data_goes_before_the_rest_of_a_backlog_in_many_pieces(chain: Any) -> None:
    session = Scripted()
    async with chain.outbox() as outbox, sending(outbox, session, bytes_max=rows(100)) as sender:
        for at in range(40):
            outbox.append(chain.block(at=at))
        await chain.until(lambda: len(session.published) == 40)
        for _, answer in session.published:
            answer.set_result(None)
        await chain.until(lambda: not sender._window)
        live: list[asyncio.Task[None]] = []

        def append_live() -> None:
            if not live:
                outbox.append(chain.block("STRAP", "vital_signs", n=1))
                live.append(asyncio.create_task(outbox.commit()))

        session.on_publish = append_live
        sender._lanes.put_back(range(2, 41, 2))
        sender.wake()
        await chain.until(lambda: len(session.published) == 40 + 20 + 1)
        order = [topics.parse(message.topic).device for message, _ in session.published[40:]]
        assert order.index("STRAP") < 10
        await live[0]


async def test_a_broker_that_declines_everything_is_not_asked_in_circles(chain: Any) -> None:
    session = Scripted()
    session.declines = True
    async with chain.outbox() as outbox, sending(outbox, session, bytes_max=rows(2)) as sender:
        for at in range(6):
            outbox.append(chain.block(at=at))
        await chain.until(lambda: len(sender._window) == 2 and set(sender._failures.values()) >= {2})
        known = len(session.published)
        for _ in range(50):
            sender.wake()
            await asyncio.sleep(0)
        assert len(session.published) == known < 6 * 3
        session.declines = False
        waiting = sorted(sender._window)
        for number in waiting:
            sender._give_back(number)  # its time has come
        await chain.until(lambda: len(session.published) == known + 2)
        last = [codec.decode(message.payload).identity.sequence + 1 for message, _ in session.published[known:]]
        assert last == waiting


async def test_of_rows_that_fail_together_only_the_first_is_blamed(chain: Any) -> None:
    session = Scripted()
    async with chain.outbox() as outbox, sending(outbox, session) as sender:
        for at in range(4):
            outbox.append(chain.block(at=at))
        for attempt in range(2):
            await chain.until(lambda attempt=attempt: len(session.published) == 4 + 4 * attempt)
            for _, answer in session.published[-4:]:
                answer.set_exception(UnavailableError("lost"))
        await chain.until(lambda: len(session.published) == 8 + 3)
        assert sender._failures == {1: 2}
        assert set(sender._window) == {1, 2, 3, 4}


async def test_a_row_that_got_through_has_no_failures_to_its_name(chain: Any) -> None:
    session = Scripted()
    async with chain.outbox() as outbox, sending(outbox, session) as sender:
        outbox.append(chain.block())
        await chain.until(lambda: len(session.published) == 1)
        session.published[0][1].set_exception(UnavailableError("lost"))
        await chain.until(lambda: len(session.published) == 2)
        assert sender._failures == {1: 1}
        session.published[1][1].set_result(None)
        await chain.until(lambda: not sender._window)
        assert sender._failures == {}
