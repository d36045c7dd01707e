"""A ward in virtual time: gateways with their wearables, a broker, two bridges, two stores, and what fails of them.

Gateway and bridge are the house's own, put together by their own composition roots.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import traceback
from collections.abc import Iterable
from contextvars import Context, copy_context
from functools import partial
from pathlib import Path
from typing import Any

import cloud_sync.app
import gateway.app
from cloud_sync import consumer
from cloud_sync.registry import admin
from gateway.errors import RefusedError
from gateway.samples import LOSS
from tests.simulation.books import Books, Stream
from tests.simulation.broker import Broker
from tests.simulation.host import HOST, Host, Network, SystemClock
from tests.simulation.machines import BYTES_MAX, WINDOW_BYTES_MAX, BridgeMachine, GatewayMachine, Running
from tests.simulation.stores import ModelDatabase, RegistryServer, SeriesServer, stored_points
from tests.simulation.virtual_loop import VirtualLoop
from tests.simulation.wearables import HEADSET_SIGNALS, PERIOD_S, STRAP_SIGNALS, Wearable

SAVE_S = 1800.0
"""Between two times that the broker writes its state to disk, as mosquitto does."""
ROWS_SENT_MAX = 500
"""Rows that are remembered as sent: no more than what is held, and what was given up meanwhile."""
LOOK_S = 6 * 3600.0
"""Between two looks at what is held in memory."""
DRAIN_S_MAX = 6 * 3600.0
"""After the last fault everything is where it belongs by then: a few times `RESEND_AFTER_S`, and the back-offs."""


class World:
    """Everything, and the loop that it lives in."""

    def __init__(self, seed: object, folder: Path, conninfo: str, loop: VirtualLoop) -> None:
        self.seed = seed
        self.loop = loop
        self.books = Books(loop.time)
        self.broker = Broker(loop, self.rng("broker"))
        self.broker_saves_not = 0
        self.series = SeriesServer(self.rng("series"), self.books)
        self.registry = RegistryServer(conninfo, self.rng("registry"), loop)
        self.gateways: list[GatewayMachine] = []
        for number in (1, 2):
            wearables = [
                Wearable(f"{kind}-{number}", signals, PERIOD_S * number / 3, self.rng(f"{kind} {number}"), self.books)
                for kind, signals in (("HEADSET", HEADSET_SIGNALS), ("STRAP", STRAP_SIGNALS))
            ]
            self.gateways.append(GatewayMachine(self, f"gateway-{number}", folder, wearables))
        self.bridges = [BridgeMachine(self, f"bridge-{number}") for number in (1, 2)]
        self.serials: dict[str, str] = {}
        """Device id -> serial, of those that are registered."""
        self._ids: dict[str, str] = {}
        self._series_of: dict[Stream, list[dict[int, bytes]]] = {}
        self.outside = Host("outside", loop, Network(self.rng("outside"), (0.001, 0.002)), SystemClock())
        self._tasks: set[asyncio.Task[Any]] = set()
        self.books.is_stored = self._is_stored

    def rng(self, of: str) -> random.Random:
        """Numbers of its own for each part: what one part draws changes nothing for another."""
        return random.Random(f"{self.seed} {of}")

    def on(self, host: Host) -> Context:
        """A context in which `time` is that host's."""
        context = copy_context()
        context.run(HOST.set, host)
        return context

    def task(self, host: Host, life: Any) -> asyncio.Task[Any]:
        """Run something on a host; it is a breach if that fails while the host runs."""
        task = self.loop.create_task(life, context=self.on(host), name=host.name)
        task.add_done_callback(partial(self._ended, host))
        return task

    def _ended(self, host: Host, task: asyncio.Task[Any]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None and not host.is_dead:
            self.books.trouble(f"{host.name} ended: {''.join(traceback.format_exception(error))}")

    def end(self, running: Running, *, is_silent: bool) -> None:
        """End a service with no effect of its last steps on anybody else."""
        running.host.is_dead = True
        for line in list(running.host.lines):
            line.abandon(is_silent=is_silent)
        running.task.cancel()
        self._tasks.add(running.task)

    # --- the run

    async def open(self) -> None:
        """A ward with two patients; the second headset is not registered yet."""
        HOST.set(self.outside)
        database = ModelDatabase(self.registry)
        await database.open()
        async with database.connection() as connection:
            await admin.add_organization(connection, "ward")
            for gateway_machine in self.gateways:
                await admin.add_patient(connection, "ward", gateway_machine.name)
        for gateway_machine in self.gateways:
            for wearable in gateway_machine.wearables:
                if wearable.serial != self.unknown_serial:
                    await self.register(wearable.serial)
                self._spawn(wearable.run())
        self._spawn(self._save_broker())
        self._spawn(self._look())
        for machine in [*self.bridges, *self.gateways]:
            machine.start()

    @property
    def unknown_serial(self) -> str:
        """A device that sends before anybody knows it."""
        return "HEADSET-2"

    async def register(self, serial: str) -> None:
        """Register a device and give it to the patient of its gateway."""
        kind = "eeg_headset" if serial.startswith("HEADSET") else "hr_strap"
        patient = f"gateway-{serial[-1]}"
        database = ModelDatabase(self.registry)
        await database.open()
        async with database.connection() as connection:
            with contextlib.suppress(RefusedError):  # it is there: the answer to the first try was lost
                await admin.add_device(connection, serial, org="ward", device_type=kind, patient=patient)
            device, _ = await admin.device_row(connection, serial)
        self.serials[str(device)] = serial
        self._ids[serial] = str(device)
        self.books.note(f"{serial} is registered")

    def _spawn(self, life: Any) -> None:
        self._tasks.add(self.task(self.outside, life))

    async def _save_broker(self) -> None:
        while True:
            await asyncio.sleep(SAVE_S)
            if self.broker.is_up and not self.broker_saves_not:
                self.broker.save()

    async def close_down(self) -> None:
        """After the last fault: no more data, everything drains, everything stops in order."""
        for machine in self.gateways:
            for wearable in machine.wearables:
                wearable.is_worn = False
        self.books.note("the wearables are taken off")
        deadline_s = self.loop.time() + DRAIN_S_MAX
        while not self._is_drained():
            if self.loop.time() > deadline_s:
                self.books.trouble(f"not drained {DRAIN_S_MAX / 3600:.0f} h after the last fault: {self._undrained()}")
                break
            await asyncio.sleep(60.0)
        self.books.note("drained")
        for machine in self.gateways:
            await machine.shut_down()
        await asyncio.sleep(600.0)  # for what the gateways said at the end
        for bridge in self.bridges:
            await bridge.shut_down()

    def _is_drained(self) -> bool:
        return not self._undrained()

    def _undrained(self) -> str:
        """What is not where it belongs."""
        left = []
        for machine in self.gateways:
            if machine.running is None:
                left.append(f"{machine.name} is off")
                continue
            kept = machine.running.service.outbox
            if not kept.empty.is_set():
                left.append(f"{machine.name} holds {kept.holding.rows} rows")
            book = self.books
            left += [
                f"{device} {signal} is not committed"
                for device, signal in machine.streams
                if book.stream(device, signal).handed.keys()
                - book.stream(device, signal).numbers
                - book.stream(device, signal).forgone
            ]
        if self.registry.real.execute("SELECT EXISTS (SELECT FROM parked_messages)").fetchone() != (False,):
            left.append("messages are parked")
        if self.broker.waiting_count:
            left.append(f"the broker holds {self.broker.waiting_count} messages")
        return ", ".join(left)

    async def end_tasks(self) -> None:
        """Let everything that still runs end."""
        running = [machine.running for machine in [*self.gateways, *self.bridges] if machine.running is not None]
        for one in running:
            self.end(one, is_silent=False)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # --- invariants

    def _is_stored(self, stream: Stream, time_ns: int) -> bool:
        """Whether a sample is in the store, or waits for its device to be registered, durably."""
        device = self._ids.get(stream[0])
        if device is not None:
            found = self._series_of.get(stream)
            if found is None or not any(time_ns in points for points in found):
                found = [
                    points
                    for series, points in self.series.points.items()
                    if f"device_id={device}".encode() in series and f"signal_type={stream[1]}".encode() in series
                ]
                self._series_of[stream] = found
            if any(time_ns in points for points in found):
                return True
        row = self.registry.real.execute(
            "SELECT EXISTS (SELECT FROM parked_messages WHERE device_serial = %s AND signal = %s "
            "AND %s::numeric BETWEEN floor(extract(epoch FROM first_at) * 1000000) * 1000 "
            "AND floor(extract(epoch FROM last_at) * 1000000) * 1000 + 999)",
            (*stream, time_ns),
        ).fetchone()
        return row == (True,)

    async def _look(self) -> None:
        """What is held in memory is bounded, at any time."""
        while True:
            await asyncio.sleep(LOOK_S)
            for machine in self.gateways:
                if machine.running is not None and machine.running.service.uplink is not None:
                    self._look_at_gateway(machine.name, machine.running.service)
            for bridge in self.bridges:
                if bridge.running is not None:
                    self._look_at_bridge(bridge.name, bridge.running.service)

    def _look_at_gateway(self, name: str, service: gateway.app.Gateway) -> None:
        holding, uplink = service.outbox.holding, service.uplink
        assert uplink is not None
        rows = holding.rows
        bounds = {
            "bytes under way": (uplink.sender._window.bytes_under_way, 2 * WINDOW_BYTES_MAX),
            "rows sent": (len(uplink.sender._unreceipted), ROWS_SENT_MAX),
            "failures": (len(uplink.sender._failures), rows),
            "spans of backlog": (len(uplink.sender._lanes._backlog), rows + 1),
            "receipts": (uplink._inbox.qsize(), 100),
            "bytes in the outbox": (holding.size, BYTES_MAX + BYTES_MAX // 8),
        }
        self._check_bounds(name, bounds)

    def _look_at_bridge(self, name: str, service: cloud_sync.app.Bridge) -> None:
        self._check_bounds(
            name,
            {
                "messages": (len(service.consumer._waiting), consumer.RECEIVE_MAXIMUM),
                "receipts": (len(service.consumer._unanswered), consumer.RECEIPTS_UNANSWERED_MAX),
                "bindings": (len(service.bindings._known), sum(len(machine.streams) for machine in self.gateways)),
            },
        )

    def _check_bounds(self, name: str, bounds: dict[str, tuple[int, int]]) -> None:
        for what, (count, count_max) in bounds.items():
            if count > count_max:
                self.books.trouble(f"{name} holds {count} {what}, at most {count_max} are in order")

    def close_books(self) -> None:
        """Compare everything with everything, at the end."""
        ask = self.registry.real.execute
        stored = dict(stored_points(self.series, self.serials))
        counted = {
            (serial, signal): count
            for serial, signal, count in ask(
                "SELECT d.serial, t.code, sum(s.point_count)::bigint FROM signal_streams s "
                "JOIN devices d ON d.id = s.device_id JOIN signal_types t ON t.id = s.signal_type_id GROUP BY 1, 2"
            ).fetchall()
        }
        recorded: dict[Stream, dict[str, int]] = {}
        for serial, signal, cause, count in ask(
            "SELECT device_serial, signal, cause, sum(sample_count)::bigint FROM stream_gaps "
            "WHERE outcome IS DISTINCT FROM 'arrived' AND outcome IS DISTINCT FROM 'recorded' GROUP BY 1, 2, 3"
        ).fetchall():
            recorded.setdefault((serial, signal), {})[cause] = count
        for stream in sorted({*self.books.streams, *stored}):
            if stream[1] != LOSS:
                gateway = next(machine.name for machine in self.gateways if stream in machine.streams)
                self.books.check_stream(
                    stream,
                    stored.get(stream, {}),
                    counted.get(stream, 0),
                    recorded.get(stream, {}),
                    is_disturbed=gateway in self.books.disturbed,
                )
        self._check_ledger()
        for table in ("parked_messages", "dead_letters"):
            ((count,),) = ask(f"SELECT count(*) FROM {table}").fetchall()
            if count:
                self.books.trouble(f"{count} rows are left in {table}")

    def _check_ledger(self) -> None:
        """The ledger's holes are the blocks that were given up, and those of a lost disk, which are gaps on record."""
        ask = self.registry.real.execute
        committed = _sequences(
            ask("SELECT device_serial, signal, epoch, lower(run), upper(run) FROM ledger, unnest(committed) AS run")
        )
        gaps = _sequences(
            ask(
                "SELECT device_serial, signal, epoch, lower(sequences), upper(sequences) FROM stream_gaps "
                "WHERE outcome = 'lost' AND epoch IS NOT NULL"
            )
        )
        accepted: dict[tuple[str, str, str], set[int]] = {}
        for *key, sequence in [*self.books.blocks, *self.books.losses, *self.books.shed]:
            accepted.setdefault((key[0], key[1], key[2]), set()).add(sequence)
        for key, sequences in accepted.items():
            here = committed.get(key, set())
            holes = {one for one in sequences - here if (*key, one) not in self.books.shed}
            if unexplained := [one for one in holes if (*key, one) not in self.books.gone]:
                self.books.trouble(f"the ledger lacks {len(unexplained)} blocks of {key}: {sorted(unexplained)[:5]}")
            newest = max(here, default=-1)
            if silent := [one for one in holes - gaps.get(key, set()) if one < newest]:
                self.books.trouble(f"blocks {sorted(silent)[:5]} of {key} went with a disk and are on no record")
            if unheard := here - sequences:
                self.books.trouble(f"the ledger has blocks of {key} that nobody accepted: {sorted(unheard)[:5]}")
        ((count,),) = ask("SELECT count(*) FROM stream_gaps WHERE closed_at IS NULL").fetchall()
        if count:
            self.books.trouble(f"{count} gaps are still open")


def _sequences(rows: Iterable[tuple[Any, ...]]) -> dict[tuple[str, str, str], set[int]]:
    """Of each device, signal and epoch all that is in ranges [first, stop)."""
    found: dict[tuple[str, str, str], set[int]] = {}
    for device, signal, epoch, first, stop in rows:
        found.setdefault((device, signal, epoch), set()).update(range(first, stop))
    return found
