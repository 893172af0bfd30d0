"""What latency is asked of each request: so many seconds, or so many times what it takes on an idle server."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

import msgspec

from stepbatch.bench.options import GoalOptions
from stepbatch.bench.workload.work import WorkItem

Kind = tuple[object, ...]  # what a request's latency on an idle server depends on

MAX_KINDS = 32  # that are measured one by one; the latency of others is scaled by their work


def kind(item: WorkItem) -> Kind:
    """Requests of one kind take equally long on an idle server. Of other fields, numbers may matter, as a strength."""
    numbers = tuple(sorted((name, value) for name, value in item.extra.items() if isinstance(value, int | float)))
    sizes = item.task, item.width, item.height, item.num_inference_steps, item.n, item.num_frames
    return *sizes, item.guidance_scale, numbers


def one_of_each(items: Sequence[WorkItem]) -> list[WorkItem]:
    """A request of each kind, of at most ``MAX_KINDS``, and then each again: what is set up once for a kind is by then.

    Their prompts are none of the items', nor twice the same, for a server may remember what it has encoded.
    """
    kinds = list({kind(item): item for item in reversed(items)}.values())[::-1][:MAX_KINDS]
    rounds = ("first", "second")
    return [msgspec.structs.replace(item, prompt=f"{item.prompt} ({name})") for name in rounds for item in kinds]


def goals(items: Sequence[WorkItem], goal: GoalOptions, idle: Mapping[Kind, float]) -> list[float | None]:
    """The seconds that each request may take, or None where nothing is asked.

    A trace's own goals go before the flags.

    Args:
        idle: Seconds that requests took on the idle server, by kind; for ``--slo`` without a value.
    """
    return [_goal(item, goal, idle) for item in items]


def _goal(item: WorkItem, goal: GoalOptions, idle: Mapping[Kind, float]) -> float | None:
    if item.slo_ms is not None:
        return item.slo_ms / 1000
    if goal.slo is None:
        return None
    if not goal.is_relative:
        return goal.slo
    seconds = idle.get(kind(item)) or _scaled(item, idle)
    return None if seconds is None else goal.slo_scale * seconds


def _scaled(item: WorkItem, idle: Mapping[Kind, float]) -> float | None:
    """A guess from the kinds that were measured: latency grows with pixels, frames, steps and outputs."""
    if not idle:
        return None
    return _work(kind(item)) * statistics.median(seconds / _work(other) for other, seconds in idle.items())


def _work(of: Kind) -> float:
    work = 1.0
    for factor in of[1:6]:  # width, height, steps, outputs, frames
        work *= factor if isinstance(factor, int) else 1
    return work
