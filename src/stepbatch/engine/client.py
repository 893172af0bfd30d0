"""The engine as the server sees it: submit, stream, cancel. Imports no torch; the engine is in a process of its own."""

from __future__ import annotations

import asyncio
import logging
import math
import time
import uuid
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from stepbatch.config import EngineConfig, LogConfig
from stepbatch.engine.admission import Admission
from stepbatch.engine.cost import Costs
from stepbatch.engine.handle import Handle, JobProgress
from stepbatch.engine.messages import (
    Cancel,
    Cancelled,
    Failure,
    FromEngine,
    Learned,
    Output,
    Progress,
    Ready,
    Stats,
    Submit,
    Unit,
)
from stepbatch.engine.supervisor import EngineGone, EngineProcess, engine_process
from stepbatch.errors import (
    REQUEST_ERRORS,
    DeadlineExceeded,
    EngineDied,
    EngineUnavailable,
    GenerationFailed,
    InvalidValue,
    RequestCancelled,
    RequestError,
    SetupError,
)
from stepbatch.model_info import ModelInfo
from stepbatch.request import GenerationRequest

log = logging.getLogger(__name__)

ATTEMPTS = 3  # processes in a row that may end before they have begun any work
SHORTEST_PAUSE, LONGEST_PAUSE = 0.1, 1.0  # seconds between two processes; longer each time until one finishes an output
LATE_SECONDS = 0.1  # between two looks for requests that are late, while there is no process to look

State = Literal["starting", "ready", "restarting", "stopping", "failed"]
REFUSALS: dict[State, str] = {  # what new requests are told; while it restarts, they are taken in and held
    "starting": "the engine has not been started",
    "stopping": "the engine is shutting down",
    "failed": "the engine process can't be started again",
}


@dataclass(frozen=True)
class Patience:
    """How long the engine process may say nothing before it counts as hung, seconds."""

    silence: float = 5.0  # at any time; an idle engine is heard once a second
    factor: float = 3.0  # times what a unit of work is expected to take, or what the first start took
    load: float = 3600.0  # until the model is loaded for the first time
    reload: float = 60.0  # until it is loaded again, at least; twice as long after each time that it was not


class AsyncEngine:
    """Runs the engine in a process of its own, and keeps every request until its one ending.

    If the engine process dies or hangs, it is started again and everything that hasn't ended is submitted again, with
    its arrival time and seed. Outputs that were in the unit of work under way are retried once, alone, since one of
    them may be to blame; they end with ``EngineDied`` if it happens again. After ``ATTEMPTS`` starts in a row that
    fail, everything ends with ``EngineUnavailable``.

    Args:
        config: What the engine process runs.
        patience: When it counts as hung.
        log: What the engine process logs, and how; without it, warnings as text.
    """

    def __init__(self, config: EngineConfig, patience: Patience | None = None, log: LogConfig | None = None) -> None:
        self.config = config
        self.log = log or LogConfig(log_level="warning")
        self.patience = patience or Patience()
        self.info: ModelInfo  # of the loaded model, once started
        self.restarts = 0
        self.stop_by = math.inf  # monotonic seconds, once it is told to stop: when what is in flight is ended
        self.admission = Admission(config)
        self.on_message: Callable[[FromEngine], None] | None = None  # sees every message of the engine process
        self._stats = Stats()
        self._handles: dict[str, Handle] = {}  # in order of arrival
        self._process: EngineProcess | None = None  # only while it is loaded and well
        self._supervisor: asyncio.Task[None] | None = None
        self._state: State = "starting"
        self._barren = 0  # processes in a row that died with work submitted before they began any
        self._finished = False  # whether the process has finished any output
        self._load_seconds = 0.0  # that the first start took
        self._looking: asyncio.TimerHandle | None = None  # for late requests, while there is no process

    async def start(self) -> None:
        """Start the engine process and wait until the model is loaded.

        Raises:
            SetupError: it can't be; the message is one line.
        """
        assert self._supervisor is None
        loaded: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._supervisor = asyncio.create_task(self._supervise(loaded), name="engine supervisor")
        self._supervisor.add_done_callback(_tell_of_failure)
        try:
            await asyncio.wait({loaded, self._supervisor}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            if not loaded.done():
                await self.stop()
        if not loaded.done():
            self._supervisor.result()  # raises

    async def stop(self, drain_seconds: float = 0.0) -> None:
        """Refuse new requests, give those in flight ``drain_seconds`` to end, and end the engine process."""
        self._state = "stopping"
        self.stop_by = min(self.stop_by, time.monotonic() + drain_seconds)
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(drain_seconds):
                    for handle in list(self._handles.values()):
                        await handle.wait()
        finally:
            self._end_all(EngineUnavailable(REFUSALS[self._state]))
            if self._supervisor:
                self._supervisor.cancel()
                await asyncio.wait({self._supervisor})

    @property
    def ready(self) -> bool:
        """Whether the engine process is up, loaded and heard of, and not shutting down."""
        return self.state == "ready"

    @property
    def state(self) -> State:
        """What it does: ``failed`` is for good; ``restarting`` is not, and requests are held meanwhile."""
        return "restarting" if self._state == "ready" and not self._up else self._state

    @property
    def pid(self) -> int | None:
        """The engine process's id, while it is up and loaded."""
        return self._up.pid if self._up else None

    @property
    def stats(self) -> Stats:
        """The last statistics that came; while the engine restarts, all that is held counts as waiting."""
        if self._up:
            return self._stats
        held = sum(len(handle.missing) for handle in self._handles.values() if not handle.ended)
        return msgspec.structs.replace(
            self._stats, running=0, waiting=held, jobs_in_step=0, tokens_in_step=0, step_seconds=0.0
        )

    @property
    def costs(self) -> Costs:
        """What is known of what work costs."""
        return self.admission.costs

    def check(self) -> None:
        """Refuse, before anything is read of them, requests that ``submit`` would refuse whatever they ask for.

        Raises:
            EngineUnavailable: the engine is not started, shutting down or broken.
            Overloaded: too much waits already.
        """
        if self._state in REFUSALS:
            raise EngineUnavailable(REFUSALS[self._state])
        self.admission.check()

    def submit(self, request: GenerationRequest, request_id: str | None = None) -> Handle:
        """Take in a request; it then ends exactly once.

        Raises:
            RequestError: the request can't be served by this model, or its id is in use.
            Overloaded: too much waits already, to be let in at all or to be done by the request's deadline.
            DeadlineExceeded: it could not be done by its deadline even alone.
            EngineUnavailable: the engine is not started, shutting down or broken.
        """
        self.check()
        request_id = request_id or uuid.uuid4().hex
        if request_id in self._handles:
            raise InvalidValue("another request with this id has not ended yet", "request_id")
        handle = Handle(request_id, request.resolve(self.info), self.cancel)
        handle.predicted = self.admission.admit(request_id, handle.request, handle.arrival)
        self._handles[request_id] = handle
        self._send(handle)
        return handle

    def cancel(self, request_id: str) -> None:
        """End a request with ``RequestCancelled``; one that has ended, or never was, is left as it is."""
        handle = self._handles.get(request_id)
        if handle and not handle.ended:
            self._end(handle, RequestCancelled("the request was cancelled"))

    @property
    def _up(self) -> EngineProcess | None:
        """The process, unless it has ended, which is known before all that it said last is read."""
        return self._process if self._process and not self._process.ended else None

    def _end(self, handle: Handle, error: RequestError) -> None:
        handle.fail(error)
        self.admission.end(handle.jobs)
        if self._process and handle.in_engine:
            self._process.send(Cancel(handle.request_id))
        self._release(handle)

    def _end_all(self, error: RequestError) -> None:
        for handle in list(self._handles.values()):
            self._end(handle, error)

    def _release(self, handle: Handle) -> None:
        """Forget a request that has ended, once nothing more can come for it, so that its id is free again."""
        if handle.ended and not handle.in_engine:
            del self._handles[handle.request_id]

    def _send(self, handle: Handle) -> None:
        """Submit what is missing of a request; without a process to take it, it is held until there is one."""
        if not self._process:
            return
        handle.in_engine = set(handle.missing)
        for indices, alone in ((handle.in_engine & handle.suspects, True), (handle.in_engine - handle.suspects, False)):
            if indices:
                self._process.send(
                    Submit(handle.request_id, handle.request, sorted(indices), handle.arrival, alone=alone)
                )

    async def _supervise(self, loaded: asyncio.Future[None]) -> None:
        """Keep an engine process running, from the start until ``stop`` or until it can't be started any more."""
        failures, pause = 0, 0.0
        try:
            while failures < ATTEMPTS:
                await asyncio.sleep(pause)
                self._finished = False
                try:
                    async with engine_process(self.config, self.log) as process:
                        ready = await self._loaded(process, failures, first=not loaded.done())
                        await self._attend(process, self._listen(process, ready, loaded))
                        failures = 0
                except SetupError as error:
                    if not loaded.done():
                        raise
                    failures += 1
                    log.error("the engine process could not be restarted (%d of %d): %s", failures, ATTEMPTS, error)
                pause = SHORTEST_PAUSE if self._finished else min(2 * pause + SHORTEST_PAUSE, LONGEST_PAUSE)
        finally:
            self._process = None
            if self._looking:
                self._looking.cancel()
            if self._state == "ready":
                self._state = "failed"
            self._end_all(EngineUnavailable(REFUSALS[self._state]))
            self._handles.clear()

    async def _loaded(self, process: EngineProcess, failures: int, first: bool) -> Ready:
        """Wait until the model is loaded; one that was loaded before should not take much longer than then."""
        if not first:
            usual = max(self.patience.reload, self.patience.factor * self._load_seconds)
            return await process.loaded(usual * 2**failures)
        began = time.monotonic()
        ready = await process.loaded(self.patience.load)
        self._load_seconds = time.monotonic() - began
        return ready

    async def _attend(self, process: EngineProcess, serving: Coroutine[Any, Any, None]) -> None:
        """Serve until the process is gone, or has said what can't be dealt with, which ends it and not this one.

        Raises:
            SetupError: it came to nothing before the process was given any work.
        """
        task = asyncio.create_task(serving, name="engine messages")
        try:
            await asyncio.wait({task})
        finally:
            task.cancel()
        error, begun, self._process = task.exception(), self._process is process, None
        if isinstance(error, EngineGone):
            log.error("the engine process %s", error)
            unit = error.unit
        else:
            log.error("the engine process is ended: what it said could not be dealt with", exc_info=error)
            await process.end()
            unit = process.last_unit()
        if not begun:
            raise SetupError("the engine process could not be taken up") from error
        self._recover(unit)
        self._drop_late()

    def _begin(self, process: EngineProcess, ready: Ready, loaded: asyncio.Future[None]) -> None:
        """Hand everything that is held to a process that has loaded its model."""
        self.info = ready.info
        self.admission.serve(ready.info, ready.costs)
        self._process = process
        if loaded.done():
            self.restarts += 1
        else:
            self._state = "ready"
            loaded.set_result(None)
        for handle in self._handles.values():
            self._send(handle)

    async def _listen(self, process: EngineProcess, ready: Ready, loaded: asyncio.Future[None]) -> None:
        """Give it what is held, and take in messages until it is gone, which raises ``EngineGone``."""
        self._begin(process, ready, loaded)
        patience = self.patience.silence
        while True:
            message = await process.receive(patience)
            expected = message.seconds if isinstance(message, Unit) else 0.0
            patience = max(self.patience.silence, self.patience.factor * expected)
            self._finished |= isinstance(message, Output)
            self._take(message)
            if self.on_message:
                self.on_message(message)

    def _take(self, message: FromEngine) -> None:
        if isinstance(message, Stats):
            self._stats = message
            self.admission.limit(message.token_limit)
        elif isinstance(message, Progress):
            for request_id, *progress in message.jobs:
                if request_id in self._handles:
                    self._handles[request_id].tell(told := JobProgress(*progress))
                    self.admission.advance((request_id, told.index), told.step)
        elif isinstance(message, Unit):
            self.admission.begin(message.jobs)
        elif isinstance(message, Learned):
            self.admission.learn(message.costs)
        elif isinstance(message, Output | Failure | Cancelled) and message.request_id in self._handles:
            self._take_ending(self._handles[message.request_id], message)

    def _take_ending(self, handle: Handle, message: Output | Failure | Cancelled) -> None:
        handle.in_engine.discard(message.index)
        if isinstance(message, Output):
            handle.tell(message)
            self.admission.end([(message.request_id, message.index)])
            if handle.ended:
                self.admission.done(handle.predicted, time.monotonic() - handle.arrival)
            self._release(handle)
        elif isinstance(message, Failure):
            self._end(handle, REQUEST_ERRORS.get(message.code, GenerationFailed)(message.message, message.param))
        else:
            self._end(handle, RequestCancelled("the request was cancelled"))

    def _recover(self, unit: Unit | None) -> None:
        """Decide, after a process is gone, what becomes of each request; ``unit`` is what it was doing."""
        jobs = set(unit.jobs) if unit else set()
        self.admission.restart()
        for handle in list(self._handles.values()):
            handle.in_engine.clear()
            involved = {index for index in handle.missing if (handle.request_id, index) in jobs}
            if involved & handle.suspects:
                handle.fail(EngineDied("the engine process died twice while it worked on this request"))
                self.admission.end(handle.jobs)
            if involved:  # the other outputs have the same prompt, and may be as bad
                handle.suspects.update(handle.missing)
            self._release(handle)
        self._barren = self._barren + 1 if self._handles and unit is None else 0
        if self._barren == ATTEMPTS:  # something that was submitted ends it at once, and there is no telling what
            self._end_all(EngineDied("the engine process dies before it can begin to work on this request"))
            self._barren = 0

    def _drop_late(self) -> None:
        """While there is no process to do it, end requests at their deadlines."""
        if self._looking:
            self._looking.cancel()
        if self._process:
            return
        now = time.monotonic()
        for handle in list(self._handles.values()):
            timeout = handle.request.timeout
            if timeout is not None and handle.arrival + timeout <= now and not handle.ended:
                self._end(handle, DeadlineExceeded("the request could not be done before its deadline"))
        self._looking = asyncio.get_running_loop().call_later(LATE_SECONDS, self._drop_late)


def _tell_of_failure(supervisor: asyncio.Task[None]) -> None:
    """Log what nobody else hears of; what makes a start fail is for who asked for it."""
    error = None if supervisor.cancelled() else supervisor.exception()
    if error and not isinstance(error, SetupError):
        log.critical("the engine process is looked after no more", exc_info=error)
