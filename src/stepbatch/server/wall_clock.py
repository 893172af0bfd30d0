"""Unix time for what outlives this process, and what of it can be relied on when somebody sets the clock meanwhile."""

from __future__ import annotations

import time
from collections.abc import Callable


class WallClock:
    """Unix seconds. Where the clock was set since the start, ``earliest`` and ``latest`` go by what it was before too.

    Args:
        now: Unix seconds.
        passed: Seconds that only grow.
    """

    def __init__(self, now: Callable[[], float] = time.time, passed: Callable[[], float] = time.monotonic) -> None:
        self.now = now
        self._passed = passed
        self._start = now() - passed()

    def earliest(self) -> float:
        """What has expired by this has expired, though the clock was set forward."""
        return min(self.now(), self._start + self._passed())

    def latest(self) -> float:
        """What lives for a while from here lives that long, though the clock was set back."""
        return max(self.now(), self._start + self._passed())
