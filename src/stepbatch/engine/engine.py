"""The loop: schedule, decode, encode, denoise, one denoising step at a time. No torch here; the runner has it."""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import partial
from itertools import count
from typing import Protocol

from stepbatch.config import EngineConfig
from stepbatch.engine.clock import DeviceClock
from stepbatch.engine.cost import UNKNOWN, Costs
from stepbatch.engine.decode_time import decode_room
from stepbatch.engine.memory import TokenLimit, tokens_within
from stepbatch.engine.messages import Cancelled, Failure, FromEngine, Learned, Output, Progress, Stats, Submit, Unit
from stepbatch.engine.meter import Encoded, Meter
from stepbatch.engine.plan import Plan
from stepbatch.engine.scheduler import Scheduler
from stepbatch.engine.width import limits_of
from stepbatch.errors import (
    REQUEST_ERRORS,
    DeadlineExceeded,
    DeviceLost,
    GenerationFailed,
    OutOfMemory,
    RequestCancelled,
    RequestError,
)
from stepbatch.model_info import ModelInfo
from stepbatch.request import GenerationRequest, Job, JobState

log = logging.getLogger(__name__)

Tick = Callable[[int, int], None]


class Runner(Protocol):
    """What the engine needs of the thing that computes; ``engine.runner`` has the real one, ``testing`` a fake.

    The methods that take jobs change nothing if they raise, so that the engine may call them again with fewer. They
    raise ``MemoryError`` where there was no room, and ``DeviceLost`` where this process can do no more.
    """

    info: ModelInfo
    whole_calls: bool  # whether ``denoise`` takes all of a job's steps at once
    clock: DeviceClock  # of what computes

    def check(self, request: GenerationRequest) -> None:
        """Raise ``RequestError`` for a resolved request that the model can't serve."""

    def lengths(self, request: GenerationRequest) -> tuple[int, ...]:
        """What a step of one output costs: the tokens of each of its sequences."""

    def signature(self, request: GenerationRequest) -> Hashable | None:
        """What jobs that share a whole call have in common; ``None`` where any may share a step."""

    def shares(self, request: GenerationRequest) -> bool:
        """Whether this request's jobs can share a step with others, or with each other."""

    def encode(self, jobs: Sequence[Job]) -> Encoded:
        """Make prompt embeddings, noise and noise schedule; returns what was not found in a cache."""

    def denoise(self, jobs: Sequence[Job], tick: Tick) -> None:
        """Take one denoising step of every job, in one forward pass; or, in whole calls, all of them.

        Args:
            jobs: With whole calls, they have the same signature; some may end before the call does.
            tick: Called between the steps of a whole call, with how many are done, of how many. It raises
                ``RequestError`` when nobody waits for any of the jobs any more.
        """

    def decode(self, jobs: Sequence[Job], seconds: float = math.inf) -> list[bytes | RequestError | None]:
        """Make RGB pixels, 8 bits each, frame by frame, rows from the top; or say what is wrong with a job's output.

        Args:
            jobs: In order: what is under way goes on if it is first, and is given up and begun anew if not.
            seconds: After so long, the rest is put off; something is done in any case.

        Returns:
            ``None`` for those that are to be asked for again.
        """

    def decode_beside(self, jobs: Sequence[Job]) -> list[bytes | RequestError | None]:
        """The same beside steps, where the device can do that: begins with them, or looks who is done, and returns."""

    def forget(self, job: Job) -> None:
        """Free what is held for a job that has ended, if anything is."""

    def peak_memory_mb(self) -> float:
        """The most memory that was in use since the start, MiB."""

    def memory_budget(self) -> float:
        """The memory that the model and all that it does may take, bytes; endless where that isn't known."""

    def streamed_seconds(self) -> float:
        """How long a step's weights that don't stay on the device take to get there, measured; zero where all stay."""

    def free_memory(self) -> None:
        """After a ``MemoryError``: let go of what can be made again."""


class Engine:
    """Runs jobs to their endings; each accepted job ends exactly once, told through ``emit``.

    Args:
        runner: Computes.
        config: The batching limits are read here.
        emit: Takes every message: units of work as they begin, progress, endings, statistics.
        poll: Called between units of work; may call ``submit`` and ``cancel``.
        costs: What work costs, as far as it is known at the start.
    """

    def __init__(
        self,
        runner: Runner,
        config: EngineConfig,
        emit: Callable[[FromEngine], None] = lambda message: None,
        poll: Callable[[], None] = lambda: None,
        costs: Costs = UNKNOWN,
    ) -> None:
        self.runner = runner
        self.scheduler = Scheduler(limits_of(config.batching, runner.whole_calls), costs)
        self.emit = emit
        self.poll = poll
        self.stats = Stats()
        self._meter = Meter(runner.clock, costs, runner.whole_calls)
        usual = runner.info.defaults
        pixels = usual.width * usual.height * (usual.num_frames or 1)
        self._limit = TokenLimit(tokens_within(costs, runner.memory_budget(), pixels))
        self._step_seconds = 0.0  # of the last
        self._pixels: dict[tuple[str, int], bytes] = {}  # that have been decoded and not yet been told
        self._ids = count()

    def submit(self, message: Submit) -> None:
        """Take in a request's jobs, or emit the failure of each."""
        accepted: list[Job] = []
        error = self.attempt(lambda: accepted.extend(self._jobs(message)))
        if error:
            for index in message.indices:
                self.emit(_failure((message.request_id, index), error))
        for job in accepted:
            self.scheduler.add(job, time.monotonic())

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
        now = time.monotonic()
        self._drop_late(now)
        self.scheduler.limit(self._limit.at(now))
        plan = self.scheduler.schedule(now)
        if not plan:
            self._meter.idle()
            return plan.wait
        self._decode_all(plan)
        for job in self._run("encode", plan.encode, self.runner.encode):
            job.to(JobState.RUNNING)
        began = time.monotonic()
        stepped = self._run("denoise", plan.denoise, lambda jobs: self.runner.denoise(jobs, partial(self._tick, jobs)))
        seconds = time.monotonic() - began
        self._step_seconds = seconds if stepped else self._step_seconds
        self.scheduler.advance(stepped, began + seconds)
        if stepped and self.runner.whole_calls:
            self.scheduler.pause(stepped[0].signature, began + seconds, seconds)
        self._tell_progress([(*job.id, job.step, job.steps) for job in stepped if job.signature is None])
        self._tell_stats(stepped, seconds)
        self._learn()
        return 0.0

    def _drop_late(self, now: float) -> None:
        for job in self.scheduler.late(now):
            self._fail(job, DeadlineExceeded("the request could not be done before its deadline"))

    def _learn(self) -> None:
        """Go by what was measured, where it is news."""
        costs = self._meter.news()
        if costs:
            self.scheduler.learn(costs, time.monotonic())
            self.emit(Learned(costs))

    def heartbeat(self) -> None:
        """Say that the engine lives, and what there is to do."""
        self._tell_stats([], 0.0)

    def generate(self, requests: Iterable[GenerationRequest]) -> list[list[Output]]:
        """Run requests to their ends in this process, batched with each other.

        Returns:
            The outputs of each request, in order.

        Raises:
            RequestError: one of the requests failed; the others' results are lost.
            DeviceLost: this process can do no more.
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
                wait = self.step()
                time.sleep(0.0 if self.idle else wait)
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
        lengths, signature = self.runner.lengths(request), self.runner.signature(request)
        alone = message.alone or not self.runner.shares(request)
        return [
            Job(message.request_id, index, request, lengths, message.arrival, alone, signature)
            for index in message.indices
        ]

    @staticmethod
    def attempt(work: Callable[[], object]) -> RequestError | None:
        """Do what may raise anything; what it raises ends the requests concerned, not the engine."""
        try:
            work()
        except RequestError as error:
            return error
        except DeviceLost:
            raise
        except MemoryError as error:
            log.warning("out of memory: %s", error)
            return OutOfMemory("there is not enough memory for this request")
        except Exception:
            log.exception("the model failed")
            return GenerationFailed("the model failed on this request")
        return None

    def _run(self, kind: str, jobs: Sequence[Job], work: Callable[[Sequence[Job]], object]) -> list[Job]:
        """Announce and do one unit of work, then poll. Returns the jobs that have come through it."""
        todo = deque([[job for job in jobs if not job.ended]])
        tried: set[Job] = set()  # again, by themselves
        while todo:
            members = [job for job in todo.popleft() if not job.ended]
            if not members:
                continue
            self._announce(kind, members)
            self._meter.begin()
            began = time.monotonic()
            made: list[object] = []
            error = self.attempt(partial(_into, made, work, members))
            seconds = time.monotonic() - began
            if error and (again := self._again(kind, members, error, tried)):
                todo.extend(again)
                continue
            if error:
                self._fail(members[0], error)
            elif kind == "decode" and not all(job.ended or job.id in self._pixels for job in members):
                self._meter.paused(members, seconds)
            else:
                self._meter.done(kind, members, seconds, made[0])
            for job in members:
                if kind == "encode":
                    job.times.queue = began - job.arrival
                setattr(job.times, kind, getattr(job.times, kind) + seconds)
            self.poll()
        return [job for job in jobs if not job.ended]

    def _again(self, kind: str, jobs: list[Job], error: RequestError, tried: set[Job]) -> list[list[Job]]:
        """Who is to be tried again, together, after a unit of work that has changed nothing."""
        if not isinstance(error, OutOfMemory):
            return [[job] for job in jobs] if len(jobs) > 1 else []  # to find out who it was
        self.runner.free_memory()
        if kind == "denoise":
            tokens = sum(job.tokens for job in jobs)
            self._limit.lower(tokens, time.monotonic())
            log.warning("a step of %d tokens was too much: %.0f are the most for now", tokens, self._limit.tokens)
        if len(jobs) > 1:
            return [jobs[: len(jobs) // 2], jobs[len(jobs) // 2 :]]
        if jobs[0] in tried:
            return []
        tried.update(jobs)
        return [jobs]

    def _announce(self, kind: str, jobs: Sequence[Job]) -> None:
        """Say that a unit of work begins, and how long it may take."""
        self.emit(Unit(kind, [job.id for job in jobs], self._meter.expected(kind, jobs)))

    def _tick(self, jobs: Sequence[Job], step: int, steps: int) -> None:
        """Between two steps of a whole call: tell of it and take in what came, for as long as somebody waits for it."""
        self._tell_progress([(*job.id, step, steps) for job in jobs if not job.ended])
        self.poll()
        self._drop_late(time.monotonic())
        left = [job for job in jobs if not job.ended]
        if not left:
            raise RequestCancelled("nobody waits for this call any more")
        self.heartbeat()
        self._announce("denoise", left)

    def _decode_all(self, plan: Plan) -> None:
        """Decode, all together where that is short; else one after the other, for as long as others may wait."""
        beside = self.scheduler.costs.beside and bool(plan.denoise)
        seconds = math.inf if beside else decode_room(plan, self.scheduler.costs, self._step_seconds)
        until = time.monotonic() + seconds
        for jobs in [plan.decode] if seconds == math.inf else [[job] for job in plan.decode]:
            decoded = self._run("decode", jobs, self._decode_beside if beside else partial(self._decode, until=until))
            for job in self.scheduler.finish(job for job in decoded if job.id in self._pixels):
                self.runner.forget(job)
                self.emit(_output(job, self._pixels.pop(job.id)))
            if time.monotonic() >= until or not all(job.ended for job in jobs):
                break

    def _decode(self, jobs: Sequence[Job], until: float) -> None:
        self._take(jobs, self.runner.decode(jobs, until - time.monotonic()))

    def _decode_beside(self, jobs: Sequence[Job]) -> None:
        self._take(jobs, self.runner.decode_beside(jobs))

    def _take(self, jobs: Sequence[Job], pictures: Sequence[bytes | RequestError | None]) -> None:
        for job, picture in zip(jobs, pictures, strict=True):
            if isinstance(picture, RequestError):
                self._fail(job, picture)
            elif picture is not None and not job.ended:
                self._pixels[job.id] = picture

    def _fail(self, job: Job, error: RequestError) -> None:
        if job.ended:  # cancelled by a poll within the unit of work
            return
        job.fail(error)
        self._forget(job)
        self.emit(_failure(job.id, error))

    def _forget(self, job: Job) -> None:
        self.scheduler.remove(job)
        self.runner.forget(job)
        self._pixels.pop(job.id, None)

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
            token_limit=self._limit.tokens,
        )
        self.emit(self.stats)


def _failure(job: tuple[str, int], error: RequestError) -> Failure:
    return Failure(*job, error.code, error.message, error.param)


def _output(job: Job, pixels: bytes) -> Output:
    return Output(*job.id, job.seed, *job.request.size, job.request.frames, pixels, job.times)


def _into(made: list[object], work: Callable[[Sequence[Job]], object], jobs: Sequence[Job]) -> None:
    made.append(work(jobs))


def _collect(message: FromEngine, outputs: dict[tuple[str, int], Output], failures: list[Failure]) -> None:
    if isinstance(message, Output):
        outputs[message.request_id, message.index] = message
    elif isinstance(message, Failure):
        failures.append(message)
