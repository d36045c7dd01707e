"""The one thread in which a store is used, and how the event loop waits for it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


class StoreThread:
    """Carries out one call after the other."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="outbox")

    async def run(self, call: Callable[..., T], *arguments: object) -> T:
        """Wait for a call. A step that has begun cannot be called back: cancelling waits for its end."""
        step = asyncio.get_running_loop().run_in_executor(self._pool, call, *arguments)
        try:
            return await asyncio.shield(step)
        except asyncio.CancelledError:
            while not step.done():
                with contextlib.suppress(asyncio.CancelledError):  # the first one is on its way already
                    await asyncio.wait({step})
            if not step.cancelled():
                step.exception()  # an unseen failure is no news: its rows are still pending
            raise

    def shutdown(self, *, wait: bool = False) -> None:
        """No more calls."""
        self._pool.shutdown(wait=wait)
