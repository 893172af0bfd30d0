"""Which replica a request goes to."""

from __future__ import annotations

import random
from collections.abc import Callable
from heapq import heapify, heappop, heappush
from typing import Protocol


class Router(Protocol):
    """Chooses replicas, by when each would be through with what it has."""

    def choose(self, now: float) -> int:
        """The number of the replica that gets the next request."""

    def tell(self, replica: int, until: float) -> None:
        """A replica would be through at this time, at the pace of full steps."""


class RoundRobin:
    """They take turns."""

    def __init__(self, replicas: int, chance: random.Random) -> None:
        self._replicas = replicas
        self._next = -1

    def choose(self, now: float) -> int:
        self._next = (self._next + 1) % self._replicas
        return self._next

    def tell(self, replica: int, until: float) -> None:
        pass


class LeastWork:
    """The one with the least work left; of idle ones, the one that has been idle for longest."""

    def __init__(self, replicas: int, chance: random.Random) -> None:
        self._until = [0.0] * replicas
        self._heap = [(0.0, replica) for replica in range(replicas)]  # what is out of date goes when it is met

    def choose(self, now: float) -> int:
        while self._heap[0][0] != self._until[self._heap[0][1]]:
            heappop(self._heap)
        return self._heap[0][1]

    def tell(self, replica: int, until: float) -> None:
        if until == self._until[replica]:
            return
        self._until[replica] = until
        heappush(self._heap, (until, replica))
        if len(self._heap) > 8 * len(self._until) + 64:
            self._heap = [(until, replica) for replica, until in enumerate(self._until)]
            heapify(self._heap)


class TwoChoices:
    """Two are drawn, and the one with less work left is taken: the power of two choices."""

    def __init__(self, replicas: int, chance: random.Random) -> None:
        self._until = [0.0] * replicas
        self._chance = chance

    def choose(self, now: float) -> int:
        count, chance = len(self._until), self._chance.random
        first = int(count * chance())
        second = (first + 1 + int((count - 1) * chance())) % count
        return first if self._until[first] <= self._until[second] else second

    def tell(self, replica: int, until: float) -> None:
        self._until[replica] = until


ROUTERS: dict[str, Callable[[int, random.Random], Router]] = {
    "round-robin": RoundRobin,
    "least-work": LeastWork,
    "two-choices": TwoChoices,
}
