"""Requests, a router and replicas on one clock, from event to event."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush

from stepbatch.bench.simulate.kinds import Kind
from stepbatch.bench.simulate.replica import Replica
from stepbatch.bench.simulate.routing import ROUTERS
from stepbatch.config import BatchingConfig
from stepbatch.engine.cost import Costs
from stepbatch.request import Job, JobState


@dataclass(frozen=True, kw_only=True)
class Fleet:
    """The machines of a simulation."""

    limits: BatchingConfig
    pace: float  # work a second of a replica's steps, as wide as they may be
    replicas: int = 1
    routing: str = "round-robin"
    max_queue_seconds: float = math.inf  # of work at full pace; what finds more at its replica is refused


@dataclass(eq=False)
class Course:
    """What became of each request, by its index, and what the replicas did. Seconds since the start."""

    came: list[float]
    ended: list[float]  # nan for those that were refused or dropped
    refused: int = 0
    dropped: int = 0  # their deadline could not be met any more
    busy: float = 0.0  # seconds of replicas
    widths: Counter[int] = field(default_factory=Counter)  # jobs in a step -> steps
    duration: float = 0.0  # until the last one ended


class Simulation:
    """Runs requests to their ends, each of which comes once.

    Args:
        kinds: Of each request.
        times: When each comes, seconds, ascending; ``None`` where each comes as soon as another has ended.
        costs: What everything takes.
        fleet: The machines.
        concurrency: How many are there at once, where there are no times.
        seed: Of the router's choices.
        leaps: As ``Replica`` has it.
    """

    def __init__(
        self,
        kinds: Sequence[Kind],
        times: Sequence[float] | None,
        costs: Costs,
        fleet: Fleet,
        *,
        concurrency: int = 0,
        seed: int = 0,
        leaps: bool = True,
    ) -> None:
        assert (times is None) == (concurrency > 0)
        count, limits = len(kinds), fleet.limits
        self.course = Course(list(times) if times else [math.nan] * count, [math.nan] * count)
        self._kinds = kinds
        self._waits = times is None
        self._free = [0.0] * min(concurrency, count)  # a heap: when places came free that are not taken
        self._next = 0  # request
        self._left = [kind.request.n for kind in kinds]  # jobs that have not ended
        self._lost: set[int] = set()  # requests that lost a job
        self._fleet = fleet
        self._router = ROUTERS[fleet.routing](fleet.replicas, random.Random(f"routing {seed}"))
        self._replicas = [Replica(limits, costs, fleet.pace, self._end, leaps) for _ in range(fleet.replicas)]
        self._wakes: list[tuple[float, int]] = []  # a heap, by replica; one that was put off is out of date

    def run(self) -> Course:
        """All of it."""
        wakes, replicas = self._wakes, self._replicas
        while True:
            coming = self._coming()
            while wakes and wakes[0][0] < coming:
                wake, index = heappop(wakes)
                if wake == replicas[index].wake:
                    replicas[index].step()
                    self._note(index, math.nan)
                    coming = self._coming()
            if math.isinf(coming):
                return self._finished()
            self._arrive(coming)

    def _coming(self) -> float:
        """When the next request comes."""
        if self._next == len(self._kinds):
            return math.inf
        if not self._waits:
            return self.course.came[self._next]
        return self._free[0] if self._free else math.inf

    def _arrive(self, now: float) -> None:
        number, kind = self._next, self._kinds[self._next]
        self._next += 1
        if self._waits:
            heappop(self._free)
            self.course.came[number] = now
        index = self._router.choose(now)
        replica = self._replicas[index]
        if replica.until - now > self._fleet.max_queue_seconds:
            self.course.refused += 1
            return
        name, wake = str(number), replica.wake
        replica.take([Job(name, i, kind.request, kind.lengths, now) for i in range(kind.request.n)], now)
        self._note(index, wake)

    def _note(self, index: int, before: float) -> None:
        """Keep in mind when a replica goes on, if that has changed, and until when it has work."""
        replica = self._replicas[index]
        self._router.tell(index, replica.until)
        if replica.wake != before and not math.isinf(replica.wake):
            heappush(self._wakes, (replica.wake, index))

    def _end(self, job: Job, now: float) -> None:
        number = int(job.request_id)
        assert self._left[number] > 0
        self._left[number] -= 1
        if job.state is not JobState.FINISHED:
            self._lost.add(number)
        if self._left[number]:
            return
        course = self.course
        course.duration = max(course.duration, now)
        if number in self._lost:
            course.dropped += 1
        else:
            course.ended[number] = now
        if self._waits:
            heappush(self._free, now)

    def _finished(self) -> Course:
        course = self.course
        for replica in self._replicas:
            course.busy += replica.busy
            course.widths += replica.widths
        return course
