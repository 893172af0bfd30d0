"""How the event loop does: how late it was, and how many tasks it has."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

PERIOD_SECONDS = 0.05


class LoopWatch:
    """Looks again and again at how much later than due it is called."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None  # only while it is watched
        self._due = 0.0  # monotonic seconds
        self._worst = 0.0

    @asynccontextmanager
    async def watching(self) -> AsyncIterator[None]:
        """Watch the loop that this is called on, for as long as the context is not left."""
        self._loop, self._due = asyncio.get_running_loop(), time.monotonic() + PERIOD_SECONDS
        task = asyncio.create_task(self._watch(), name="event loop watch")
        try:
            yield
        finally:
            self._loop = None
            task.cancel()
            await asyncio.wait({task})

    def take_lag(self) -> float:
        """How late it was at worst, seconds, since this was last asked."""
        lag, self._worst = max(self._worst, self._late()), 0.0
        return lag

    def tasks(self) -> int:
        """How many tasks there are, the one that watches included."""
        return len(asyncio.all_tasks(self._loop)) if self._loop else 0

    def _late(self) -> float:
        return max(0.0, time.monotonic() - self._due) if self._loop else 0.0

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(max(0.0, self._due - time.monotonic()))
            self._worst = max(self._worst, self._late())
            self._due = time.monotonic() + PERIOD_SECONDS
