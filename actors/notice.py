"""Waiting until something has changed, in whatever event loop one happens to wait in."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from h1r_rl.deadlines import within


class Notice:
    def __init__(self) -> None:
        self._waiters: list[asyncio.Future[None]] = []
        self._listeners: list[Callable[[], None]] = []

    def listen(self, listener: Callable[[], None]) -> None:
        self._listeners.append(listener)

    def give(self) -> None:
        """Something changed: whoever waits looks again."""
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)
        for listener in self._listeners:
            listener()

    async def next(self, seconds: float) -> None:
        """Wait for a change, or for the time to pass."""
        try:
            await within(self._waiter(), seconds, "a change")
        except TimeoutError:
            pass

    async def until(self, predicate: Callable[[], bool], seconds: float, what: str) -> None:
        """Wait for a state in which `predicate` holds, or raise TimeoutError."""
        end = time.monotonic() + seconds
        while not predicate():
            await within(self._waiter(), max(end - time.monotonic(), 0.0), what)

    def _waiter(self) -> asyncio.Future[None]:
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        return waiter
