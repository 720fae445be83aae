"""Waiting with a deadline: nothing in this system waits for ever."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

T = TypeVar("T")


async def within(awaitable: Awaitable[T], seconds: float, what: str) -> T:
    """Await, or raise TimeoutError that says what was awaited and for how long."""
    try:
        return await asyncio.wait_for(awaitable, seconds)
    except TimeoutError:
        raise TimeoutError(f"{what} took longer than its deadline of {seconds:g} s") from None
