"""Which jobs run: a data structure without torch or clocks.

At every step the jobs are looked at in order of arrival, running and waiting alike, and each that still fits the limits
takes a step. So a job that doesn't fit holds up nobody: smaller ones that came later fill the room it leaves. And they
never hold it up either: as soon as those before it are done it fits, and whoever came later pauses, which costs nothing
at a step boundary.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import product, takewhile

from stepbatch.config import BatchingConfig
from stepbatch.request import MAX_OUTPUTS, Job, JobState

JobId = tuple[str, int]


@dataclass(frozen=True, eq=False)
class Plan:
    """What one engine step does, in this order. ``denoise`` includes the jobs of ``encode``."""

    encode: list[Job] = field(default_factory=list)
    denoise: list[Job] = field(default_factory=list)
    decode: list[Job] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.denoise or self.decode)


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

    def schedule(self) -> Plan:
        """Choose the next step's jobs. Jobs to encode go to ``ENCODING``; the rest change in ``advance``."""
        plan = Plan(decode=self._decodes())
        room = self.limits.max_batch_tokens
        encodes: dict[str, int] = {}  # of requests, whose jobs share what is encoded: how much there is
        for job in self.denoising.values():
            if len(plan.denoise) == self.limits.dynamic_batch_max_size:
                break
            if plan.denoise and (job.tokens > room or job.alone):
                continue
            if job.state is JobState.WAITING:
                encodes.setdefault(job.request_id, max(1, len(job.request.images)))
                if len(encodes) > 1 and sum(encodes.values()) > self.limits.max_encodes_per_step:
                    del encodes[job.request_id]
                    continue
                plan.encode.append(job)
            plan.denoise.append(job)
            room -= job.tokens
            if job.alone:
                break
        for job in plan.encode:
            job.to(JobState.ENCODING)
            self._begun.add(job.id)
        return plan

    def _decodes(self) -> list[Job]:
        chosen = list(self.decoding.values())[: self.limits.max_decodes_per_step]
        alone = next((i for i, job in enumerate(chosen) if job.alone), None)
        if alone is not None:
            chosen = chosen[: max(1, alone)]
        return chosen

    def advance(self, plan: Plan) -> list[Job]:
        """Move the plan's jobs on, but for those that have failed or been cancelled since; return the finished ones."""
        for job in plan.denoise:
            if job.ended:
                continue
            job.step += 1
            if job.step == job.steps:
                job.to(JobState.DECODING)
                self.decoding[job.id] = self.denoising.pop(job.id)
                self._begun.remove(job.id)
        finished = [job for job in plan.decode if not job.ended]
        for job in finished:
            job.to(JobState.FINISHED)
            self.remove(job)
        return finished
