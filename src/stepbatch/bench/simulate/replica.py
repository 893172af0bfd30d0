"""One machine: the engine's loop and its own scheduler, where every unit of work takes what was predicted."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from stepbatch.config import BatchingConfig
from stepbatch.engine.cost import Costs
from stepbatch.engine.decode_time import PredictedDecoding
from stepbatch.engine.plan import Plan
from stepbatch.engine.scheduler import Scheduler
from stepbatch.errors import DeadlineExceeded
from stepbatch.request import Job, JobState


@dataclass(eq=False, slots=True)
class _Leap:
    """Steps of the same jobs, one after the other."""

    jobs: Sequence[Job]
    begin: float
    each: float  # seconds
    work: float  # of each
    steps: int

    @property
    def end(self) -> float:
        return self.begin + self.steps * self.each

    def until(self, moment: float) -> int:
        """How many steps it takes to get to this moment, or past it."""
        return max(1, math.ceil((moment - self.begin) / self.each)) if moment < self.end else self.steps


class Replica:
    """Does what ``Engine.step`` does, in the same order, and leaps over steps in which nothing changes.

    A plan says for how many steps it holds once nothing is left to decode. What comes meanwhile cuts the leap short, at
    the end of the step in which it comes, which is when the engine would see it.

    Args:
        limits: As the engine's.
        costs: What everything takes.
        pace: Work a second of steps as wide as they may be; see ``kinds.pace``.
        ended: Called with each job that has ended, and when.
        leaps: Whether more than a step is taken at once. Without, the figures are the same, to rounding.
    """

    def __init__(
        self,
        limits: BatchingConfig,
        costs: Costs,
        pace: float,
        ended: Callable[[Job, float], None],
        leaps: bool = True,
    ) -> None:
        self.wake = math.inf  # when the loop goes on
        self.busy = 0.0  # seconds, of the times when there was something to do that are over
        self.widths: Counter[int] = Counter()  # jobs in a step -> steps
        self._scheduler = Scheduler(limits, costs)
        self._costs = costs
        self._decoding = PredictedDecoding()
        self._pace = pace
        self._ended = ended
        self._leaps = leaps
        self._came: list[Job] = []
        self._unencoded: set[str] = set()  # requests
        self._since = 0.0  # when it last was idle
        self._leap: _Leap | None = None
        self._left = 0.0  # seconds of work that is here, at full pace, without what is under way

    @property
    def until(self) -> float:
        """When it would be through with all it has, at full pace; if it is idle, that was long ago."""
        return -math.inf if math.isinf(self.wake) else self.wake + self._left

    def take(self, jobs: Sequence[Job], now: float) -> None:
        """The jobs of a request come in at the door."""
        self._came.extend(jobs)
        self._unencoded.add(jobs[0].request_id)
        self._left += self._costs.encode_of(jobs[0]) + sum(map(self._share, jobs))
        leap = self._leap
        if math.isinf(self.wake):
            self.wake = self._since = now
        elif leap and (steps := leap.until(now)) < leap.steps:
            self._left += (leap.steps - steps) * leap.work / self._pace
            leap.steps = steps
            self.wake = leap.end

    def step(self) -> None:
        """End what is under way, which is at ``wake``, and begin the next; from then on ``wake`` is when that ends."""
        now, scheduler = self.wake, self._scheduler
        if self._leap:
            self.widths[len(self._leap.jobs)] += self._leap.steps
            scheduler.advance(self._leap.jobs, now, self._leap.steps)
            self._leap = None
        for job in self._came:
            scheduler.add(job, now)
        self._came.clear()
        self._drop(now)
        plan = scheduler.schedule(now)
        if plan:
            then = self._encode(plan.encode, self._decode(plan, now))
            self.wake = self._denoise(plan, then) if plan.denoise else then
            return
        assert not len(scheduler), "a job without a signature never waits for company"
        self.wake, self._left = math.inf, 0.0
        self.busy += now - self._since

    def _drop(self, now: float) -> None:
        for job in self._scheduler.late(now):
            job.fail(DeadlineExceeded("the request could not be done before its deadline"))
            self._scheduler.remove(job)
            self._left -= self._share(job) + self._begin(job)
            self._ended(job, now)

    def _decode(self, plan: Plan, now: float) -> float:
        if not plan.decode:
            return now
        decoded = self._decoding.go_on(plan, self._costs)
        self._scheduler.finish([job for job, _ in decoded.done])
        for job, seconds in decoded.done:
            self._ended(job, now + seconds)
        self._left -= decoded.seconds
        return now + decoded.seconds

    def _encode(self, jobs: Sequence[Job], now: float) -> float:
        seconds = 0.0
        for job in jobs:
            job.to(JobState.RUNNING)
            seconds += self._begin(job)
        self._left -= seconds
        return now + seconds

    def _denoise(self, plan: Plan, now: float) -> float:
        """Steps until something else is to be done: only the first of a plan has others' units."""
        size = sum(job.tokens for job in plan.denoise), sum(job.squares for job in plan.denoise)
        each, work = self._costs.step.seconds(*size), self._costs.step.work(*size)
        leap = _Leap(plan.denoise, now, each, work, 1)
        if self._leaps and not self._scheduler.decoding:
            leap.steps = plan.steps
            leap.steps = leap.until(self._scheduler.next_late)
        self._left -= leap.steps * work / self._pace
        self._leap = leap
        return leap.end

    def _share(self, job: Job) -> float:
        """Seconds of an output at full pace, but for the prompt."""
        costs = self._costs
        return job.steps * costs.step.work(job.tokens, job.squares) / self._pace + costs.decode.of(job.pixels)

    def _begin(self, job: Job) -> float:
        """What encoding takes, at the first of a request's jobs, which share it."""
        if job.request_id not in self._unencoded:
            return 0.0
        self._unencoded.remove(job.request_id)
        return self._costs.encode_of(job)
