"""Which jobs run: a data structure without torch or clocks.

At every step the jobs are looked at in the order of the policy, running and waiting alike, and each that still fits the
limits may take it; ``engine.width`` says how many of them do. So a job that doesn't fit holds up nobody: others
that come later in the order fill the room it leaves. And they never hold it up either: as soon as those before it are
done it fits, and whoever comes after it pauses, which costs nothing at a step boundary. A choice stands until a job
comes, ends or is through its steps, since nothing else could change it.

Jobs that are denoised in one call share it only with their signature. There a batch that isn't full may wait for
company, at most the delay from when its oldest job arrived; whichever batch is full or has waited goes, the first in
the order first. Whoever a call has answered may ask the like again at once, so after each there is a pause, a small
part of what the call took: without it, clients that were in two calls would be in two for ever.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from heapq import heapify, heappop, heappush, merge
from itertools import count, islice, product

from stepbatch.config import BatchingConfig
from stepbatch.engine.cost import UNKNOWN, Costs
from stepbatch.engine.fairness import FairShares
from stepbatch.engine.order import JobId, Order, Place
from stepbatch.engine.plan import Plan
from stepbatch.engine.policies import POLICIES, STEADY, Outlook
from stepbatch.engine.traffic import Traffic
from stepbatch.engine.width import WIDEST, paces, step_width
from stepbatch.request import MAX_OUTPUTS, Job, JobState

PAUSE = 0.03  # after a call, of its seconds; at most the delay
LOOK_AHEAD = 256  # jobs that are looked at for those that fit
WIDEST_UNKNOWN = 8  # jobs in a step where nobody says, while costs aren't known
ENCODES_UNKNOWN, DECODES_UNKNOWN = 4, 2  # likewise, units between two steps
WAITING = JobState.WAITING  # looking it up takes as long as all else that is asked of a job
DECODE_STEPS = 2  # steps' time that decoding may take before one
DOUBT = 0.9  # of what a job is predicted to take: a deadline that even this much misses is given up


@dataclass(eq=False)
class _Lane:
    """Jobs that may share a step, in order."""

    signature: Hashable
    order: Order = field(default_factory=Order)


@dataclass(eq=False)
class _Choice:
    """Those of a lane that would take the next step."""

    lane: _Lane
    jobs: list[Job]
    full: bool  # there is no room for another
    all_in: bool  # none was left out only because too many were to be encoded


class Scheduler:
    """Keeps every job that hasn't ended and decides, at each step, what is done.

    Args:
        limits: How wide a step may be, and in which order jobs go. A job that is over ``max_batch_tokens`` by itself
            runs with no other.
        costs: What steps and the rest cost, as far as it is known; see ``learn``.
        decay: What the policy ``boost`` goes by; without it, that is learned from who comes.
    """

    def __init__(self, limits: BatchingConfig, costs: Costs = UNKNOWN, decay: float | None = None) -> None:
        self.limits = limits
        self.costs = costs
        self.most_tokens = math.inf  # in a step; see ``limit``
        self.denoising: dict[JobId, Job] = {}  # waiting, encoding or running
        self.decoding: dict[JobId, Job] = {}  # in order of their last step
        self._lanes: dict[Hashable, _Lane] = {}
        self._begun: set[JobId] = set()  # those of denoising that are encoding or running
        self._tags: dict[JobId, float] = {}  # of denoising: the fair share's, the same for all where there is none
        self._numbers: dict[JobId, int] = {}  # of denoising: in which order they came
        self._shares = FairShares()
        self._due: list[tuple[float, int, JobId]] = []  # a heap of those with a deadline: when it can't be met any more
        self._count = count()
        self._policy = POLICIES[limits.scheduling_policy]
        self._pace = paces(costs.step, limits)
        self._traffic = Traffic() if decay is None and limits.scheduling_policy == "boost" else None
        self._decay = decay or 0.0
        self._standing: _Choice | None = None  # the last choice, for as long as it would be the same
        self._pause: tuple[Hashable, float] = (None, -math.inf)  # the last call's signature, and when its pause ends

    def __len__(self) -> int:
        return len(self.denoising) + len(self.decoding)

    @property
    def waiting(self) -> int:
        """How many jobs have not begun."""
        return len(self.denoising) - len(self._begun)

    def add(self, job: Job, now: float = 0.0) -> None:
        """Take in a new job."""
        assert job.state is JobState.WAITING
        assert job.id not in self.denoising
        assert job.id not in self.decoding
        number = next(self._count)
        self.denoising[job.id] = job
        self._numbers[job.id] = number
        remaining = self.remaining(job)
        self._expect(job, now)
        self._tags[job.id] = self._shares.tag(job, remaining) if self.limits.fair_shares else 0.0
        lane = self._lanes.setdefault(_lane(job), _Lane(job.signature))
        self._place(lane, job, now)
        if job.deadline is not None:
            heappush(self._due, self._due_of(job))
            self._tidy()
        self._standing = None

    def limit(self, tokens: float) -> None:
        """Let no step have more tokens than there is memory for."""
        if tokens != self.most_tokens:
            self.most_tokens = tokens
            self._pace = paces(self.costs.step, self.limits, tokens)
            self._standing = None

    def learn(self, costs: Costs, now: float) -> None:
        """Go by these costs from now on."""
        self.costs = costs
        self._pace = paces(costs.step, self.limits, self.most_tokens)
        self._renew(now)
        timed = [job for job in self.denoising.values() if job.deadline is not None and job.id not in self._begun]
        self._due = sorted(map(self._due_of, timed))  # which is a heap

    def in_order(self) -> list[Job]:
        """All that wait or run, the one that goes before all others first."""
        return [job for _, job in merge(*(lane.order.items() for lane in self._lanes.values()))]

    def get(self, request_id: str) -> list[Job]:
        """The jobs of a request that have not ended."""
        found = (self.denoising.get(id) or self.decoding.get(id) for id in product([request_id], range(MAX_OUTPUTS)))
        return [job for job in found if job]

    def remove(self, job: Job) -> None:
        """Forget a job that has ended, in a step or between two."""
        assert job.ended
        if job.id in self.denoising:
            self._leave(job)
        else:
            del self.decoding[job.id]

    def late(self, now: float) -> list[Job]:
        """Jobs that have not begun and can't be done by their deadline any more, each told once."""
        found = []
        while self._due and self._due[0][0] < now:
            _, number, id = heappop(self._due)
            if self._numbers.get(id) == number and id not in self._begun:
                found.append(self.denoising[id])
        return found

    def _due_of(self, job: Job) -> tuple[float, int, JobId]:
        """When a job's deadline can't be met any more, if it hasn't begun by then."""
        return (job.deadline or math.inf) - DOUBT * self.remaining(job), self._numbers[job.id], job.id

    def _tidy(self) -> None:
        """Forget the deadlines of those that are gone, before they are more than the others."""
        if len(self._due) > 2 * len(self.denoising) + 64:
            self._due = [due for due in self._due if self._numbers.get(due[2]) == due[1]]
            heapify(self._due)

    @property
    def next_late(self) -> float:
        """When ``late`` may next have something to tell; infinity if nothing has a deadline."""
        return self._due[0][0] if self._due else math.inf

    def remaining(self, job: Job) -> float:
        """Seconds that a job would take from here, by itself."""
        pace = self._pace(job.tokens, job.squares)
        return (job.steps - job.step) * pace.alone + self.costs.decode.of(job.pixels)

    def schedule(self, now: float) -> Plan:
        """Choose the next step's jobs. Jobs to encode go to ``ENCODING``; the rest move on later.

        Args:
            now: Seconds on the clock of the jobs' arrivals.
        """
        if self._standing:
            return self._begin(self._standing, now)
        wait = math.inf
        for choice in self._choices():
            ready = self._ready(choice)
            if ready <= now:
                return self._begin(choice, now)
            wait = min(wait, ready - now)
        decode = self._decodes(None)
        return Plan(decode, wait=0.0 if decode else wait)

    def _begin(self, choice: _Choice, now: float) -> Plan:
        decode = self._decodes(choice)
        encode = [job for job in choice.jobs if job.state is WAITING]
        for job in encode:
            job.to(JobState.ENCODING)
            self._begun.add(job.id)
            self._shares.begin(self._tags[job.id])
        if not choice.all_in:
            self._standing = None
            return Plan(decode, encode, choice.jobs)
        self._standing = choice
        return Plan(decode, encode, list(choice.jobs), holds=partial(self._steps, choice, decode, encode, now))

    def _steps(self, choice: _Choice, decode: list[Job], encode: list[Job], now: float) -> int:
        """For how many steps a choice is the same if nobody comes: until one is through, or might go later."""
        jobs, costs, order = choice.jobs, self.costs, choice.lane.order
        steps = min([job.steps - job.step for job in jobs])
        if steps == 1 or self.limits.scheduling_policy in STEADY:
            return steps
        now += costs.decode_of(decode) + sum(map(costs.encode_of, encode))
        # at least what a step takes, and what it takes of a job alone: then a key that grows is greatest at the end
        each = max(costs.step_of(jobs), *[self._pace(job.tokens, job.squares).alone for job in jobs])
        while steps > 1 and any(
            self._where(job, now + (steps - 1) * each, steps - 1) > order.place(job) for job in jobs
        ):
            steps //= 2
        return steps

    def _choices(self) -> Iterator[_Choice]:
        """Those that could take the next step, the first in the order first."""
        for lane in sorted(self._lanes.values(), key=lambda lane: lane.order.first):
            yield self._choose(lane)

    def _choose(self, lane: _Lane) -> _Choice:
        """Those of a lane that may share its step, as far as they fit and as it pays."""
        jobs: list[Job] = []
        most, room = self._most_jobs, self._room
        tokens = squares = 0
        all_in = True
        encoded: set[str] = set()  # requests, whose jobs share what is encoded
        encoding = 0.0  # what that costs
        # of a whole call the flags say how many share it, as people know them
        auto = self.costs.known and self.limits.max_batch_tokens is None and lane.signature is None
        for job in islice(lane.order, LOOK_AHEAD):
            if len(jobs) == most or (auto and tokens >= self._pace(job.tokens, job.squares).enough):
                break
            if jobs and tokens + job.tokens > room:
                continue
            if job.state is WAITING:
                more = 0.0 if job.request_id in encoded else self._encoding(job)
                if encoded and more and encoding + more > self._encode_room(tokens, squares):
                    all_in = False
                    continue
                encoded.add(job.request_id)
                encoding += more
            jobs.append(job)
            tokens += job.tokens
            squares += job.squares
        full = len(jobs) == most or tokens + jobs[0].tokens > room or jobs[0].alone
        if auto:
            jobs = jobs[: step_width(self.costs, jobs, len(lane.order))]
        return _Choice(lane, jobs, full, all_in)

    def _ready(self, choice: _Choice) -> float:
        """When a choice may take its step: at once, unless it waits for company."""
        signature = choice.lane.signature
        if choice.full or signature is None:
            return -math.inf
        oldest = min(job.arrival for job in choice.jobs)
        paused, until = self._pause
        return max(oldest + self._delay, until if paused == signature else -math.inf)

    def _decodes(self, choice: _Choice | None) -> list[Job]:
        """What is decoded before this choice's step: as many as take ``DECODE_STEPS`` times as long, but one at least.

        Who is nearly done goes first, and meanwhile newcomers gather for a wider step.
        """
        if not self.decoding:
            return []
        most = self._most_decodes(choice)
        chosen = list(islice(self.decoding.values(), most))
        alone = next((i for i, job in enumerate(chosen) if job.alone), None)
        if alone is not None:
            chosen = chosen[: max(1, alone)]
        return chosen

    def _most_decodes(self, choice: _Choice | None) -> int:
        if self.limits.max_decodes_per_step is not None:
            return self.limits.max_decodes_per_step
        if not self.costs.known:
            return DECODES_UNKNOWN
        if choice is None:
            return WIDEST
        room, most = DECODE_STEPS * self.costs.step_of(choice.jobs), 0
        for job in self.decoding.values():
            room -= self.costs.decode.of(job.pixels)
            if room < 0:
                break
            most += 1
        return max(1, most)

    def advance(self, denoised: Iterable[Job], now: float = 0.0, steps: int = 1) -> None:
        """Move on jobs that have come through so many denoising steps; with a signature, through all of theirs."""
        for job in denoised:
            lane = self._lanes[_lane(job)]
            job.step += steps if job.signature is None else job.steps
            if job.step == job.steps:
                self._leave(job)
                job.to(JobState.DECODING)
                self.decoding[job.id] = job
            elif self._place(lane, job, now):
                self._standing = None

    def pause(self, signature: Hashable, now: float, seconds: float) -> None:
        """Give those whom a call, which took so long, has answered the time to come back with their next."""
        self._pause = signature, now + min(self._delay, PAUSE * seconds)

    def finish(self, decoded: Iterable[Job]) -> list[Job]:
        """End jobs that have been decoded; returns them."""
        finished = list(decoded)
        for job in finished:
            job.to(JobState.FINISHED)
            self.remove(job)
        return finished

    def _place(self, lane: _Lane, job: Job, now: float) -> bool:
        """Put a job where it belongs; returns whether others may go before it now that did not."""
        return lane.order.put(job, *self._where(job, now))

    def _where(self, job: Job, now: float, taken: int = 0) -> Place:
        """The place that a job has in the order, or will have when it has taken so many more steps."""
        pace, steps = self._pace(job.tokens, job.squares), job.steps - job.step - taken
        decode = self.costs.decode.of(job.pixels)
        outlook = Outlook(
            steps * pace.alone + decode, now, self.limits.ageing, steps * pace.usual + decode, self._decay
        )
        return (self._tags[job.id], *self._policy(job, outlook)), self._numbers[job.id]

    def _renew(self, now: float) -> None:
        """Put all where they belong by what is known now."""
        for lane in self._lanes.values():
            lane.order.renew(lambda job: self._where(job, now))
        self._standing = None

    def _expect(self, newcomer: Job, now: float) -> None:
        """Learn from who comes; all go by the same decay, or of two like jobs the later might go first."""
        if self._traffic:
            pace, decode = self._pace(newcomer.tokens, newcomer.squares), self.costs.decode.of(newcomer.pixels)
            seconds = newcomer.steps * pace.share + decode + self.costs.encode_of(newcomer) / newcomer.request.n
            if self._traffic.came(newcomer.arrival, seconds, newcomer.steps * pace.usual + decode):
                self._decay = self._traffic.decay
                self._renew(now)

    def _leave(self, job: Job) -> None:
        if self.limits.fair_shares and job.id not in self._begun:
            self._shares.refund(job, self.remaining(job))
        del self.denoising[job.id], self._numbers[job.id], self._tags[job.id]
        self._begun.discard(job.id)
        name = _lane(job)
        lane = self._lanes[name]
        lane.order.remove(job)
        if not len(lane.order):
            del self._lanes[name]
        self._standing = None

    @property
    def _most_jobs(self) -> int:
        return self.limits.dynamic_batch_max_size or (WIDEST if self.costs.known else WIDEST_UNKNOWN)

    @property
    def _room(self) -> float:
        return min(self.limits.max_batch_tokens or math.inf, self.most_tokens)

    def _encoding(self, job: Job) -> float:
        """What encoding costs, seconds; or, where those don't count, pieces."""
        return self.costs.encode_of(job) if self._encodes_cost else max(1, len(job.request.images))

    @property
    def _encodes_cost(self) -> bool:
        """Whether it is seconds that bound what is encoded at once."""
        return self.limits.max_encodes_per_step is None and self.costs.prompt.each > 0

    def _encode_room(self, tokens: int, squares: int) -> float:
        """How much of that there may be before such a step, which newcomers may keep waiting for as long again."""
        if self._encodes_cost:
            return self.costs.step.seconds(tokens, squares)
        return self.limits.max_encodes_per_step or ENCODES_UNKNOWN

    @property
    def _delay(self) -> float:
        return self.limits.dynamic_batch_delay_ms / 1000


def _lane(job: Job) -> Hashable:
    """What the lane of a job is known by: its own, where it is to have no company."""
    return job.id if job.alone else job.signature
