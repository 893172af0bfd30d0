"""Which jobs run: a data structure without torch or clocks.

At every step the jobs are looked at in order of arrival, running and waiting alike, and each that still fits the limits
takes a step. So a job that doesn't fit holds up nobody: smaller ones that came later fill the room it leaves. And they
never hold it up either: as soon as those before it are done it fits, and whoever came later pauses, which costs nothing
at a step boundary.

Jobs that are denoised in one call share it only with their signature. There a batch that isn't full may wait for
company, at most the delay from when its oldest job arrived; whichever batch is full or has waited goes, the one with
the oldest job first. Whoever a call has answered may ask the like again at once, so after each there is a pause, a
small part of what the call took: without it, clients that were in two calls would be in two for ever.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import product, takewhile

from stepbatch.config import BatchingConfig
from stepbatch.request import MAX_OUTPUTS, Job, JobState

PAUSE = 0.03  # after a call, of its seconds; at most the delay

JobId = tuple[str, int]


@dataclass(frozen=True, eq=False)
class Plan:
    """What one engine step does, in this order. ``denoise`` includes the jobs of ``encode``."""

    decode: list[Job] = field(default_factory=list)
    encode: list[Job] = field(default_factory=list)
    denoise: list[Job] = field(default_factory=list)
    wait: float = 0.0  # seconds until there will be something to do, where there is nothing now

    def __bool__(self) -> bool:
        return bool(self.denoise or self.decode)


@dataclass(eq=False)
class _Group:
    """Jobs that may share a step."""

    jobs: list[Job] = field(default_factory=list)
    full: bool = False  # there is no room for another of the same signature, and so of the same size


class Scheduler:
    """Keeps every job that hasn't ended and decides, at each step, what is done.

    Args:
        limits: How wide a step may be. A job that is over ``max_batch_tokens`` by itself runs with no other.
    """

    def __init__(self, limits: BatchingConfig) -> None:
        self.limits = limits
        self.denoising: dict[JobId, Job] = {}  # in order of arrival: waiting, encoding or running
        self.decoding: dict[JobId, Job] = {}  # in order of their last step
        self._begun: set[JobId] = set()  # those of denoising that are encoding or running
        self._pause: tuple[Hashable, float] = (None, -math.inf)  # the last call's signature, and when its pause ends

    def __len__(self) -> int:
        return len(self.denoising) + len(self.decoding)

    @property
    def waiting(self) -> int:
        """How many jobs have not begun."""
        return len(self.denoising) - len(self._begun)

    def add(self, job: Job) -> None:
        """Take in a new job; one that arrived earlier than others already here goes before them."""
        assert job.state is JobState.WAITING
        assert job.id not in self.denoising
        assert job.id not in self.decoding
        late = list(takewhile(lambda other: other.arrival > job.arrival, reversed(self.denoising.values())))
        self.denoising[job.id] = job
        for other in reversed(late):
            self.denoising[other.id] = self.denoising.pop(other.id)

    def get(self, request_id: str) -> list[Job]:
        """The jobs of a request that have not ended."""
        found = (self.denoising.get(id) or self.decoding.get(id) for id in product([request_id], range(MAX_OUTPUTS)))
        return [job for job in found if job]

    def remove(self, job: Job) -> None:
        """Forget a job that has ended, in a step or between two."""
        assert job.ended
        self._begun.discard(job.id)
        if self.denoising.pop(job.id, None) is None:
            del self.decoding[job.id]

    def schedule(self, now: float) -> Plan:
        """Choose the next step's jobs. Jobs to encode go to ``ENCODING``; the rest move on later.

        Args:
            now: Seconds on the clock of the jobs' arrivals.
        """
        decode = self._decodes()
        wait = 0.0 if decode else math.inf
        for group in self._groups():
            due = self._due(group)
            if due <= now:
                return self._begin(Plan(decode, denoise=group.jobs))
            wait = min(wait, due - now)
        return Plan(decode, wait=wait)

    def _begin(self, plan: Plan) -> Plan:
        for job in plan.denoise:
            if job.state is JobState.WAITING:
                job.to(JobState.ENCODING)
                self._begun.add(job.id)
                plan.encode.append(job)
        return plan

    def _groups(self) -> Iterator[_Group]:
        """Those that could take the next step, the one with the oldest job first."""
        seen: set[Hashable] = set()
        for head in self.denoising.values():
            key = head.id if head.alone else head.signature
            if key not in seen:
                seen.add(key)
                yield self._company(head)

    def _company(self, head: Job) -> _Group:
        """``head`` and those that may share its step, as far as they fit."""
        if head.alone:
            return _Group([head], full=True)
        group = _Group()
        room = self.limits.max_batch_tokens
        encodes: dict[str, int] = {}  # of requests, whose jobs share what is encoded: how much there is
        for job in self.denoising.values():
            if job.alone or job.signature != head.signature:
                continue
            if len(group.jobs) == self.limits.dynamic_batch_max_size:
                break
            if group.jobs and job.tokens > room:
                continue
            if job.state is JobState.WAITING:
                encodes.setdefault(job.request_id, max(1, len(job.request.images)))
                if len(encodes) > 1 and sum(encodes.values()) > self.limits.max_encodes_per_step:
                    del encodes[job.request_id]
                    continue
            group.jobs.append(job)
            room -= job.tokens
        group.full = len(group.jobs) == self.limits.dynamic_batch_max_size or head.tokens > room
        return group

    def _due(self, group: _Group) -> float:
        """When a group may take its step: at once, unless it waits for company."""
        head = group.jobs[0]
        if group.full or head.signature is None:
            return -math.inf
        signature, pause = self._pause
        return max(head.arrival + self._delay, pause if signature == head.signature else -math.inf)

    @property
    def _delay(self) -> float:
        return self.limits.dynamic_batch_delay_ms / 1000

    def _decodes(self) -> list[Job]:
        chosen = list(self.decoding.values())[: self.limits.max_decodes_per_step]
        alone = next((i for i, job in enumerate(chosen) if job.alone), None)
        if alone is not None:
            chosen = chosen[: max(1, alone)]
        return chosen

    def advance(self, denoised: Iterable[Job]) -> None:
        """Move on jobs that have come through a denoising step."""
        for job in denoised:
            job.step = job.step + 1 if job.signature is None else job.steps
            if job.step == job.steps:
                job.to(JobState.DECODING)
                self.decoding[job.id] = self.denoising.pop(job.id)
                self._begun.remove(job.id)

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
