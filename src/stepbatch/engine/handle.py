"""A request on its way: what has come of it so far, and its one ending."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass

from stepbatch.engine.forecast import Prediction
from stepbatch.engine.messages import Output
from stepbatch.errors import RequestError
from stepbatch.request import GenerationRequest


@dataclass(frozen=True, slots=True)
class JobProgress:
    """An output has taken a step. After a restart of the engine the steps of an output start over."""

    index: int
    step: int  # steps taken
    steps: int  # in all


class Handle:
    """A request on its way; made by ``AsyncEngine.submit``."""

    def __init__(self, request_id: str, request: GenerationRequest, cancel: Callable[[str], None]) -> None:
        self.request_id = request_id
        self.request = request  # resolved: its seed is fixed, so that a retry draws the same picture
        self.arrival = time.monotonic()
        self.predicted: Prediction | None = None  # what it could expect when it came, as far as that was known
        self.in_engine: set[int] = set()  # outputs that the engine process was given and hasn't ended
        self.suspects: set[int] = set()  # outputs to be tried alone: the engine died on one of this request's
        self._cancel = cancel
        self._outputs: dict[int, Output] = {}
        self._error: RequestError | None = None
        self._events: deque[JobProgress | Output] = deque()
        self._news = asyncio.Event()
        self._end = asyncio.Event()

    @property
    def ended(self) -> bool:
        return self._end.is_set()

    @property
    def jobs(self) -> list[tuple[str, int]]:
        """Its outputs as the engine knows them."""
        return [(self.request_id, index) for index in range(self.request.n)]

    @property
    def missing(self) -> list[int]:
        """The outputs that haven't come."""
        return [index for index in range(self.request.n) if index not in self._outputs]

    async def wait(self) -> None:
        """Wait for the request's ending, whichever it is."""
        await self._end.wait()

    async def outputs(self) -> list[Output]:
        """All outputs, by index. If the task that waits here is cancelled, so is the request.

        Raises:
            RequestError: one of the outputs failed, which has ended the others.
        """
        try:
            await self._end.wait()
        finally:
            if not self.ended:
                self._cancel(self.request_id)
        if self._error:
            raise self._error
        return [self._outputs[index] for index in range(self.request.n)]

    async def events(self) -> AsyncGenerator[JobProgress | Output, None]:
        """Every step and every output as they come. Leaving early cancels the request.

        Raises:
            RequestError: one of the outputs failed, which has ended the others.
        """
        try:
            while self._events or not self.ended:
                if self._events:
                    yield self._events.popleft()
                else:
                    self._news.clear()
                    await self._news.wait()
        finally:
            if not self.ended:
                self._cancel(self.request_id)
        if self._error:
            raise self._error

    def tell(self, event: JobProgress | Output) -> None:
        """Take in what came from the engine; nothing changes after the ending."""
        if self.ended or event.index in self._outputs:
            return
        self._events.append(event)
        self._news.set()
        if isinstance(event, Output):
            self._outputs[event.index] = event
            if not self.missing:
                self._end.set()

    def fail(self, error: RequestError) -> None:
        """End the request with ``error``, unless it has ended."""
        if not self.ended:
            self._error = error
            self._end.set()
            self._news.set()
