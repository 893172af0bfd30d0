"""What becomes of a request: the very same scheduler, run ahead on a predicted clock. No torch and no clock of its own.

Where much waits, only those that go right before and right after the request are followed step by step; what is before
them is taken to be done as fast as full steps do it.
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from stepbatch.config import BatchingConfig
from stepbatch.engine.cost import Costs
from stepbatch.engine.decode_time import Decoded, PredictedDecoding
from stepbatch.engine.order import JobId
from stepbatch.engine.plan import Plan
from stepbatch.engine.scheduler import Scheduler
from stepbatch.engine.width import Pace
from stepbatch.model_info import ModelInfo
from stepbatch.request import GenerationRequest, Job, JobState

BEFORE, AFTER = 16, 8  # jobs in the order around a request's that are followed step by step
LOOKED_AT = 128  # jobs, of all, by which the work before a request is told
MOST_PLANS = 256  # that are made ahead


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a request can expect, seconds from when it came in; of several outputs, the last."""

    queue: float  # until it begins
    total: float  # until it is done
    correction: float = 1.0  # what both were multiplied with, going by how others turned out

    def corrected(self, correction: float) -> Prediction:
        """The same multiplied with this."""
        return Prediction(correction * self.queue, correction * self.total, correction)


@dataclass(eq=False, slots=True)
class Held:
    """A job as it is known outside of the engine."""

    job: Job  # always waiting, by its state: see below
    begun: bool = False
    left: float = 0.0  # seconds of a full machine's time that it still takes


def lengths(request: GenerationRequest, info: ModelInfo) -> tuple[int, ...]:
    """The tokens of each sequence of a resolved request's outputs, nearly as ``Runner.lengths`` has them."""
    sizing = info.sizing
    picture = sizing.picture(*request.size, request.frames)
    if sizing.whole_calls:
        return (picture,)
    if request.strength is None and request.mask is None:
        picture += len(request.images) * (picture if sizing.image is None else sizing.image)
    assert request.max_sequence_length is not None
    texts = [request.prompt, request.negative_prompt or ""] if request.guided(info) else [request.prompt]
    return tuple(picture + sizing.text(text, request.max_sequence_length) for text in texts)


def left(job: Job, begun: bool, costs: Costs, pace: Pace) -> float:
    """Seconds of the machine that a job of such a pace still takes, its share of steps that are as wide as pays."""
    seconds = (job.steps - job.step) * pace.share + costs.decode.of(job.pixels)
    return seconds if begun else seconds + costs.encode_of(job) / job.request.n


def predict(
    wanted: Sequence[Job],
    others: Sequence[Held],
    costs: Costs,
    limits: BatchingConfig,
    now: float,
    decay: float = 0.0,
    most_tokens: float = math.inf,
) -> Prediction:
    """When a new request's jobs begin and are done, if nobody else comes.

    Args:
        wanted: The request's jobs.
        others: All that is held besides, in order of arrival.
        limits: The scheduler's.
        now: On the clock of the jobs' arrivals.
        decay: What the policy ``boost`` goes by.
        most_tokens: In a step, as far as memory goes.

    Returns:
        Endless seconds, if the request would be dropped because of its deadline.
    """
    scheduler = Scheduler(limits, costs, decay)
    scheduler.limit(most_tokens)
    near, waited = _near(wanted, others, Scheduler(limits, costs, decay), now)
    start = now + waited + _call_under_way(others, costs)
    for held in near:
        _put(scheduler, held, now)
    for job in wanted:
        scheduler.add(copy.copy(job), now)
    ahead = _Ahead(scheduler, {held.job.id for held in near if not held.begun})
    begun, done = ahead.run({job.id for job in wanted}, start)
    return Prediction(begun - now, done - now)


def _near(
    wanted: Sequence[Job], others: Sequence[Held], scheduler: Scheduler, now: float
) -> tuple[Sequence[Held], float]:
    """Those to be followed step by step, and the seconds until whatever goes before them is done.

    Args:
        scheduler: One that has nothing yet, to tell the order.
    """
    others = [held for held in others if held.job.signature is None or not held.begun]  # a call can't be joined
    if len(others) <= BEFORE + AFTER:
        return others, 0.0
    if scheduler.limits.scheduling_policy == "fcfs" and not scheduler.limits.fair_shares:
        return others[-BEFORE:], sum(held.left for held in others[:-BEFORE])
    some = sorted(Random(0).sample(range(len(others)), min(LOOKED_AT, len(others))))
    looked_at = {others[index].job.id: others[index] for index in some}
    for held in looked_at.values():
        _put(scheduler, held, now)
    for job in wanted:
        scheduler.add(copy.copy(job), now)
    order = [job.id for job in scheduler.in_order()]
    place = max(order.index(job.id) for job in wanted)
    before, after = ([looked_at[id] for id in ids if id in looked_at] for ids in (order[:place], order[place + 1 :]))
    first = before[: max(0, len(before) - BEFORE)]
    near = [*before[len(first) :], *after[:AFTER]]
    last = sum(held.left for held in before[len(first) :])
    waited = len(others) / len(some) * sum(held.left for held in before) - last
    return sorted(near, key=lambda held: held.job.arrival), max(0.0, waited)


def _call_under_way(others: Sequence[Held], costs: Costs) -> float:
    """Seconds until the whole call that runs is done, if one does."""
    jobs = [held.job for held in others if held.begun and held.job.signature is not None]
    return max((job.steps - job.step for job in jobs), default=0) * costs.step_of(jobs)


def _put(scheduler: Scheduler, held: Held, now: float) -> None:
    job = copy.copy(held.job)
    if job.step == job.steps:
        job.state = JobState.DECODING
        scheduler.decoding[job.id] = job
        return
    scheduler.add(job, now)
    job.state = JobState.RUNNING  # those that aren't encoded yet would need a plan for every few of them


class _Ahead:
    """A scheduler on its way to when some of its jobs are done.

    Args:
        scheduler: With copies of the jobs.
        unencoded: Jobs that run, but for their encoding.
    """

    def __init__(self, scheduler: Scheduler, unencoded: set[JobId]) -> None:
        self.scheduler = scheduler
        self.unencoded = unencoded
        self.decoding = PredictedDecoding()

    def run(self, wanted: set[JobId], now: float) -> tuple[float, float]:
        """When the last of the wanted jobs begins, and ends."""
        begun, missing = now, set(wanted)
        for _ in range(MOST_PLANS):
            if any(late.id in missing for late in self.scheduler.late(now)):
                return math.inf, math.inf
            plan = self.scheduler.schedule(now)
            if not plan:
                now += plan.wait
                continue
            decoded = self._decode(plan)
            for job, seconds in decoded.done:
                missing.discard(job.id)
                if not missing:
                    return begun, now + seconds
            now += decoded.seconds
            if any(job.id in wanted for job in plan.encode):
                begun = now
            now = self._go(plan, decoded.steps, now)
        return begun, now

    def _decode(self, plan: Plan) -> Decoded:
        """Decode before a plan's step; before several at once, where nothing is done or begins between them."""
        steps = 1 if plan.encode else plan.steps
        decoded = self.decoding.go_on(plan, self.scheduler.costs, steps if plan.denoise else sys.maxsize)
        self.scheduler.finish([job for job, _ in decoded.done])
        return decoded

    def _go(self, plan: Plan, steps: int, now: float) -> float:
        """Encode and denoise as a plan says: for as long as it holds, or so many steps if there is more to decode."""
        costs, jobs = self.scheduler.costs, plan.denoise
        fresh = {job.request_id: job for job in jobs if job.state is JobState.ENCODING or job.id in self.unencoded}
        now += sum(costs.encode_of(job) for job in fresh.values())
        self.unencoded -= {job.id for job in jobs}
        for job in plan.encode:
            job.to(JobState.RUNNING)
        if not jobs:
            return now
        steps = plan.steps if not self.scheduler.decoding else steps
        taken = steps if jobs[0].signature is None else jobs[0].steps
        now += taken * costs.step_of(jobs)
        self.scheduler.advance(jobs, now, steps)
        return now
