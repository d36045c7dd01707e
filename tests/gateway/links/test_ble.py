"""BleLink with the real BLE library and a real D-Bus daemon against the virtual BlueZ."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import bleak_retry_connector
import pytest
import pytest_asyncio
from bleak.backends.bluezdbus.manager import get_global_bluez_manager
from dbus_fast import BusType, Message, RequestNameReply
from dbus_fast.aio import MessageBus

from gateway.devices import gatt
from gateway.devices.base import Facts, Reading, Rejected
from gateway.devices.heart_rate import HeartRateDecoder
from gateway.errors import UnavailableError
from gateway.links import ble, bluetoothd, radio
from gateway.links.base import Chunk, Link
from gateway.links.ble import BleLink
from gateway.virtual.bluez import VirtualBlueZ
from gateway.virtual.dbus_daemon import DbusDaemon
from gateway.virtual.peripheral import AttributeRefusedError, Characteristic, Peripheral, Service
from gateway.virtual.strap import HeartRateStrap

pytestmark = pytest.mark.timeout(60)

SPEED = 25.0
"""The straps' time runs so much faster: a measurement every 40 ms."""
DEADLINE_S = 10.0
CONTROL = "273e0001-4c4d-454d-96be-f03bac821358"
RESPONSE = "273e0002-4c4d-454d-96be-f03bac821358"


BACKLOG = 50
"""Notifications that are under way when a daemon is killed."""


def strap_link(strap: HeartRateStrap) -> BleLink:
    return BleLink(strap.address, HeartRateDecoder.NOTIFY, HeartRateDecoder.READ)


@asynccontextmanager
async def opened(link: Link) -> AsyncIterator[Link]:
    await link.open()
    try:
        yield link
    finally:
        await link.close()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while True:
            if condition():
                return
            await asyncio.sleep(0.005)


async def chunks(link: Link, count: int, channel: str = gatt.HEART_RATE_MEASUREMENT) -> list[bytes]:
    """The next so many chunks of one characteristic."""
    got: list[bytes] = []
    async with asyncio.timeout(DEADLINE_S):
        while len(got) < count:
            chunk = await link.read()
            if chunk.channel == channel:
                got.append(chunk.data)
    return got


async def silence(link: Link, seconds: float) -> None:
    """Read until nothing has come for so long, as a caller's watchdog does. Fails if it never stops."""
    async with asyncio.timeout(DEADLINE_S):
        while True:
            try:
                await asyncio.wait_for(link.read(), seconds)
            except TimeoutError:
                return


async def rest(link: Link) -> tuple[list[Chunk], UnavailableError]:
    """All that is still delivered, and the error that ends it."""
    got: list[Chunk] = []
    async with asyncio.timeout(DEADLINE_S):
        while True:
            try:
                got.append(await link.read())
            except UnavailableError as error:
                return got, error


@pytest_asyncio.fixture
async def strap(bluez: VirtualBlueZ) -> HeartRateStrap:
    """A strap in range of the virtual BlueZ, its heart known by its seed."""
    strap = HeartRateStrap(seed=5, speed=SPEED)
    bluez.add(strap)
    return strap


async def test_a_strap_is_read_and_then_heard(strap: HeartRateStrap) -> None:
    decoder = HeartRateDecoder()
    started_ns = time.monotonic_ns()
    async with opened(strap_link(strap)) as link:
        async with asyncio.timeout(DEADLINE_S):
            got = [await link.read() for _ in range(40)]
    assert [chunk.channel for chunk in got[:3]] == [gatt.MODEL_NUMBER, gatt.FIRMWARE_REVISION, gatt.BATTERY_LEVEL]
    events = [event for chunk in got for event in decoder.receive(chunk)]
    assert events[:3] == [Facts(model="Virtual strap"), Facts(firmware="1.0.0"), Facts(battery_pct=87.0)]
    assert sum(isinstance(event, Reading) for event in events) >= 37
    assert not any(isinstance(event, Rejected) for event in events[5:])
    arrivals = [started_ns, *(chunk.arrival_ns for chunk in got), time.monotonic_ns()]
    assert arrivals == sorted(arrivals)


async def test_every_notification_comes_once_and_in_order(bluez: VirtualBlueZ, strap: HeartRateStrap) -> None:
    async with opened(strap_link(strap)) as link:
        got = await chunks(link, 50)
    twin = HeartRateStrap(seed=5)
    all_of_it = [twin.measurement() for _ in range(400)]
    first = next(n for n in range(len(all_of_it)) if all_of_it[n : n + 3] == got[:3])
    assert got == all_of_it[first : first + 50]
    assert bluez.calls["org.bluez.GattCharacteristic1.StartNotify"] == 2
    assert bluez.calls["org.bluez.GattCharacteristic1.AcquireNotify"] == 0


async def test_five_lost_links_give_no_doubled_notification(bluez: VirtualBlueZ, strap: HeartRateStrap) -> None:
    link = strap_link(strap)
    for _ in range(5):
        await link.open()
        delivered_before = bluez.delivered(strap.address, gatt.HEART_RATE_MEASUREMENT)
        got = await chunks(link, 10)
        bluez.drop_link(strap.address)
        more, error = await rest(link)
        got += [chunk.data for chunk in more if chunk.channel == gatt.HEART_RATE_MEASUREMENT]
        delivered = bluez.delivered(strap.address, gatt.HEART_RATE_MEASUREMENT) - delivered_before
        # One may have come between the subscription and the first look at the counter.
        assert len(got) - delivered in {0, 1}
        assert "link was lost" in error.message
    await link.close()
    await until(lambda: bluez.notify_sessions(strap.address) == 0)


async def test_what_came_before_a_loss_is_delivered_first(bluez: VirtualBlueZ, strap: HeartRateStrap) -> None:
    async with opened(strap_link(strap)) as link:
        await until(lambda: bluez.delivered(strap.address, gatt.HEART_RATE_MEASUREMENT) >= 5)
        bluez.drop_link(strap.address)
        got, _ = await rest(link)
        assert sum(chunk.channel == gatt.HEART_RATE_MEASUREMENT for chunk in got) >= 5
        with pytest.raises(UnavailableError, match="link was lost"):
            await link.read()


async def test_a_killed_daemon_is_noticed_at_once_and_recovered_from(
    bluez: VirtualBlueZ, strap: HeartRateStrap
) -> None:
    link = strap_link(strap)
    async with opened(link):
        await chunks(link, 3)
        await bluez.kill()
        _, error = await rest(link)
        assert "daemon" in error.message
        assert "systemctl" in error.hint
        with pytest.raises(UnavailableError, match="not running") as caught:
            await link.open()
        assert "systemctl" in caught.value.hint
        await bluez.restart()
        await link.open()
        assert len(set(await chunks(link, 20))) > 10


async def test_what_a_killed_daemon_had_sent_is_delivered_first(bluez: VirtualBlueZ, strap: HeartRateStrap) -> None:
    strap.silent = True
    link = strap_link(strap)
    async with opened(link):
        # The news of the daemon's end comes over another socket, and overtakes what nobody has read from this one.
        with unread(await get_global_bluez_manager()):
            for number in range(BACKLOG):
                strap.notify(gatt.HEART_RATE_MEASUREMENT, number.to_bytes(4, "little"))
            await bluez.kill()
            await until(lambda: not link.connected)
        got, error = await rest(link)
    heard = [chunk.data for chunk in got if chunk.channel == gatt.HEART_RATE_MEASUREMENT]
    assert heard == [number.to_bytes(4, "little") for number in range(BACKLOG)]
    assert bluez.delivered(strap.address, gatt.HEART_RATE_MEASUREMENT) == BACKLOG
    assert "daemon" in error.message


@contextmanager
def unread(manager: Any) -> Iterator[None]:
    """Nothing is read from the library's connection to the bus, as in a loop that is busy with other things."""
    loop: Any = asyncio.get_running_loop()
    descriptor = manager._bus._fd
    reading = loop._selector.get_key(descriptor).data[0]._callback
    loop.remove_reader(descriptor)
    try:
        yield
    finally:
        loop.add_reader(descriptor, reading)


async def test_a_link_that_is_closed_while_last_words_are_awaited_can_be_opened_again(
    bluez: VirtualBlueZ, strap: HeartRateStrap, monkeypatch: pytest.MonkeyPatch
) -> None:
    answered = asyncio.Event()
    monkeypatch.setattr(ble, "caught_up", lambda _bus: answered.wait())
    link = strap_link(strap)
    async with opened(link):
        await bluez.kill()
        await until(lambda: not link.connected)
        await link.close()
        await bluez.restart()
        await link.open()
        answered.set()
        assert len(set(await chunks(link, 20))) > 10


async def test_a_daemon_that_hangs_is_left_within_seconds(
    bluez: VirtualBlueZ, strap: HeartRateStrap, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ble, "CLOSE_S_MAX", 0.2)
    monkeypatch.setattr("gateway.links.bluetoothd.CALL_S_MAX", 0.2)
    link = strap_link(strap)
    async with opened(link):
        await chunks(link, 3)
        bluez.hang()
        # No data, so the link is dead whatever anybody says.
        await silence(link, 0.3)
        async with asyncio.timeout(2):
            await link.close()
            with pytest.raises(UnavailableError, match="does not answer"):
                await link.open()
        await bluez.kill()
        await bluez.restart()
        await link.open()
        await chunks(link, 3)


async def test_a_silent_device_looks_like_one_that_waits(strap: HeartRateStrap) -> None:
    async with opened(strap_link(strap)) as link:
        await chunks(link, 2)
        strap.silent = True
        await silence(link, 0.3)
        strap.silent = False
        await chunks(link, 2)


async def match_rules(address: str) -> int:
    """How many match rules the D-Bus daemon holds for all its clients."""
    bus = await MessageBus(address).connect()
    reply = await bus.call(
        Message(
            destination="org.freedesktop.DBus",
            path="/org/freedesktop/DBus",
            interface="org.freedesktop.DBus.Debug.Stats",
            member="GetAllMatchRules",
        )
    )
    await closed(bus)
    return sum(len(rules) for rules in reply.body[0].values())


async def closed(bus: Any) -> None:
    bus.disconnect()
    await bus.wait_for_disconnect()


async def test_reconnects_leave_nothing_behind(system_bus: str, bluez: VirtualBlueZ, strap: HeartRateStrap) -> None:
    link = strap_link(strap)

    async def cycle() -> None:
        async with opened(link):
            await chunks(link, 2)
            bluez.drop_link(strap.address)
            await rest(link)

    async def held() -> tuple[int, int, int]:
        descriptors = await asyncio.to_thread(lambda: len(list(Path("/proc/self/fd").iterdir())))
        return descriptors, len(asyncio.all_tasks()), await match_rules(system_bus)

    await cycle()
    before = await held()
    for _ in range(10):
        await cycle()
    deadline_s = time.monotonic() + DEADLINE_S
    while (after := await held()) != before and time.monotonic() < deadline_s:  # noqa: ASYNC110 -- no event tells it
        await asyncio.sleep(0.02)
    assert after == before
    assert bluez.notify_sessions(strap.address) == 0


async def test_five_devices_on_one_adapter(bluez: VirtualBlueZ, monkeypatch: pytest.MonkeyPatch) -> None:
    connecting = 0
    together_max = 0
    establish = bleak_retry_connector.establish_connection

    async def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal connecting, together_max
        connecting += 1
        together_max = max(together_max, connecting)
        try:
            return await establish(*args, **kwargs)
        finally:
            connecting -= 1

    monkeypatch.setattr(ble, "establish_connection", counted)
    straps = [HeartRateStrap(f"00:22:D0:00:00:{n:02X}", seed=n, speed=SPEED) for n in range(5)]
    for strap in straps:
        bluez.add(strap)
    links = [strap_link(strap) for strap in straps]
    await asyncio.gather(*(link.open() for link in links))
    got = await asyncio.gather(*(chunks(link, 20) for link in links))
    await asyncio.gather(*(link.close() for link in links))
    assert together_max == 1
    for n, mine in enumerate(got):
        twin = HeartRateStrap(seed=n)
        all_of_it = [twin.measurement() for _ in range(800)]
        assert any(all_of_it[k : k + 20] == mine for k in range(len(all_of_it)))


async def test_a_link_that_a_killed_program_left_open_is_taken_over(
    system_bus: str, bluez: VirtualBlueZ, strap: HeartRateStrap
) -> None:
    async with opened(strap_link(strap)):
        pass
    stranger = await MessageBus(bus_type=BusType.SYSTEM).connect()
    path = f"/org/bluez/hci0/dev_{strap.address.replace(':', '_')}"
    await stranger.call(Message(destination="org.bluez", path=path, interface="org.bluez.Device1", member="Connect"))
    # As long as the daemon has news of the device, a scan takes them for an advertisement.
    await until(lambda: bluez.settled(strap.address))
    await closed(stranger)
    assert bluez.connected(strap.address)
    async with opened(strap_link(strap)) as link:
        await chunks(link, 3)


async def test_aborted_connects_are_tried_again(bluez: VirtualBlueZ, strap: HeartRateStrap) -> None:
    bluez.refuse_connects(strap.address, 3)
    async with opened(strap_link(strap)) as link:
        assert len(set(await chunks(link, 10))) > 3
    assert bluez.calls["org.bluez.Device1.Connect"] == 4


async def test_an_operation_that_hangs_is_cleared_away(bluez: VirtualBlueZ, strap: HeartRateStrap) -> None:
    link = strap_link(strap)
    async with opened(link):
        pass
    bluez.jam(strap.address)
    with pytest.raises(UnavailableError, match="InProgress"):
        await link.open()
    async with opened(link):
        await chunks(link, 3)


async def test_slots_are_counted_and_released(bluez: VirtualBlueZ) -> None:
    straps = [HeartRateStrap(f"00:22:D0:00:00:{n:02X}", seed=n, speed=SPEED) for n in range(3)]
    for strap in straps:
        bluez.add(strap)
    first, second, third = (BleLink(strap.address, HeartRateDecoder.NOTIFY, (), slots=2) for strap in straps)
    async with opened(first):
        async with opened(second):
            with pytest.raises(UnavailableError, match="all 2 connections") as caught:
                await third.open()
            assert caught.value.hint
            bluez.drop_link(second.name)
            await rest(second)
            await second.open()
        async with opened(third):
            await chunks(third, 2)


async def test_an_absent_device_holds_up_nobody(
    bluez: VirtualBlueZ, strap: HeartRateStrap, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ble, "SCAN_S_MAX", 30.0)
    others = [HeartRateStrap(f"00:22:D0:00:00:{n:02X}", seed=n, speed=SPEED) for n in range(2)]
    absent = BleLink("00:22:D0:00:00:FF", HeartRateDecoder.NOTIFY, (), slots=2)
    looking = asyncio.create_task(absent.open())
    await until(lambda: bluez.calls["org.bluez.Adapter1.StartDiscovery"] > 0)
    links = [BleLink(other.address, HeartRateDecoder.NOTIFY, (), slots=2) for other in others]
    async with asyncio.timeout(DEADLINE_S):
        for other, link in zip(others, links, strict=True):
            bluez.add(other)
            await link.open()
            await chunks(link, 3)
        # Told of only once as long as a discovery lasts, and a discovery goes on all the time.
        bluez.drop_link(others[0].address)
        await rest(links[0])
        await links[0].open()
        await chunks(links[0], 3)
    assert not looking.done()
    looking.cancel()
    await asyncio.gather(looking, *(link.close() for link in links), return_exceptions=True)


async def test_an_adapter_over_which_nothing_connects_is_switched_off_and_on(
    bluez: VirtualBlueZ, strap: HeartRateStrap, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ble, "CONNECT_S_MAX", 0.2)
    monkeypatch.setattr(bluetoothd, "OFF_S", 0.05)
    other = HeartRateStrap("00:22:D0:00:00:02", seed=2, speed=SPEED)
    bluez.add(other)
    links = [strap_link(strap), strap_link(other)]
    bluez.wedge()
    for _ in range(radio.FAILURES_BEFORE_SWITCHING // 2):
        assert bluez.calls["org.freedesktop.DBus.Properties.Set"] == 0
        for link in links:
            with pytest.raises(UnavailableError):
                await link.open()
    assert bluez.calls["org.freedesktop.DBus.Properties.Set"] == 2
    async with opened(links[0]), opened(links[1]):
        await chunks(links[0], 2)
        # What fails from now on is not the adapter's fault.
        bluez.refuse_connects(other.address, 1_000_000)
        await links[1].close()
        for _ in range(radio.FAILURES_BEFORE_SWITCHING):
            with pytest.raises(UnavailableError):
                await links[1].open()
        await chunks(links[0], 2)
    assert bluez.calls["org.freedesktop.DBus.Properties.Set"] == 2


@asynccontextmanager
async def systemd(address: str, restart: Callable[[], Awaitable[None]] | None) -> AsyncIterator[list[list[str]]]:
    """A systemd that restarts a unit, or may not; what was asked of it."""
    bus = await MessageBus(address).connect()
    asked: list[list[str]] = []
    restarting: set[asyncio.Task[None]] = set()

    async def answer(message: Message) -> None:
        if restart is not None:
            await restart()
        await bus.send(
            Message.new_method_return(message, "o", ["/org/freedesktop/systemd1/job/1"])
            if restart is not None
            else Message.new_error(
                message,
                "org.freedesktop.DBus.Error.InteractiveAuthorizationRequired",
                "Interactive authentication required.",
            )
        )

    def hear(message: Message) -> bool:
        if message.member != "RestartUnit" or message.interface != "org.freedesktop.systemd1.Manager":
            return False
        asked.append(message.body)
        task = asyncio.create_task(answer(message))
        restarting.add(task)
        task.add_done_callback(restarting.discard)
        return True

    bus.add_message_handler(hear)
    assert await bus.request_name("org.freedesktop.systemd1") is RequestNameReply.PRIMARY_OWNER
    try:
        yield asked
    finally:
        await closed(bus)


async def failures(link: BleLink, count: int) -> list[UnavailableError]:
    """What so many attempts to connect end in."""
    errors = []
    for _ in range(count):
        with pytest.raises(UnavailableError) as caught:
            await link.open()
        errors.append(caught.value)
    return errors


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ble, "CONNECT_S_MAX", 0.1)
    monkeypatch.setattr(bluetoothd, "OFF_S", 0.01)


async def test_when_that_does_not_help_the_daemon_is_restarted(
    system_bus: str, bluez: VirtualBlueZ, strap: HeartRateStrap, impatient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def restart() -> None:
        monkeypatch.setattr(ble, "CONNECT_S_MAX", DEADLINE_S)
        await bluez.kill()
        bluez.refuse_connects(strap.address, 0)
        await bluez.restart()

    bluez.wedge(times=1000)
    link = strap_link(strap)
    async with systemd(system_bus, restart) as asked:
        errors = await failures(link, radio.FAILURES_BEFORE_RESTART)
        assert asked == [["bluetooth.service", "replace"]]
        assert not any("nothing connects" in error.message for error in errors)
        async with opened(link):
            await chunks(link, 3)
    assert bluez.calls["org.freedesktop.DBus.Properties.Set"] == 2


async def test_a_daemon_that_may_not_be_restarted_is_an_alarm(
    system_bus: str, bluez: VirtualBlueZ, strap: HeartRateStrap, impatient: None, caplog: pytest.LogCaptureFixture
) -> None:
    bluez.wedge(times=1000)
    async with systemd(system_bus, None) as asked:
        errors = await failures(strap_link(strap), radio.FAILURES_BEFORE_RESTART)
    assert len(asked) == 1
    assert ["nothing connects" in error.message for error in errors] == [False] * (len(errors) - 1) + [True]
    assert "60-wardlink-bluetooth.rules" in errors[-1].hint
    assert "Interactive authentication required" in caplog.text


async def test_a_restart_that_does_not_help_is_an_alarm(
    system_bus: str, bluez: VirtualBlueZ, strap: HeartRateStrap, impatient: None
) -> None:
    async def restart() -> None:
        await bluez.kill()
        await bluez.restart()

    bluez.wedge(times=1000)
    async with systemd(system_bus, restart):
        errors = await failures(strap_link(strap), radio.FAILURES_BEFORE_ALARM)
    assert ["restart bluetooth" in error.hint for error in errors] == [False] * (len(errors) - 1) + [True]


async def test_no_daemon_is_restarted_while_another_adapter_carries_a_link(
    system_bus: str, bluez: VirtualBlueZ, strap: HeartRateStrap, impatient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Carried:
        connected = True

    carried = Carried()
    ble._radio("hci1").holders.add(carried)
    bluez.wedge(times=1000)
    async with systemd(system_bus, None) as asked:
        await failures(strap_link(strap), radio.FAILURES_BEFORE_RESTART)
    assert asked == []


async def test_a_dying_bus_ends_the_link(monkeypatch: pytest.MonkeyPatch) -> None:
    daemon = DbusDaemon()
    await asyncio.to_thread(daemon.start)
    try:
        monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", daemon.address)
        async with VirtualBlueZ(daemon.address) as bluez:
            strap = HeartRateStrap(speed=SPEED)
            bluez.add(strap)
            async with opened(strap_link(strap)) as link:
                await chunks(link, 2)
                await asyncio.to_thread(daemon.stop)
                _, error = await rest(link)
                # Whichever of the two is noticed first.
                assert "link was lost" in error.message or "daemon is gone" in error.message
                with pytest.raises(UnavailableError, match="no D-Bus system bus"):
                    await link.open()
    finally:
        await asyncio.to_thread(daemon.stop)


async def test_a_device_that_never_lets_itself_connect(
    bluez: VirtualBlueZ, strap: HeartRateStrap, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ble, "CONNECT_S_MAX", 0.5)
    bluez.refuse_connects(strap.address, 1_000_000)
    with pytest.raises(UnavailableError, match="in time") as caught:
        await strap_link(strap).open()
    assert "le-connection-abort-by-local" in caught.value.hint
    bluez.refuse_connects(strap.address, 0)
    async with opened(strap_link(strap)) as link:
        await chunks(link, 3)


async def test_out_of_range_and_back(
    bluez: VirtualBlueZ, strap: HeartRateStrap, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ble, "SCAN_S_MAX", 0.4)
    link = strap_link(strap)
    async with opened(link):
        await chunks(link, 2)
        bluez.set_in_range(strap.address, in_range=False)
        await rest(link)
        with pytest.raises(UnavailableError, match="was not heard") as caught:
            await link.open()
        assert caught.value.hint
        bluez.set_in_range(strap.address, in_range=True)
        await link.open()
        await chunks(link, 2)


async def test_an_adapter_that_is_off_or_not_there(bluez: VirtualBlueZ, strap: HeartRateStrap) -> None:
    with pytest.raises(UnavailableError, match="no Bluetooth adapter hci7, there is hci0") as caught:
        await BleLink(strap.address, HeartRateDecoder.NOTIFY, (), adapter="hci7").open()
    assert "bluetoothctl list" in caught.value.hint
    bluez.set_powered(powered=False)
    with pytest.raises(UnavailableError, match="hci0 is off") as caught:
        await strap_link(strap).open()
    assert "power on" in caught.value.hint
    bluez.set_powered(powered=True)
    async with opened(BleLink(strap.address, HeartRateDecoder.NOTIFY, (), adapter="hci0")) as link:
        await chunks(link, 2)


async def test_no_bluetooth_daemon_and_no_bus(system_bus: str, monkeypatch: pytest.MonkeyPatch) -> None:
    link = BleLink("00:22:D0:00:00:01", HeartRateDecoder.NOTIFY, ())
    with pytest.raises(UnavailableError, match="daemon is not running"):
        await link.open()
    monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", "unix:path=/nonexistent/bus")
    with pytest.raises(UnavailableError, match="no D-Bus system bus"):
        await link.open()


async def test_a_reader_that_is_too_slow_ends_the_link(
    bluez: VirtualBlueZ, strap: HeartRateStrap, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ble, "CHUNKS_MAX", 8)
    async with opened(strap_link(strap)) as link:
        await until(lambda: bluez.delivered(strap.address, gatt.HEART_RATE_MEASUREMENT) >= 12)
        got, error = await rest(link)
        assert len(got) == 8
        assert "not read in time" in error.message


PAIRED_ONLY = Characteristic(gatt.HEART_RATE_MEASUREMENT, ("read", "notify"), b"\x00\x48", encrypted=True)


async def test_a_device_that_demands_pairing_is_paired_once(bluez: VirtualBlueZ) -> None:
    shy = Peripheral("00:22:D0:00:00:07", "Shy", [Service(gatt.HEART_RATE_SERVICE, (PAIRED_ONLY,))])
    bluez.add(shy)
    link = BleLink(shy.address, [gatt.HEART_RATE_MEASUREMENT], [gatt.HEART_RATE_MEASUREMENT])
    async with opened(link):
        assert await chunks(link, 1) == [b"\x00\x48"]
        assert bluez.paired(shy.address)
        shy.notify(gatt.HEART_RATE_MEASUREMENT, b"\x00\x49")
        assert await chunks(link, 1) == [b"\x00\x49"]
    await bluez.kill()
    await bluez.restart()
    assert bluez.paired(shy.address), "the bond is kept"
    # No agent is needed any more.
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("gateway.links.pairing.AGENT_MANAGER_PATH", "/nobody")
        async with opened(link):
            assert await chunks(link, 1) == [b"\x00\x49"]


async def test_without_an_agent_there_is_a_hint(bluez: VirtualBlueZ, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.links.pairing.AGENT_MANAGER_PATH", "/nobody")
    shy = Peripheral("00:22:D0:00:00:07", "Shy", [Service(gatt.HEART_RATE_SERVICE, (PAIRED_ONLY,))])
    bluez.add(shy)
    with pytest.raises(UnavailableError, match="Not paired") as caught:
        await BleLink(shy.address, [gatt.HEART_RATE_MEASUREMENT], ()).open()
    assert "pairing mode" in caught.value.hint


async def test_a_device_that_nobody_expects_may_not_pair(bluez: VirtualBlueZ, strap: HeartRateStrap) -> None:
    shy = Peripheral("00:22:D0:00:00:07", "Shy", [Service(gatt.HEART_RATE_SERVICE, (PAIRED_ONLY,))])
    bluez.add(shy)
    path = f"/org/bluez/hci0/dev_{shy.address.replace(':', '_')}"
    stranger = await MessageBus(bus_type=BusType.SYSTEM).connect()
    async with opened(strap_link(strap)) as link:
        # Somebody else's program reads it while this one is the pairing agent of the host.
        adapter = Message("org.bluez", "/org/bluez/hci0", "org.bluez.Adapter1", "StartDiscovery")
        await stranger.call(adapter)
        reading = Message(
            "org.bluez",
            f"{path}/service0010/char0013",
            "org.bluez.GattCharacteristic1",
            "ReadValue",
            signature="a{sv}",
            body=[{}],
        )
        await until(lambda: bluez.known(shy.address))
        await stranger.call(Message("org.bluez", path, "org.bluez.Device1", "Connect"))
        await until(lambda: bluez.settled(shy.address))
        answer = await stranger.call(reading)
        assert answer.body == ["Not paired"]
        await chunks(link, 2)
    assert not bluez.paired(shy.address)
    await closed(stranger)


class Recorder(Peripheral):
    """Remembers what it is written and answers on another characteristic; refuses what begins with 0xff."""

    def __init__(self, **options: int) -> None:
        control = Characteristic(CONTROL, ("write-without-response", "notify"))
        response = Characteristic(RESPONSE, ("notify", "read", "write"), b"idle")
        super().__init__(
            "00:55:DA:B0:00:01", "Recorder", [Service("0000fe8d" + CONTROL[8:], (control, response))], **options
        )
        self.written: list[tuple[str, bytes]] = []

    def write(self, uuid: str, value: bytes) -> None:
        if value.startswith(b"\xff"):
            raise AttributeRefusedError(0x80)
        self.written.append((uuid, value))
        self.notify(RESPONSE, value[::-1])


async def test_writing(bluez: VirtualBlueZ) -> None:
    recorder = Recorder()
    bluez.add(recorder)
    async with opened(BleLink(recorder.address, [RESPONSE, CONTROL.upper()], [RESPONSE])) as link:
        assert await chunks(link, 1, RESPONSE) == [b"idle"]
        await link.write(b"\x02d\n", CONTROL)
        assert await chunks(link, 1, RESPONSE) == [b"\nd\x02"]
        await link.write(b"ab", RESPONSE)
        assert await chunks(link, 1, RESPONSE) == [b"ba"]
        assert recorder.written == [(CONTROL, b"\x02d\n"), (RESPONSE, b"ab")]
        with pytest.raises(UnavailableError, match="no characteristic"):
            await link.write(b"ab", gatt.BATTERY_LEVEL)
        with pytest.raises(UnavailableError, match="Protocol Error"):
            await link.write(b"\xff", RESPONSE)
    with pytest.raises(UnavailableError, match="not open"):
        await link.write(b"ab", CONTROL)


@pytest.mark.parametrize("known", [True, False])
async def test_a_write_over_a_lost_link_leaves_what_came_before(bluez: VirtualBlueZ, known: bool) -> None:
    recorder = Recorder()
    bluez.add(recorder)
    link = BleLink(recorder.address, [RESPONSE], ())
    async with opened(link):
        for number in range(3):
            recorder.notify(RESPONSE, bytes([number]))
        bluez.drop_link(recorder.address)
        if known:
            await until(lambda: not link.connected)
        await link.write(b"ab", RESPONSE)
        got, error = await rest(link)
        assert [chunk.data for chunk in got] == [b"\x00", b"\x01", b"\x02"]
        assert recorder.written == []
        assert error.hint


async def test_a_write_that_no_packet_can_carry(bluez: VirtualBlueZ) -> None:
    recorder = Recorder(mtu_bytes=40)
    bluez.add(recorder)
    async with opened(BleLink(recorder.address, [RESPONSE], ())) as link:
        with pytest.raises(UnavailableError, match="37 bytes at a time, not 38"):
            await link.write(bytes(38), CONTROL)
        await link.write(bytes(37), CONTROL)
        # With a response there is a way for longer ones; what is notified is cut.
        await link.write(bytes(50), RESPONSE)
        assert [len(each) for each in await chunks(link, 2, RESPONSE)] == [37, 37]
    assert [len(value) for _, value in recorder.written] == [37, 50]


async def test_the_main_characteristic_must_be_there_and_the_others_may_be_missing(bluez: VirtualBlueZ) -> None:
    recorder = Recorder()
    bluez.add(recorder)
    async with opened(BleLink(recorder.address, [RESPONSE, gatt.BATTERY_LEVEL], [gatt.MODEL_NUMBER, CONTROL])):
        pass
    with pytest.raises(UnavailableError, match="no characteristic 00002a37"):
        await BleLink(recorder.address, HeartRateDecoder.NOTIFY, ()).open()
    await until(lambda: not bluez.connected(recorder.address))


async def test_closing_any_number_of_times_in_any_state(bluez: VirtualBlueZ, strap: HeartRateStrap) -> None:
    link = strap_link(strap)
    assert link.name == strap.address
    await link.close()
    with pytest.raises(UnavailableError, match="not open"):
        await link.read()
    await link.open()
    reading = asyncio.create_task(rest(link))
    await asyncio.gather(link.close(), link.close())
    _, error = await reading
    assert "closed" in error.message
    await link.close()
    assert not bluez.connected(strap.address)


async def test_a_cancelled_open_leaves_no_link(bluez: VirtualBlueZ, strap: HeartRateStrap) -> None:
    link = strap_link(strap)
    opening = asyncio.create_task(link.open())
    await until(lambda: bluez.connected(strap.address))
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening
    await until(lambda: not bluez.connected(strap.address))
    async with opened(link):
        await chunks(link, 2)


def test_one_event_loop_after_the_other(dbus_daemon: DbusDaemon, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in dbus_daemon.environment().items():
        monkeypatch.setenv(name, value)

    async def session() -> int:
        async with VirtualBlueZ(dbus_daemon.address) as bluez:
            strap = HeartRateStrap(speed=SPEED)
            bluez.add(strap)
            async with opened(strap_link(strap)) as link:
                return len(await chunks(link, 5))

    assert [asyncio.run(session()) for _ in range(3)] == [5, 5, 5]


def test_a_link_needs_something_to_subscribe_to() -> None:
    with pytest.raises(ValueError, match="subscribe"):
        BleLink("00:22:D0:00:00:01", (), ())
