"""What every measurement needs: side-by-side repeats, the figures that come of them, requests to serve."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch

from stepbatch.config import BatchingConfig, EngineConfig
from stepbatch.demo.scenes import sample_scene
from stepbatch.model_info import ModelInfo
from stepbatch.request import GenerationRequest

T = TypeVar("T")

SEED = 2026
MIXED_SIZES = ((128, 128), (192, 128), (160, 160), (256, 160), (144, 192), (208, 208), (128, 176), (256, 256))


@dataclass(frozen=True)
class Effort:
    """How long is measured."""

    step_repeats: tuple[int, int] = (5, 31)  # at least, at most
    step_seconds: float = 1.5  # a case's time between those two bounds
    step_jobs: tuple[int, ...] = (1, 2, 4, 8, 16)
    threads: tuple[int, ...] = (1, 2)
    loop_repeats: int = 7
    loop_groups: int = 2
    loop_steps: int = 12
    host_steps: int = 200
    waiting: int = 1000
    requests: int = 48
    burst_repeats: tuple[int, ...] = (3, 1)  # for each of ``threads``
    poisson_repeats: int = 3


QUICK = Effort(
    step_repeats=(1, 1),
    step_seconds=0.0,
    step_jobs=(1, 4),
    loop_repeats=1,
    loop_groups=1,
    loop_steps=2,
    host_steps=8,
    waiting=50,
    threads=(1,),
    requests=4,
    burst_repeats=(1,),
    poisson_repeats=1,
)


@dataclass(frozen=True)
class Figure:
    """One number of the report, and what it should be."""

    name: str
    value: float
    at_least: float | None = None
    at_most: float | None = None

    @property
    def met(self) -> bool | None:
        """Whether the goal is reached; ``None`` where there is none."""
        if self.at_least is None and self.at_most is None:
            return None
        low = -float("inf") if self.at_least is None else self.at_least
        high = float("inf") if self.at_most is None else self.at_most
        return low <= self.value <= high


@dataclass
class Case:
    """One thing measured: what it was, its figures, and what they were made of, seconds of every repeat."""

    name: str
    figures: list[Figure]
    raw: Mapping[str, Any]
    settings: dict[str, Any] = field(default_factory=dict)


def alternate(
    works: Mapping[str, Callable[[], T]], least: int, most: int | None = None, seconds: float = 0.0
) -> dict[str, list[T]]:
    """Do the works in turn, over and over, so that what disturbs the machine disturbs all of them.

    Args:
        works: By name. The order is reversed every other time, so that none always comes after the same other.
        least: Repeats.
        most: As many as this, if ``seconds`` allow.
        seconds: After ``least`` repeats, no new one begins later than this.
    """
    results: dict[str, list[T]] = {name: [] for name in works}
    names = list(works)
    began = time.perf_counter()
    for i in range(most or least):
        if i >= least and time.perf_counter() - began > seconds:
            break
        for name in names if i % 2 == 0 else reversed(names):
            results[name].append(works[name]())
    return results


def timed(work: Callable[[], object]) -> Callable[[], float]:
    """``work`` that returns its seconds."""

    def run() -> float:
        began = time.perf_counter()
        work()
        return time.perf_counter() - began

    return run


def ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """The ratio of the medians."""
    return statistics.median(above) / statistics.median(below)


def told(thread_count: int) -> str:
    """A number of threads in words."""
    return f"{thread_count} thread{'s' * (thread_count > 1)}"


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Compute with so many threads inside the context."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def with_batching(config: EngineConfig, **limits: int) -> EngineConfig:
    """The default limits but for those given."""
    return replace(config, batching=BatchingConfig(**limits))


def make_request(
    info: ModelInfo, rng: random.Random, size: tuple[int, int], steps: int, guidance: float
) -> GenerationRequest:
    """A resolved request for a picture of a random scene."""
    return GenerationRequest(
        prompt=sample_scene(rng).prompt(),
        width=size[0],
        height=size[1],
        num_inference_steps=steps,
        guidance_scale=guidance,
        seed=rng.randrange(2**31),
    ).resolve(info)


def equal_requests(info: ModelInfo, count: int, steps: int = 12) -> list[GenerationRequest]:
    """Pictures of 128 pixels square, with as many guided steps."""
    rng = random.Random(SEED)
    return [make_request(info, rng, (128, 128), steps, 3.0) for _ in range(count)]


def mixed_requests(info: ModelInfo, count: int) -> list[GenerationRequest]:
    """Every side from 128 to 256 pixels, 4 to 20 steps, a quarter of them without guidance."""
    rng = random.Random(SEED)

    def side() -> int:
        return rng.randrange(128, 257, 16)

    return [
        make_request(info, rng, (side(), side()), rng.randint(4, 20), rng.choice((0.0, 2.0, 3.0, 4.0)))
        for _ in range(count)
    ]
