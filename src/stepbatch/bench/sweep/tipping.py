"""Where a server tips over: the search for it, and what a sweep's points say. Pure functions of what was measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import msgspec
import numpy as np

from stepbatch.bench.results import ClientState, Record, Summary, Work

Unit = Literal["rate", "concurrency"]

KNEE_SHARE = 0.95  # of the best throughput, which the knee reaches
CLEARLY_HIGHER = 1.25  # a load this many times another's would have brought more, if there were more
BEHIND = 0.05  # by which share answers may come slower than requests, before the server counts as falling behind
SURE = 2.5  # standard errors by which it must be seen to
FEW_REQUESTS = 8  # fewer can't tell falling behind from chance


class SweepPoint(msgspec.Struct, kw_only=True):
    """What was measured at one load."""

    load: float  # requests a second, or requests in flight
    unit: Unit
    summary: Summary
    meets: bool  # as large a share of the requests met the goal as was asked for
    steady: bool = True  # the server kept up: its queue would not grow without end
    work: Work | None = None
    client: ClientState = msgspec.field(default_factory=ClientState)

    @property
    def good(self) -> bool:
        """Whether the server takes this load for good. A goal that is met while the queue grows is not met for long."""
        return self.meets and self.steady


def kept_up(records: Sequence[Record]) -> bool:
    """Whether answers came as fast as requests did: latency didn't grow over the run, after its first quarter.

    That is where latency settles. Of answers that come 5% slower than requests, latency grows by a second in 19; so
    much is allowed, and whatever chance may explain, which is 2.5 standard errors: with requests of different sizes,
    or few of them, one long answer near the end is no queue. Fewer than eight requests count as kept up with.
    """
    if len(records) < FEW_REQUESTS:
        return True
    settled = sorted(records, key=lambda record: record.intended)[len(records) // 4 :]
    came = np.array([record.intended for record in settled])
    latency = np.array([record.latency for record in settled])
    came, latency = came - came.mean(), latency - latency.mean()
    squares = float(came @ came)
    if squares == 0:  # all at once: there is no over time
        return True
    slope = float(came @ latency) / squares
    rest = latency - slope * came
    error = math.sqrt(float(rest @ rest) / (len(settled) - 2) / squares)
    return slope <= max(BEHIND / (1 - BEHIND), SURE * error)


def tipping(points: Sequence[SweepPoint]) -> SweepPoint | None:
    """The highest load that the server takes for good, as it takes every lower one that was measured.

    ``None`` if it didn't take the lowest.
    """
    highest = None
    for point in by_load(points):
        if not point.good:
            break
        highest = point
    return highest


def tipped(points: Sequence[SweepPoint]) -> SweepPoint | None:
    """The lowest load that was too much; ``None`` if none was."""
    return next((point for point in by_load(points) if not point.good), None)


def knee(points: Sequence[SweepPoint]) -> SweepPoint | None:
    """The least load that brings 95% of the best throughput: more of it buys latency and hardly any throughput.

    ``None`` if throughput may still grow beyond what was measured: nothing shows that it doesn't where no load was
    clearly higher, and the server kept up with all of them.
    """
    ordered = by_load(points)
    best = max((point.summary.throughput_qps for point in ordered), default=0.0)
    if best <= 0:
        return None
    at = next(point for point in ordered if point.summary.throughput_qps >= KNEE_SHARE * best)
    saturated = any(not point.steady for point in ordered if point.load >= at.load)
    return at if saturated or ordered[-1].load >= CLEARLY_HIGHER * at.load else None


def by_load(points: Sequence[SweepPoint]) -> list[SweepPoint]:
    """From the lowest load to the highest; of several at one load, those that were too much come first."""
    assert len({point.unit for point in points}) <= 1
    return sorted(points, key=lambda point: (point.load, point.good))


class Search:
    """Proposes loads until the highest that is good is known: doubles, or halves, and then bisects.

    Args:
        start: The first load.
        precision: It ends when the lowest load that was too much is at most this share above the highest good one.
        max_runs: It ends after as many loads in any case.
        whole: Loads are whole numbers, from 1 on.
    """

    def __init__(self, start: float, *, precision: float = 0.1, max_runs: int = 12, whole: bool = False) -> None:
        self.precision = precision
        self.whole = whole
        self.runs_left = max_runs
        self.good = 0.0  # the highest load that was good
        self.bad = math.inf  # the lowest that was not
        self._start = start

    def next(self) -> float | None:
        """The load to measure now; ``None`` when nothing more is to be learned or no runs are left."""
        if self.runs_left <= 0:
            return None
        if self.good == 0 and math.isinf(self.bad):
            load = self._start
        elif math.isinf(self.bad):
            load = 2 * self.good
        elif self.good == 0:
            load = self.bad / 2
        elif self.bad <= (1 + self.precision) * self.good:
            return None
        else:
            load = math.sqrt(self.good * self.bad)
        load = float(max(1, round(load))) if self.whole else float(f"{load:.3g}")  # figures that people can read
        return load if self.good < load < self.bad else None

    def tell(self, load: float, good: bool) -> None:
        """How the load did that was proposed."""
        self.runs_left -= 1
        if good:
            self.good = max(self.good, load)
        else:
            self.bad = min(self.bad, load)
