"""How long units of work take: measured for learning, and said beforehand, so that one that hangs is known as such."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from stepbatch.engine.clock import DeviceClock, Moment, between
from stepbatch.engine.cost import Costs, prompts_of
from stepbatch.engine.learning import Learning
from stepbatch.request import Job

FIRST_SECONDS = 600.0  # what a unit is said to take while nothing is known
DOUBT, LEAST_SECONDS = 10.0, 20.0  # what is only predicted may take so many times as long, and at least so long
MOST_SIZES = 4096  # that are remembered at once


class Encoded(NamedTuple):
    """What a unit of encoding has made, and not found in a cache."""

    prompts: int
    images: list[int]  # the pixels of each


@dataclass(frozen=True, eq=False)
class _Unit:
    """A unit of work that the device may still be at."""

    kind: str  # encode, denoise or decode
    jobs: Sequence[Job]
    spans: Sequence[tuple[Moment, Moment]]  # in which it was at it
    host: float  # seconds, by the host's clock
    encoded: Encoded | None = None


class _Open(NamedTuple):
    """A unit, or a part of one, that the host is done with, and that lasts until the next begins."""

    unit: _Unit
    began: Moment
    whole: bool  # or the rest is to come


class Meter:
    """Times units of work and learns from them. A unit lasts until the next begins: what the engine does after it
    keeps the others waiting just as well.

    Args:
        clock: Of what computes.
        costs: What is known at the start.
        whole_calls: Whether a unit of denoising is all of its jobs' steps, encoding and decoding included.
    """

    def __init__(self, clock: DeviceClock, costs: Costs, whole_calls: bool) -> None:
        self.clock = clock
        self._learning = Learning(costs, one_size=whole_calls)  # whose width goes by the flags, whatever they cost
        self._whole_calls = whole_calls
        self._units: deque[_Unit] = deque()
        self._began: Moment = 0.0
        self._open: _Open | None = None
        self._paused: _Unit | None = None
        self._longest: dict[Hashable, float] = {}  # seconds of a unit of this kind and size, by the host's clock

    def expected(self, kind: str, jobs: Sequence[Job]) -> float:
        """How long a unit may take, seconds: as long as the longest of its size, or as is predicted."""
        predicted, longest = self._predicted(kind, jobs), self._longest.get(_size(kind, jobs))
        if longest is not None:
            return max(longest, predicted)
        return max(DOUBT * predicted, LEAST_SECONDS) if self._learning.costs.known else FIRST_SECONDS

    def begin(self) -> None:
        """A unit begins, and with it ends the one before."""
        self._began = self.clock.mark()
        self._close(self._began)

    def idle(self) -> None:
        """There is nothing to do."""
        if self._open:
            self._close(self.clock.mark())

    def done(self, kind: str, jobs: Sequence[Job], seconds: float, made: object = None) -> None:
        """What began last has been given to the device, all went well, and the host was at it for so many seconds."""
        unit = self._unit(kind, jobs, seconds)
        if isinstance(made, Encoded):
            unit = replace(unit, encoded=made)
        self._open = _Open(unit, self._began, True)
        size = _size(kind, jobs)
        if len(self._longest) == MOST_SIZES:  # callers choose signatures, and must not fill the memory with them
            self._longest.clear()
        self._longest[size] = max(unit.host, self._longest.get(size, 0.0))

    def paused(self, jobs: Sequence[Job], seconds: float) -> None:
        """The same of a part of a decoding, which is to go on."""
        self._open = _Open(self._unit("decode", jobs, seconds), self._began, False)

    def news(self) -> Costs | None:
        """What is known now, where it has changed; looks at the units that the device is through with."""
        while self._units and self.clock.passed(self._units[0].spans[-1][1]):
            unit = self._units.popleft()
            self._learn(unit, max(sum(between(*span) for span in unit.spans), 1e-6))
        return self._learning.news()

    def _unit(self, kind: str, jobs: Sequence[Job], seconds: float) -> _Unit:
        earlier = self._paused
        if kind == "decode" and earlier:
            self._paused = None
            if earlier.jobs == jobs:
                return replace(earlier, host=earlier.host + seconds)
        return _Unit(kind, jobs, [], seconds)

    def _close(self, moment: Moment) -> None:
        """The unit that is open has ended."""
        if self._open:
            unit = replace(self._open.unit, spans=[*self._open.unit.spans, (self._open.began, moment)])
            if self._open.whole:
                self._units.append(unit)
            else:
                self._paused = unit
            self._open = None

    def _learn(self, unit: _Unit, seconds: float) -> None:
        kind, jobs = unit.kind, unit.jobs
        tokens, squares = sum(job.tokens for job in jobs), sum(job.squares for job in jobs)
        if self._whole_calls:
            if kind == "denoise":
                rest = self._learning.costs.decode_of(jobs)
                self._learning.step(tokens, squares, max(seconds - rest, 0.1 * seconds) / jobs[0].steps)
        elif kind == "denoise":
            self._learning.step(tokens, squares, seconds)
        elif kind == "decode":
            if not self._learning.costs.beside:  # where its own time can't be told from the steps'
                self._learning.decode([job.pixels for job in jobs], seconds)
        elif unit.encoded and any(unit.encoded):
            self._learning.encode(*unit.encoded, seconds)

    def _predicted(self, kind: str, jobs: Sequence[Job]) -> float:
        costs = self._learning.costs
        if kind == "decode":
            return costs.decode_of(jobs)
        if kind == "encode":
            prompts, images = encoded_anew(jobs)
            return prompts * costs.prompt.of(1) + sum(map(costs.image.of, images))
        step = costs.step_of(jobs)
        return jobs[0].steps * step + costs.decode_of(jobs) if self._whole_calls else step


def _size(kind: str, jobs: Sequence[Job]) -> Hashable:
    """Small units say nothing of large ones, nor calls of few steps of those of many."""
    return kind, sum(job.tokens for job in jobs).bit_length(), jobs[0].signature


def encoded_anew(jobs: Sequence[Job]) -> Encoded:
    """What encoding makes where nothing was seen before: once for all jobs of a request."""
    requests = {job.request_id: job for job in jobs}.values()
    return Encoded(sum(map(prompts_of, requests)), [job.pixels for job in requests for _ in job.request.images])
