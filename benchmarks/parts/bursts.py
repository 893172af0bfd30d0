"""Bursts and arrivals: the same requests served with batching, one at a time, and by diffusers' own pipeline."""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from parts.common import (
    SEED,
    Case,
    Effort,
    Figure,
    alternate,
    equal_requests,
    mixed_requests,
    threads,
    told,
    with_batching,
)
from stepbatch.config import EngineConfig
from stepbatch.engine.engine import Engine
from stepbatch.engine.messages import Failure, FromEngine, Output, Stats, Submit
from stepbatch.engine.runner import TorchRunner
from stepbatch.models.base import Model
from stepbatch.request import GenerationRequest

CONCURRENCY = 16
LOAD = 0.7  # of what one at a time can serve


@dataclass
class Served:
    """What came of serving some requests."""

    seconds: float
    latencies: list[float]  # seconds, by the requests' order
    jobs_per_step: float = 1.0

    @property
    def mean(self) -> float:
        return statistics.fmean(self.latencies)

    @property
    def p50(self) -> float:
        return statistics.median(self.latencies)

    @property
    def p99(self) -> float:
        return sorted(self.latencies)[math.ceil(0.99 * len(self.latencies)) - 1]


Serve = Callable[[Sequence[GenerationRequest]], Served]


class Front:
    """Takes the place of the server: submits requests to an engine in this process and takes the time of each."""

    def __init__(self, model: Model, config: EngineConfig) -> None:
        self.engine = Engine(TorchRunner(model), config, emit=self._take)
        self.arrivals: list[float] = []
        self.latencies: dict[int, float] = {}
        self.widths: list[int] = []

    def closed_loop(self, requests: Sequence[GenerationRequest]) -> Served:
        """Keep ``CONCURRENCY`` requests in flight: as one ends, the next is submitted."""
        began = time.monotonic()
        while len(self.latencies) < len(requests):
            for request in requests[len(self.arrivals) : len(self.latencies) + CONCURRENCY]:
                self._submit(request, time.monotonic())
            self.engine.step()
        return self._served(began)

    def open_loop(self, requests: Sequence[GenerationRequest], arrivals: Sequence[float]) -> Served:
        """Submit each request at its own time, whatever has become of the others; latency counts from that time."""
        began = time.monotonic()
        while len(self.latencies) < len(requests):
            now = time.monotonic() - began
            while len(self.arrivals) < len(requests) and arrivals[len(self.arrivals)] <= now:
                self._submit(requests[len(self.arrivals)], began + arrivals[len(self.arrivals)])
            if self.engine.idle:
                time.sleep(arrivals[len(self.arrivals)] - now)
            else:
                self.engine.step()
        return self._served(began)

    def _submit(self, request: GenerationRequest, arrival: float) -> None:
        self.engine.submit(Submit(str(len(self.arrivals)), request, [0], arrival))
        self.arrivals.append(arrival)

    def _take(self, message: FromEngine) -> None:
        match message:
            case Output():
                index = int(message.request_id)
                self.latencies[index] = time.monotonic() - self.arrivals[index]
            case Failure():
                raise RuntimeError(message.message)
            case Stats(jobs_in_step=width) if width:
                self.widths.append(width)

    def _served(self, began: float) -> Served:
        latencies = [self.latencies[i] for i in range(len(self.arrivals))]
        return Served(time.monotonic() - began, latencies, statistics.fmean(self.widths))


def plain_loop(pipeline: Any, requests: Sequence[GenerationRequest]) -> Served:
    """diffusers' own pipeline, request after request, with as many of them waiting as ``Front.closed_loop`` keeps."""
    began = time.monotonic()
    ends: list[float] = []
    for request in requests:
        pipeline(
            prompt=request.prompt,
            negative_prompt=request.negative_prompt,
            width=request.width,
            height=request.height,
            num_inference_steps=request.num_inference_steps,
            guidance_scale=request.guidance_scale,
            max_sequence_length=request.max_sequence_length,
            generator=torch.Generator("cpu").manual_seed(request.seed or 0),
        )
        ends.append(time.monotonic())
    submitted = [began] * CONCURRENCY + ends
    return Served(ends[-1] - began, [end - start for start, end in zip(submitted, ends, strict=False)])


def bursts(
    model: Model, pipeline: Any, config: EngineConfig, effort: Effort, progress: Callable[[str], None]
) -> list[Case]:
    """Closed loops over mixed requests and equal ones."""
    one = with_batching(config, dynamic_batch_max_size=1)
    works: dict[str, Serve] = {
        "batching": lambda requests: Front(model, config).closed_loop(requests),
        "one at a time": lambda requests: Front(model, one).closed_loop(requests),
        "diffusers": lambda requests: plain_loop(pipeline, requests),
    }
    cases = []
    for count, repeats in zip(effort.threads, effort.burst_repeats, strict=True):
        for name, make, goal in (("mixed", mixed_requests, 1.0), ("128x128", equal_requests, 1.3)):
            progress(f"bursts: {told(count)}, {name}")
            with threads(count):
                served = _serve(works, make(model.info, effort.requests), repeats)
            settings = {"threads": count, "requests": effort.requests, "concurrency": CONCURRENCY}
            label = f"{name}, {told(count)}, against "
            cases += [
                _compare(label + other, served, other, settings, goal if count == 1 else None)
                for other in ("one at a time", "diffusers")
            ]
    return cases


def _serve(works: Mapping[str, Serve], requests: list[GenerationRequest], repeats: int) -> dict[str, list[Served]]:
    for work in works.values():
        work(requests[:2])  # what is set up once is not measured
    bound = {name: lambda work=work: work(requests) for name, work in works.items()}
    return alternate(bound, repeats)


def poisson(model: Model, config: EngineConfig, effort: Effort, progress: Callable[[str], None]) -> list[Case]:
    """Mixed requests that arrive at random times, at ``LOAD`` of what one at a time can serve; one thread."""
    progress("poisson arrivals")
    one = with_batching(config, dynamic_batch_max_size=1)
    requests = mixed_requests(model.info, effort.requests)
    with threads(1):
        capacity = len(requests) / Front(model, one).closed_loop(requests).seconds
        served: dict[str, list[Served]] = {"batching": [], "one at a time": []}
        for repeat in range(effort.poisson_repeats):
            rng = random.Random(SEED + repeat)
            arrivals = [0.0]
            for _ in requests[1:]:
                arrivals.append(arrivals[-1] + rng.expovariate(LOAD * capacity))
            works = {
                "batching": lambda arrivals=arrivals: Front(model, config).open_loop(requests, arrivals),
                "one at a time": lambda arrivals=arrivals: Front(model, one).open_loop(requests, arrivals),
            }
            for name, results in alternate(works, 1).items():
                served[name] += results
    settings = {"threads": 1, "requests": len(requests), "load": LOAD, "capacity": capacity}
    return [_compare("mixed, 1 thread, against one at a time", served, "one at a time", settings, None)]


def _compare(
    name: str, served: Mapping[str, list[Served]], other: str, settings: dict[str, Any], throughput: float | None
) -> Case:
    """Batching over the other; ``throughput`` is the goal for it, and with it goes one for the mean latency."""

    def over(measure: Callable[[Served], float]) -> float:
        medians = [statistics.median(map(measure, served[which])) for which in ("batching", other)]
        return medians[0] / medians[1]

    figures = [
        Figure("throughput", 1 / over(lambda s: s.seconds), at_least=throughput),
        Figure("mean latency", over(lambda s: s.mean), at_most=None if throughput is None else 0.8),
        Figure("p50 latency", over(lambda s: s.p50)),
        Figure("p99 latency", over(lambda s: s.p99)),
        Figure("jobs a step", statistics.median(s.jobs_per_step for s in served["batching"])),
    ]
    raw = {which: [asdict(s) for s in served[which]] for which in ("batching", other)}
    return Case(name, figures, raw, settings)
