"""The loop: schedule, decode, encode, denoise, one denoising step at a time. No torch here; the runner has it."""

from __future__ import annotations

import logging
import sys
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from itertools import count
from typing import Protocol

from stepbatch.config import BatchingConfig, EngineConfig
from stepbatch.engine.messages import Cancelled, Failure, FromEngine, Output, Progress, Stats, Submit, Unit
from stepbatch.engine.scheduler import Scheduler
from stepbatch.errors import REQUEST_ERRORS, GenerationFailed, RequestCancelled, RequestError
from stepbatch.model_info import ModelInfo
from stepbatch.request import GenerationRequest, Job, JobState

log = logging.getLogger(__name__)

FIRST_UNIT_SECONDS = 600.0  # what a unit is said to take until one of its kind and size has been measured
MOST_SIZES = 4096  # that are remembered at once

Tick = Callable[[int, int], None]


class Runner(Protocol):
    """What the engine needs of the thing that computes; ``engine.runner`` has the real one, ``testing`` a fake.

    The methods that take jobs change nothing if they raise, so that the engine may call them again with fewer.
    """

    info: ModelInfo
    whole_calls: bool  # whether ``denoise`` takes all of a job's steps at once

    def check(self, request: GenerationRequest) -> None:
        """Raise ``RequestError`` for a resolved request that the model can't serve."""

    def tokens(self, request: GenerationRequest) -> int:
        """What a step of one output costs: the tokens of its sequences."""

    def signature(self, request: GenerationRequest) -> Hashable | None:
        """What jobs that share a whole call have in common; ``None`` where any may share a step."""

    def shares(self, request: GenerationRequest) -> bool:
        """Whether this request's jobs can share a step with others, or with each other."""

    def encode(self, jobs: Sequence[Job]) -> None:
        """Make prompt embeddings, noise and noise schedule."""

    def denoise(self, jobs: Sequence[Job], tick: Tick) -> None:
        """Take one denoising step of every job, in one forward pass; or, in whole calls, all of them.

        Args:
            jobs: With whole calls, they have the same signature; some may end before the call does.
            tick: Called between the steps of a whole call, with how many are done, of how many. It raises
                ``RequestError`` when nobody waits for any of the jobs any more.
        """

    def decode(self, jobs: Sequence[Job]) -> list[bytes | RequestError]:
        """Make RGB pixels, 8 bits each, frame by frame, rows from the top; or say what is wrong with a job's output."""

    def forget(self, job: Job) -> None:
        """Free what is held for a job that has ended, if anything is."""

    def peak_memory_mb(self) -> float:
        """The most memory that was in use since the start, MiB."""


class Engine:
    """Runs jobs to their endings; each accepted job ends exactly once, told through ``emit``.

    Args:
        runner: Computes.
        config: The batching limits are read here.
        emit: Takes every message: units of work as they begin, progress, endings, statistics.
        poll: Called between units of work; may call ``submit`` and ``cancel``.
    """

    def __init__(
        self,
        runner: Runner,
        config: EngineConfig,
        emit: Callable[[FromEngine], None] = lambda message: None,
        poll: Callable[[], None] = lambda: None,
    ) -> None:
        self.runner = runner
        self.scheduler = Scheduler(_whole_calls(config.batching) if runner.whole_calls else config.batching)
        self.emit = emit
        self.poll = poll
        self.stats = Stats()
        self._seconds: dict[Hashable, float] = {}  # the most that a unit of this kind and size has taken
        self._ids = count()

    def submit(self, message: Submit) -> None:
        """Take in a request's jobs, or emit the failure of each."""
        accepted: list[Job] = []
        error = self._attempt(lambda: accepted.extend(self._jobs(message)))
        if error:
            for index in message.indices:
                self.emit(_failure((message.request_id, index), error))
        for job in accepted:
            self.scheduler.add(job)

    def cancel(self, request_id: str) -> None:
        """End the jobs of a request that haven't ended. They are in no later unit of work."""
        for job in self.scheduler.get(request_id):
            job.cancel()
            self._forget(job)
            self.emit(Cancelled(*job.id))

    @property
    def idle(self) -> bool:
        return not len(self.scheduler)

    def step(self) -> float:
        """One round: decode those that are done, encode newcomers, take a denoising step.

        Returns:
            Seconds until there will be something to do, where there was nothing.
        """
        plan = self.scheduler.schedule(time.monotonic())
        if not plan:
            return plan.wait
        pixels: dict[tuple[str, int], bytes] = {}
        decoded = self._run("decode", plan.decode, lambda jobs: self._decode(jobs, pixels))
        for job in self.scheduler.finish(decoded):
            self.runner.forget(job)
            self.emit(_output(job, pixels[job.id]))
        for job in self._run("encode", plan.encode, self.runner.encode):
            job.to(JobState.RUNNING)
        began = time.monotonic()
        stepped = self._run("denoise", plan.denoise, lambda jobs: self.runner.denoise(jobs, partial(self._tick, jobs)))
        seconds = time.monotonic() - began
        self.scheduler.advance(stepped)
        if stepped and self.runner.whole_calls:
            self.scheduler.pause(stepped[0].signature, began + seconds, seconds)
        self._tell_progress([(*job.id, job.step, job.steps) for job in stepped if job.signature is None])
        self._tell_stats(stepped, seconds)
        return 0.0

    def heartbeat(self) -> None:
        """Say that the engine lives, and what there is to do."""
        self._tell_stats([], 0.0)

    def generate(self, requests: Iterable[GenerationRequest]) -> list[list[Output]]:
        """Run requests to their ends in this process, batched with each other.

        Returns:
            The outputs of each request, in order.

        Raises:
            RequestError: one of the requests failed; the others' results are lost.
        """
        outputs: dict[tuple[str, int], Output] = {}
        failures: list[Failure] = []
        names: list[tuple[str, int]] = []  # and how many outputs
        keep, self.emit = self.emit, lambda message: _collect(message, outputs, failures)
        try:
            for request in requests:
                names.append((f"generate-{next(self._ids)}", request.n))
                self.submit(Submit(names[-1][0], request, list(range(request.n)), time.monotonic()))
            while not self.idle and not failures:
                time.sleep(self.step())
        finally:
            for name, _ in names:
                self.cancel(name)
            self.emit = keep
        if failures:
            raise REQUEST_ERRORS[failures[0].code](failures[0].message, failures[0].param)
        return [[outputs[name, index] for index in range(n)] for name, n in names]

    def _jobs(self, message: Submit) -> list[Job]:
        request = message.request.resolve(self.runner.info)
        self.runner.check(request)
        tokens, signature = self.runner.tokens(request), self.runner.signature(request)
        alone = message.alone or not self.runner.shares(request)
        return [
            Job(message.request_id, index, request, tokens, message.arrival, alone, signature)
            for index in message.indices
        ]

    @staticmethod
    def _attempt(work: Callable[[], object]) -> RequestError | None:
        """Do what may raise anything; what it raises ends the requests concerned, not the engine."""
        try:
            work()
        except RequestError as error:
            return error
        except Exception:
            log.exception("the model failed")
            return GenerationFailed("the model failed on this request")
        return None

    def _run(self, kind: str, jobs: Sequence[Job], work: Callable[[Sequence[Job]], object]) -> list[Job]:
        """Announce and do one unit of work, then poll. Returns the jobs that have come through it."""
        todo = deque([[job for job in jobs if not job.ended]])
        while todo:
            members = [job for job in todo.popleft() if not job.ended]
            if not members:
                continue
            size = self._announce(kind, members)
            began = time.monotonic()
            error = self._attempt(partial(work, members))
            seconds = time.monotonic() - began
            if error and len(members) > 1:
                todo.extend([job] for job in members)  # nothing has changed: find out who by trying each alone
                continue
            if error:
                self._fail(members[0], error)
            else:
                self._remember(size, seconds)
            for job in members:
                if kind == "encode":
                    job.times.queue = began - job.arrival
                setattr(job.times, kind, getattr(job.times, kind) + seconds)
            self.poll()
        return [job for job in jobs if not job.ended]

    def _announce(self, kind: str, jobs: Sequence[Job]) -> Hashable:
        """Say that a unit of work begins, and how long it may take; returns the kind and size it is remembered by."""
        # Small units say nothing of large ones, nor calls of few steps of those of many.
        size = kind, sum(job.tokens for job in jobs).bit_length(), jobs[0].signature
        self.emit(Unit(kind, [job.id for job in jobs], self._seconds.get(size, FIRST_UNIT_SECONDS)))
        return size

    def _remember(self, size: Hashable, seconds: float) -> None:
        if len(self._seconds) == MOST_SIZES:  # callers choose signatures, and must not fill the memory with them
            self._seconds.clear()
        self._seconds[size] = max(seconds, self._seconds.get(size, 0.0))

    def _tick(self, jobs: Sequence[Job], step: int, steps: int) -> None:
        """Between two steps of a whole call: tell of it and take in what came, for as long as somebody waits for it."""
        self._tell_progress([(*job.id, step, steps) for job in jobs if not job.ended])
        self.poll()
        left = [job for job in jobs if not job.ended]
        if not left:
            raise RequestCancelled("nobody waits for this call any more")
        self.heartbeat()
        self._announce("denoise", left)

    def _decode(self, jobs: Sequence[Job], pictures: dict[tuple[str, int], bytes]) -> None:
        for job, picture in zip(jobs, self.runner.decode(jobs), strict=True):
            if isinstance(picture, RequestError):
                self._fail(job, picture)
            else:
                pictures[job.id] = picture

    def _fail(self, job: Job, error: RequestError) -> None:
        if job.ended:  # cancelled by a poll within the unit of work
            return
        job.fail(error)
        self._forget(job)
        self.emit(_failure(job.id, error))

    def _forget(self, job: Job) -> None:
        self.scheduler.remove(job)
        self.runner.forget(job)

    def _tell_progress(self, jobs: list[tuple[str, int, int, int]]) -> None:
        if jobs:
            self.emit(Progress(jobs))

    def _tell_stats(self, stepped: Sequence[Job], seconds: float) -> None:
        waiting = self.scheduler.waiting
        self.stats = Stats(
            running=len(self.scheduler) - waiting,
            waiting=waiting,
            steps=self.stats.steps + bool(stepped),
            jobs_in_step=len(stepped),
            tokens_in_step=sum(job.tokens for job in stepped),
            step_seconds=seconds if stepped else 0.0,
            peak_memory_mb=self.runner.peak_memory_mb(),
        )
        self.emit(self.stats)


def _failure(job: tuple[str, int], error: RequestError) -> Failure:
    return Failure(*job, error.code, error.message, error.param)


def _output(job: Job, pixels: bytes) -> Output:
    return Output(*job.id, job.seed, *job.request.size, job.request.frames, pixels, job.times)


def _whole_calls(limits: BatchingConfig) -> BatchingConfig:
    """The same limits where encoding and decoding are parts of the call, and are no units of work of their own."""
    return replace(limits, max_encodes_per_step=sys.maxsize, max_decodes_per_step=sys.maxsize)


def _collect(message: FromEngine, outputs: dict[tuple[str, int], Output], failures: list[Failure]) -> None:
    if isinstance(message, Output):
        outputs[message.request_id, message.index] = message
    elif isinstance(message, Failure):
        failures.append(message)
