"""Work that is given up when something else comes first."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

AGAIN = 1.0  # seconds after which what was cancelled, and goes on, is cancelled again: libraries swallow it at times


async def done_before(end: Coroutine[Any, Any, Any], work: Coroutine[Any, Any, T]) -> tuple[T] | None:
    """What ``work`` returns or raises; ``None`` if ``end`` is done before it. What isn't done by then is cancelled."""
    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(end)
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        return (task.result(),) if task.done() else None
    finally:
        for one in (task, watch):
            while not one.done():
                one.cancel()
                await asyncio.wait((one,), timeout=AGAIN)
        await asyncio.gather(task, watch, return_exceptions=True)
