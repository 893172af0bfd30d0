"""What a simulation is kept as: JSON of these types."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import msgspec
import numpy as np

from stepbatch.bench.results import Record
from stepbatch.bench.simulate.cluster import Course
from stepbatch.bench.simulate.kinds import Kind
from stepbatch.bench.sweep.tipping import kept_up

SAMPLED = 2000  # requests that are looked at to tell whether the replicas kept up

LoadUnit = Literal["load", "rate", "concurrency", "trace"]


class Setting(msgspec.Struct, frozen=True, kw_only=True):
    """What one run differs from others in."""

    unit: LoadUnit
    amount: float  # a share of full capacity, requests a second, or requests in flight; of a trace, 1
    policy: str
    ageing: float | None  # seconds a second; None where the policy has no use for it
    width: int | None  # the most jobs in a step; None is as many as pay
    replicas: int
    routing: str


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """The figures of one run. Times are seconds."""

    setting: Setting
    rate: float  # requests a second that came
    requests: int
    finished: int
    refused: int  # on arrival
    dropped: int  # before they began, as their deadline could not be met
    duration: float  # until the last one ended
    throughput: float  # finished requests a second
    mean: float | None  # latency of those that finished
    p50: float | None
    p99: float | None
    attainment: float | None  # the share of all requests that met their goal, where any has one
    goodput: float | None  # requests a second that did
    utilisation: float  # the share of the replicas' time in which they had something to do
    width_mean: float  # jobs in a step
    widths: dict[int, int]  # jobs in a step -> steps
    steady: bool  # the queue would not grow without end
    took: float = 0.0  # seconds that the simulation itself took


class SimulationResult(msgspec.Struct, kw_only=True):
    """All runs."""

    kind: Literal["simulation"] = "simulation"
    created: str  # ISO 8601, UTC
    environment: dict[str, Any]  # versions and machine that it was simulated on
    options: dict[str, Any]  # the flags
    curve: str  # its name
    note: str  # where its figures come from
    capacity: float  # requests a second that one replica takes, with steps as wide as pays
    outcomes: list[Outcome] = []


def summed(course: Course, kinds: Sequence[Kind], setting: Setting, took: float = 0.0) -> Outcome:
    """A run's figures."""
    came, ended = np.array(course.came), np.array(course.ended)
    done = ~np.isnan(ended)
    latencies = (ended - came)[done]
    goals = np.array([math.nan if kind.goal is None else kind.goal for kind in kinds])
    asked, met = ~np.isnan(goals), (ended - came) <= goals  # nan is never within
    steps = sum(course.widths.values())
    p50, p99 = np.percentile(latencies, [50, 99]).tolist() if len(latencies) else (None, None)
    seconds = course.duration or math.inf
    return Outcome(
        setting=setting,
        rate=_rate(course.came),
        requests=len(kinds),
        finished=int(done.sum()),
        refused=course.refused,
        dropped=course.dropped,
        duration=course.duration,
        throughput=len(latencies) / seconds,
        mean=float(latencies.mean()) if len(latencies) else None,
        p50=p50,
        p99=p99,
        attainment=float(met.sum() / asked.sum()) if asked.any() else None,
        goodput=float(met.sum() / seconds) if asked.any() else None,
        utilisation=course.busy / seconds / setting.replicas,
        width_mean=sum(jobs * count for jobs, count in course.widths.items()) / max(1, steps),
        widths=dict(sorted(course.widths.items())),
        steady=setting.unit == "concurrency" or _steady(course),
        took=took,
    )


def _rate(came: Sequence[float]) -> float:
    span = came[-1] - came[0]
    return (len(came) - 1) / span if span > 0 else 0.0


def _steady(course: Course) -> bool:
    """As ``bench sweep`` tells it, by requests from all over the run."""
    numbers = [i for i in range(len(course.came)) if not math.isnan(course.ended[i])]
    some = numbers[:: max(1, len(numbers) // SAMPLED)]
    return kept_up([_record(i, course.came[i], course.ended[i]) for i in some])


def _record(number: int, came: float, ended: float) -> Record:
    return Record(index=number, asked={}, server="", intended=came, sent=came, ended=ended)
