"""The panels of a run's picture: latencies, requests over time, and how full the batch was over time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from stepbatch.bench.report.canvas import (
    BLUE,
    INK,
    ORANGE,
    PALE,
    PURPLE,
    VERMILION,
    Unit,
    draw_curve,
    draw_goals,
    legend_beside,
    line_style,
    pale,
    short,
    small,
)
from stepbatch.bench.report.summary import by_server, spread
from stepbatch.bench.report.timeline import occupancy
from stepbatch.bench.results import Outcome, Record, Result, Sample

OUTCOMES: dict[Outcome, tuple[str, str]] = {  # colour, and what the legend calls it
    "ok": (BLUE, "answered"),
    "invalid": (PURPLE, "invalid"),
    "rejected": (ORANGE, "rejected"),
    "timeout": (INK, "timed out"),
    "failed": (VERMILION, "failed"),
}
MOST_SERVERS = 8  # that the legend names
FEW_SAMPLES = 100
FEW_LANES = 80  # no more, and there is room between two bars


def latencies(result: Result) -> list[float]:
    """Of the requests that were answered with what they asked for: seconds, sorted."""
    return sorted(record.latency for record in result.records if record.outcome == "ok")


def draw_latencies(axes: Axes, result: Result) -> None:
    """The share of requests over their latency, with percentiles and goals."""
    values = latencies(result)
    unit = Unit(max(values, default=1.0))
    axes.set_title("Latency")
    axes.set_ylabel("requests answered (%)")
    axes.set_xlabel(f"latency ({unit.name}), from when a request should have been sent")
    axes.set_ylim(0, 103)
    missed = len(result.records) - len(values)
    if missed:
        counts: Counter[Outcome] = Counter(record.outcome for record in result.records if record.outcome != "ok")
        told = ", ".join(f"{counts[outcome]} {label}" for outcome, (_, label) in OUTCOMES.items() if counts[outcome])
        axes.set_title(f"not in it: {told}, of {len(result.records)} requests", loc="right", **small(VERMILION))
    if not values:
        axes.text(0.5, 0.5, "no request was answered with what it asked for", transform=axes.transAxes, ha="center")
        axes.set_xlim(0, 1)
        return
    draw_curve(axes, values, unit, color=BLUE)
    axes.set_xlim(0, 1.04 * values[-1] * unit.each or 1)
    goals = [record.slo_s for record in result.records if record.slo_s is not None]
    legend_beside(axes, [*_mark_percentiles(axes, values, unit), *draw_goals(axes, goals, unit)])


def _mark_percentiles(axes: Axes, values: Sequence[float], unit: Unit) -> list[Line2D]:
    found, marked = spread(values), []
    places = ((50, found.median, "o"), (90, found.p90, "s"), (95, found.p95, "^"), (99, found.p99, "D"))
    for percent, value, marker in places:
        assert value is not None  # there are values
        style: dict[str, Any] = {"color": BLUE, "marker": marker, "linestyle": "", "markeredgecolor": "white"}
        style |= {"markersize": 8, "zorder": 3, "clip_on": False, "label": f"P{percent}  {unit.text(value)}"}
        marked += axes.plot([value * unit.each], [percent], **style)
    return marked


def draw_requests(axes: Axes, records: Sequence[Record], lanes: Sequence[int], unit: Unit) -> None:
    """Every request as a bar in its lane, from when it should have been sent until it ended."""
    depth = max(lanes, default=0) + 1
    axes.set_title("Requests in flight")
    axes.set_ylabel("requests")
    axes.set_ylim(0, max(depth, 4))
    axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    longest = max((record.ended for record in records), default=1.0)
    typical = float(np.median([record.ended - record.intended for record in records])) if records else 0.0
    roomy = depth <= FEW_LANES
    edge = "white" if typical > longest / 200 and roomy else "none"
    handles: list[Artist] = []
    queued = late = False
    for outcome, (colour, label) in OUTCOMES.items():
        mine = [(record, lane) for record, lane in zip(records, lanes, strict=True) if record.outcome == outcome]
        unsent = [(r.intended, r.sent, lane) for r, lane in mine if r.sent - r.intended > longest / 1000]
        queue = [(r.sent, _left_queue(r), lane) for r, lane in mine if r.queue_s]
        work = [(_left_queue(r), r.ended, lane) for r, lane in mine]
        least = longest / (3000 if outcome == "ok" else 800)  # what went wrong should catch the eye
        for bars, paint in ((unsent, PALE), (queue, pale(colour)), (work, colour)):
            axes.add_collection(
                _bars(bars, 0.08 * roomy, unit, least if paint == colour else 0.0, facecolors=paint, edgecolors=edge)
            )
        queued, late = queued or bool(queue), late or bool(unsent)
        handles += [Patch(color=colour, label=f"{label} ({len(mine)})")] * bool(mine)
    handles += [Patch(color=pale(BLUE), label="in the server's queue")] * queued
    handles += [Patch(color=PALE, label="due, not sent yet")] * late
    legend_beside(axes, handles)


def _left_queue(record: Record) -> float:
    return min(record.ended, record.sent + (record.queue_s or 0.0))


def _bars(
    bars: Sequence[tuple[float, float, int]], gap: float, unit: Unit, least: float, **paint: Any
) -> PolyCollection:
    """Bars from a time to another in a lane; none is narrower than ``least`` seconds, so that all can be seen."""
    begin, end, lane = np.array(bars, dtype=float).reshape(-1, 3).T
    end = np.maximum(end, begin + least)
    x = np.stack([begin, end, end, begin], axis=1) * unit.each
    y = np.stack([lane + gap, lane + gap, lane + 1 - gap, lane + 1 - gap], axis=1)
    corners = np.stack([x, y], axis=2)  # [bars, 4, 2]
    return PolyCollection(list(corners), linewidths=0.6, rasterized=True, **paint)


def tells_occupancy(samples: Sequence[Sample]) -> bool:
    """Whether there is anything to draw of how full the batch was."""
    steps = any(occupancy(mine)[0] for mine in by_server(samples).values())
    return steps or any(sample.running is not None for sample in samples)


def draw_occupancy(axes: Axes, samples: Sequence[Sample], unit: Unit) -> None:
    """How many jobs shared a step, and how many were running, over time."""
    servers = by_server(samples)
    axes.set_title("Batch")
    axes.set_ylabel("jobs")
    told = {server: found for server, mine in servers.items() if (found := occupancy(mine))[0]}
    handles: list[Artist] = []
    for i, (server, (times, values)) in enumerate(told.items()):
        address = short(server.partition("://")[2] or server)
        label = f"jobs per step, {address}" if len(servers) > 1 else "jobs per step"
        x, style = np.array(times) * unit.each, line_style(i)
        lines = axes.plot(x, values, drawstyle="steps-pre", linewidth=1.6, label=label, zorder=3, **style)
        if len(servers) == 1:
            axes.fill_between(x, values, step="pre", color=style["color"], alpha=0.15, linewidth=0)
        handles += lines if i < MOST_SERVERS else []
    if len(told) > MOST_SERVERS:
        handles.append(Line2D([], [], linestyle="", label=f"and {len(told) - MOST_SERVERS} more"))
    running = _summed(servers, "running")
    if running is not None:
        label = "running" if len(servers) == 1 else "running, all servers"
        style = {"color": INK, "linewidth": 1, "linestyle": ":", **_dots(running[0])}
        handles += axes.plot(running[0] * unit.each, running[1], label=label, **style)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    legend_beside(axes, handles)


def draw_waiting(axes: Axes, samples: Sequence[Sample], unit: Unit) -> None:
    """How many requests waited in all servers' queues, over time."""
    axes.set_title("Queue")
    axes.set_ylabel("requests")
    waiting = _summed(by_server(samples), "waiting")
    assert waiting is not None  # the panel is for samples that tell it
    style = {"color": ORANGE, "linewidth": 1.4, **_dots(waiting[0])}
    line = axes.plot(waiting[0] * unit.each, waiting[1], label="waiting", **style)
    axes.fill_between(waiting[0] * unit.each, waiting[1], color=ORANGE, alpha=0.2, linewidth=0)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_locator(MaxNLocator(3, integer=True))
    legend_beside(axes, line)


def _dots(times: Any) -> dict[str, Any]:
    """Marks on a line of few samples: only there is anything known."""
    return {"marker": "o", "markersize": 3} if len(times) <= FEW_SAMPLES else {}


def _summed(servers: dict[str, list[Sample]], name: str) -> tuple[Any, Any] | None:
    """Times, and the sum of what each server last said of itself; None where none said anything."""
    told = {
        server: [(sample.at, value) for sample in mine if (value := getattr(sample, name)) is not None]
        for server, mine in servers.items()
    }
    series = [np.array(points).T for points in told.values() if points]
    if not series:
        return None
    times = np.unique(np.concatenate([at for at, _ in series]))
    total = np.zeros(len(times))
    for at, values in series:
        last = np.searchsorted(at, times, side="right") - 1
        total += np.where(last >= 0, values[np.maximum(last, 0)], 0)
    return times, total
