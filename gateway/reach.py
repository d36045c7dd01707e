"""How a configured device is reached: its driver, and what makes a link to it. Libraries are loaded only where needed.

Most drivers know what their device gives. What a recording, a BrainFlow board or an LSL stream gives, it says itself:
it is asked first, and the driver is completed with the answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from gateway.devices.registry import DRIVERS, Characteristics, Driver, LinkKind, SerialLine
from gateway.links.base import Link
from gateway.settings import Bluetooth, Device

ANY_ADAPTER = Bluetooth()


@dataclass(frozen=True, slots=True)
class Reach:
    """What an acquisition needs to read a device."""

    driver: Driver
    link: Callable[[], Link]


async def reach(device: Device, bluetooth: Bluetooth = ANY_ADAPTER) -> Reach:
    """Find out how to read a device. Raises `UnavailableError` where it must be asked and is away, `ConfigError`."""
    driver = DRIVERS[device.driver]
    match driver.link:
        case LinkKind.FILE:
            return await asyncio.to_thread(_replay, device, driver)
        case LinkKind.BRAINFLOW:
            return await asyncio.to_thread(_brainflow, device, driver)
        case LinkKind.LSL:
            return await asyncio.to_thread(_lsl, device, driver)
    return Reach(driver, link_maker(device, bluetooth))


def link_maker(device: Device, bluetooth: Bluetooth = ANY_ADAPTER) -> Callable[[], Link]:
    """What makes a new link to a serial or BLE device for every connection."""
    line = DRIVERS[device.driver].line
    if isinstance(line, SerialLine):
        from gateway.links.serial_port import SerialLink  # noqa: PLC0415

        assert device.port is not None
        return partial(SerialLink, device.port, line.baud_rate, parity=line.parity, flow_control=line.flow_control)
    from gateway.links.ble import BleLink  # noqa: PLC0415

    assert isinstance(line, Characteristics)
    assert device.address is not None
    return partial(BleLink, device.address.upper(), line.notify, line.read, bluetooth.adapter, slots=bluetooth.slots)


def _replay(device: Device, driver: Driver) -> Reach:
    from gateway.devices.replay import load  # noqa: PLC0415
    from gateway.links.replay import ReplayLink  # noqa: PLC0415

    assert device.file is not None
    played = load(device.file)
    # one link for all connections: it knows whether the recording was played to its end
    link = ReplayLink(played.name, played.parts, played.duration_ns, paced=device.paced, repeat=device.repeat)
    return Reach(replace(driver, decoder=lambda _options: played.new_decoder()), lambda: link)


def _brainflow(device: Device, driver: Driver) -> Reach:
    from gateway.devices.brainflow_board import BrainFlowDecoder  # noqa: PLC0415
    from gateway.links.brainflow_link import BoardAddress, BrainFlowLink, board_description  # noqa: PLC0415

    board = device.board_id
    assert board is not None
    description = board_description(board)
    place = BoardAddress(serial_port=device.port or "", mac_address=device.address or "")
    return Reach(
        replace(driver, decoder=lambda options: BrainFlowDecoder(description, board, options.electrodes)),
        lambda: BrainFlowLink(board, place),
    )


def _lsl(device: Device, driver: Driver) -> Reach:
    from gateway.devices.lsl import LslDecoder  # noqa: PLC0415
    from gateway.links.lsl_link import LslLink, describe_stream  # noqa: PLC0415

    assert device.stream is not None
    found = describe_stream(device.stream)
    channels = device.channels or found.channels
    return Reach(
        replace(driver, decoder=lambda _options: LslDecoder(found.kind, found.rate_hz, channels, found.units)),
        lambda: LslLink(found.name, len(channels), found.rate_hz),
    )
