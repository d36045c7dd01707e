"""Opens a TCP or TLS connection as a non-blocking socket, for libraries that want one.

Everything can be cancelled at any moment and leaves nothing behind: names are looked up in a daemon thread that nobody
waits for (the resolver cannot be interrupted), connecting and the TLS handshake are the event loop's.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import threading
from collections.abc import Callable
from typing import Any

ADDRESSES_MAX = 4
"""A name may have many addresses; each that is tried gets its share of the time."""
UNACKNOWLEDGED_S_MAX = 10.0
"""A peer that confirms nothing of what was sent for so long is gone (TCP_USER_TIMEOUT). The system's own patience is a
quarter of an hour. This finds a dead link even while nothing is read, when no answer can be waited for."""
UNSENT_BYTES_MAX = 16 << 10
"""What the kernel takes beyond what it has sent (TCP_NOTSENT_LOWAT): a quarter of a second at 0.5 Mbit/s. Its own limit
is megabytes, which nothing can overtake."""

_Address = tuple[Any, ...]


async def open_socket(host: str, port: int, *, tls: ssl.SSLContext | None, timeout_s: float) -> socket.socket:
    """Connect to the first address of `host` that answers; with `tls` the handshake is done and `host` verified.

    Raises `OSError` (`socket.gaierror`, `ssl.SSLError`, `TimeoutError`…) or `ValueError` for an impossible host name.
    """
    async with asyncio.timeout(timeout_s):
        addresses = (await _look_up(host, port))[:ADDRESSES_MAX]
    failure = OSError(f"no address for {host!r}")
    for family, address in addresses:
        try:
            async with asyncio.timeout(timeout_s / len(addresses)):
                return await _open(family, address, host, tls)
        except OSError as error:
            failure = error
    raise failure


async def _open(family: int, address: _Address, host: str, tls: ssl.SSLContext | None) -> socket.socket:
    plain = socket.socket(family, socket.SOCK_STREAM)
    try:
        plain.settimeout(0)
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(UNACKNOWLEDGED_S_MAX * 1000))
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES_MAX)
        await asyncio.get_running_loop().sock_connect(plain, address)
        return plain if tls is None else await _shake_hands(plain, host, tls)
    except BaseException:
        plain.close()
        raise


async def _shake_hands(plain: socket.socket, host: str, tls: ssl.SSLContext) -> ssl.SSLSocket:
    loop = asyncio.get_running_loop()
    secure = tls.wrap_socket(plain, server_hostname=host, do_handshake_on_connect=False)
    try:
        while True:
            try:
                secure.do_handshake()
            except ssl.SSLWantReadError:
                await _ready(secure, loop.add_reader, loop.remove_reader)
            except ssl.SSLWantWriteError:
                await _ready(secure, loop.add_writer, loop.remove_writer)
            else:
                return secure
    except BaseException:
        secure.close()
        raise


async def _ready(sock: socket.socket, watch: Callable[..., object], unwatch: Callable[[int], object]) -> None:
    ready = asyncio.get_running_loop().create_future()
    descriptor = sock.fileno()
    watch(descriptor, _settle, ready)
    try:
        await ready
    finally:
        unwatch(descriptor)


def _settle(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


async def _look_up(host: str, port: int) -> list[tuple[int, _Address]]:
    with contextlib.suppress(socket.gaierror):
        return _addresses(host, port, socket.AI_NUMERICHOST)
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[list[tuple[int, _Address]]] = loop.create_future()

    def settle(found: list[tuple[int, _Address]] | None, error: Exception | None) -> None:
        if answer.done():
            return
        if found is not None:
            answer.set_result(found)
        elif error is not None:
            answer.set_exception(error)

    def ask() -> None:
        found, failure = None, None
        try:
            found = _addresses(host, port, 0)
        except (OSError, ValueError) as error:
            failure = error
        with contextlib.suppress(RuntimeError):  # the loop may be closed by now
            loop.call_soon_threadsafe(settle, found, failure)

    threading.Thread(target=ask, name="wardlink-resolver", daemon=True).start()
    return await answer


def _addresses(host: str, port: int, flags: int) -> list[tuple[int, _Address]]:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=flags)
    return [(family, address) for family, _type, _protocol, _name, address in found]
