"""An engine in this process under load: requests come at given times, or as others are done."""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from stepbatch.config import BatchingConfig, EngineConfig
from stepbatch.engine.cost import Costs
from stepbatch.engine.engine import Engine, Runner, Tick
from stepbatch.engine.messages import Failure, FromEngine, Output, Submit
from stepbatch.request import GenerationRequest, Job


@dataclass
class Served:
    """What came of it."""

    seconds: float = 0.0  # from the first arrival to the last output
    latencies: dict[int, float] = field(default_factory=dict)  # seconds, by request
    steps: list[tuple[int, float, float]] = field(default_factory=list)  # jobs, seconds predicted, seconds taken

    @property
    def rate(self) -> float:
        return len(self.latencies) / self.seconds

    @property
    def mean(self) -> float:
        return statistics.fmean(self.latencies.values())

    @property
    def p99(self) -> float:
        return sorted(self.latencies.values())[math.ceil(0.99 * len(self.latencies)) - 1]

    @property
    def width(self) -> float:
        """Jobs in a step, on average."""
        return statistics.fmean(jobs for jobs, _, _ in self.steps)

    @property
    def error(self) -> float:
        """How far a step's seconds were from the prediction, at the median."""
        return statistics.median(abs(predicted / taken - 1) for _, predicted, taken in self.steps)


class Watched:
    """A runner whose steps are timed, and held against what the engine's scheduler thought they would take."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self.engine: Engine | None = None
        self.served = Served()

    def __getattr__(self, name: str) -> object:
        return getattr(self._runner, name)

    def denoise(self, jobs: Sequence[Job], tick: Tick) -> None:
        assert self.engine is not None
        tokens, squares = sum(job.tokens for job in jobs), sum(job.squares for job in jobs)
        predicted = self.engine.scheduler.costs.step.seconds(tokens, squares)
        began = time.perf_counter()
        self._runner.denoise(jobs, tick)
        self.served.steps.append((len(jobs), predicted, time.perf_counter() - began))


def serve(
    runner: Runner,
    costs: Costs,
    limits: BatchingConfig,
    requests: Sequence[GenerationRequest],
    arrivals: Sequence[float] | None = None,
    in_flight: int = 0,
) -> Served:
    """Serve requests that come at their times, in seconds; or, without times, so that there are always so many."""
    watched = Watched(runner)
    served = watched.served
    came: dict[int, float] = {}

    def take(message: FromEngine) -> None:
        assert not isinstance(message, Failure), message
        if isinstance(message, Output):
            served.latencies[int(message.request_id)] = time.monotonic() - came[int(message.request_id)]

    def submit() -> None:
        while len(came) < len(requests):
            index = len(came)
            due = start + arrivals[index] if arrivals is not None else time.monotonic()
            if due > time.monotonic() or (arrivals is None and index - len(served.latencies) >= in_flight):
                return
            came[index] = due
            engine.submit(Submit(str(index), requests[index], [0], due))

    config = EngineConfig(batching=limits)
    engine = Engine(watched, config, emit=take, poll=lambda: submit(), costs=costs)  # type: ignore[arg-type]
    watched.engine = engine
    start = time.monotonic()
    while len(served.latencies) < len(requests):
        submit()
        if engine.idle and arrivals is not None:
            time.sleep(max(0.0, start + arrivals[len(came)] - time.monotonic()))
            continue
        time.sleep(engine.step())
    served.seconds = time.monotonic() - start
    return served


def poisson(rate: float, count: int, seed: int) -> list[float]:
    """Arrivals at so many a second, seconds."""
    random_ = random.Random(seed)
    times = [0.0]
    for _ in range(count - 1):
        times.append(times[-1] + random_.expovariate(rate))
    return times
