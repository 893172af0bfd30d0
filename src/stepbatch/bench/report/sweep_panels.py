"""The panels of a sweep's picture: latency over throughput, and throughput over the load."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from stepbatch.bench.report.canvas import FAINT, LINES, PointLabel, Unit, draw_labels, log_ticks, short, small
from stepbatch.bench.sweep.report import amount
from stepbatch.bench.sweep.tipping import SweepPoint, knee, tipped, tipping

AXES = {"rate": "offered load (requests a second)", "concurrency": "requests in flight"}
OFFERED = (0, (2, 2))  # dashes
NAME_LENGTH = 70  # characters that are shown of what a server is called
WIDE = 8  # times the least value: a logarithmic axis shows more


@dataclass(frozen=True)
class Series:
    """The points of one server, from the lowest load to the highest."""

    name: str
    colour: str
    points: tuple[SweepPoint, ...]

    @property
    def top(self) -> SweepPoint | None:
        """The tipping point; ``None`` where every load is too much, or none is."""
        return tipping(self.points) if tipped(self.points) else None

    @property
    def verdict(self) -> str:
        """Where the server tips over, and where more load brings hardly any more throughput."""
        if not self.points:
            return f"{self.name}: nothing was measured"
        if self.top:
            said = f"tips over at {amount(self.top)}"
        elif tipped(self.points):
            said = f"too much already at {amount(self.points[0])}"
        else:
            said = f"takes {amount(self.points[-1])}, the most that was tried"
        bent = knee(self.points)
        return f"{self.name}: {said}{f'; throughput has its knee at {amount(bent)}' if bent else ''}"


def series(runs: Sequence[tuple[str, Sequence[SweepPoint]]]) -> list[Series]:
    """Each server's points in order, with a colour."""
    return [
        Series(
            short(name or "server", NAME_LENGTH),
            LINES[i % len(LINES)],
            tuple(sorted(points, key=lambda point: (point.load, point.good))),
        )
        for i, (name, points) in enumerate(runs)
    ]


def verdicts(all_series: Sequence[Series]) -> list[Artist]:
    """Which colour is which server, and how it did."""
    return [Line2D([], [], color=s.colour, linewidth=3, label=s.verdict) for s in all_series]


def keys(all_series: Sequence[Series]) -> list[Artist]:
    """What the marks mean."""
    points = [point for s in all_series for point in s.points]
    goal = any(point.summary.goodput_qps is not None for point in points)
    grey: dict[str, Any] = {"color": FAINT, "linewidth": 1.6}
    mark: dict[str, Any] = {"color": FAINT, "linestyle": ""}
    handles: list[Artist] = [
        Line2D([], [], **grey, marker="o", label="latency, mean; throughput"),
        Line2D([], [], **grey, linestyle="--", marker="^", label=f"latency, P99{'; goodput' if goal else ''}"),
    ]
    if any(not point.good for point in points):
        handles.append(Line2D([], [], **mark, marker="o", markerfacecolor="white", label="more than the server takes"))
    if any(s.top for s in all_series):
        handles.append(Line2D([], [], **mark, marker="*", markersize=14, label="tipping point"))
    if any(knee(s.points) for s in all_series):
        handles.append(Line2D([], [], **mark, marker="D", markersize=10, markerfacecolor="none", label="knee"))
    if points and points[0].unit == "rate":
        handles.append(Line2D([], [], color=FAINT, linewidth=1, linestyle=OFFERED, label="as much as was offered"))
    return handles


def draw_latency_over_throughput(axes: Axes, all_series: Sequence[Series]) -> None:
    """Mean and P99 of each load over the throughput that it brought."""
    answered = [(s, [p for p in s.points if p.summary.latency_p99 is not None]) for s in all_series]
    tails = [p.summary.latency_p99 or 0.0 for _, points in answered for p in points]
    means = [p.summary.latency_mean or 0.0 for _, points in answered for p in points]
    unit = Unit(max(tails, default=1.0))
    for s, points in answered:
        x = [p.summary.throughput_qps for p in points]
        _draw_line(axes, s, points, x, [(p.summary.latency_mean or 0.0) * unit.each for p in points], "-", "o")
        _draw_line(axes, s, points, x, [(p.summary.latency_p99 or 0.0) * unit.each for p in points], "--", "^")
        if (top := s.top) and top.summary.latency_mean is not None:
            _star(axes, s, top.summary.throughput_qps, top.summary.latency_mean * unit.each)
    axes.set_title("Latency over throughput")
    axes.set_xlabel("throughput (requests a second)")
    axes.set_ylabel(f"latency ({unit.name})")
    axes.set_title("beside each P99: its load", loc="right", **small(FAINT))
    axes.set_xlim(0, 1.1 * max((p.summary.throughput_qps for _, points in answered for p in points), default=0.0) or 1)
    axes.margins(y=0.12)
    if means and min(means) > 0 and max(tails) > WIDE * min(means):
        axes.set_yscale("log")
        log_ticks(axes.yaxis)
    else:
        axes.set_ylim(bottom=0)


def label_loads(figure: Figure, axes: Axes, all_series: Sequence[Series]) -> None:
    """Write each load beside its P99; the rest of the figure must be there already."""
    points = [(s, p, p.summary.latency_p99) for s in all_series for p in s.points]
    each = Unit(max((tail for _, _, tail in points if tail is not None), default=1.0)).each
    labels = [
        PointLabel(p.summary.throughput_qps, tail * each, f"{p.load:g}", s.colour)
        for s, p, tail in points
        if tail is not None
    ]
    draw_labels(figure, axes, labels)


def draw_throughput_over_load(axes: Axes, all_series: Sequence[Series]) -> None:
    """What was answered, and what was answered in time, of each load; with the tipping point and the knee."""
    found = [p for s in all_series for p in s.points]
    for s in all_series:
        loads = [p.load for p in s.points]
        _draw_line(axes, s, s.points, loads, [p.summary.throughput_qps for p in s.points], "-", "o")
        in_time = [p for p in s.points if p.summary.goodput_qps is not None]
        goodput = [p.summary.goodput_qps or 0.0 for p in in_time]
        _draw_line(axes, s, in_time, [p.load for p in in_time], goodput, "--", "^")
        if top := s.top:
            axes.axvline(top.load, color=s.colour, linewidth=1, linestyle=":")
            _star(axes, s, top.load, top.summary.throughput_qps)
        if bent := knee(s.points):
            style: dict[str, Any] = {"color": s.colour, "marker": "D", "markersize": 12, "markerfacecolor": "none"}
            axes.plot([bent.load], [bent.summary.throughput_qps], linestyle="", zorder=4, **style)
    most = max((p.summary.throughput_qps for p in found), default=0.0) or 1.0
    axes.set_ylim(0, 1.15 * most)
    if found and found[0].unit == "rate":
        offered = np.linspace(min(p.load for p in found), max(p.load for p in found), 200)
        axes.plot(offered, offered, color=FAINT, linewidth=1, linestyle=OFFERED, zorder=1)
    axes.set_title("Throughput over load")
    axes.set_ylabel("requests a second")


def draw_attainment(axes: Axes, all_series: Sequence[Series]) -> None:
    """The share of requests that met their goal, at each load."""
    for s in all_series:
        points = [p for p in s.points if p.summary.slo_attainment_rate is not None]
        rates = [100 * (p.summary.slo_attainment_rate or 0.0) for p in points]
        _draw_line(axes, s, points, [p.load for p in points], rates, "-", "o")
    axes.set_title("SLO attainment")
    axes.set_ylabel("requests (%)")
    axes.set_ylim(0, 106)


def scale_loads(panels: Sequence[Axes], all_series: Sequence[Series]) -> None:
    """The same load axis for all panels, logarithmic where loads are far apart."""
    found = [p for s in all_series for p in s.points]
    loads = [p.load for p in found]
    for axes in panels:
        if loads and min(loads) > 0 and max(loads) > WIDE * min(loads):
            axes.set_xscale("log")
            log_ticks(axes.xaxis)
            axes.set_xlim(min(loads) / 1.2, max(loads) * 1.2)
        else:
            axes.set_xlim(0, 1.06 * max(loads, default=0.0) or 1)
    if found:
        panels[-1].set_xlabel(AXES[found[0].unit])


def _draw_line(
    axes: Axes,
    s: Series,
    points: Sequence[SweepPoint],
    x: Sequence[float],
    y: Sequence[float],
    dashes: str,
    marker: str,
) -> None:
    """A line through all points, with hollow marks for what was more than the server takes."""
    axes.plot(x, y, color=s.colour, linestyle=dashes, linewidth=1.6)
    style: dict[str, Any] = {"color": s.colour, "marker": marker, "markersize": 6, "linestyle": "", "zorder": 3}
    for good, fill in ((True, s.colour), (False, "white")):
        chosen = [i for i, point in enumerate(points) if point.good == good]
        axes.plot([x[i] for i in chosen], [y[i] for i in chosen], markerfacecolor=fill, **style)


def _star(axes: Axes, s: Series, x: float, y: float) -> None:
    axes.plot([x], [y], color=s.colour, marker="*", markersize=17, markeredgecolor="white", linestyle="", zorder=5)
