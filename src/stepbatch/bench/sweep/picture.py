"""A sweep's picture: latency over throughput, and throughput over the load."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import msgspec
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from stepbatch.bench.report.canvas import (
    FAINT,
    LINES,
    PointLabel,
    Unit,
    draw_labels,
    log_ticks,
    picture,
    short,
    small,
)
from stepbatch.bench.sweep.report import Series, amount
from stepbatch.bench.sweep.tipping import SweepPoint, by_load, knee, tipped

AXES = {"rate": "offered load (requests a second)", "concurrency": "requests in flight"}
OFFERED = (0, (2, 2))  # dashes
NAME_LENGTH = 70  # characters that are shown of what a server is called
WIDE = 8  # times the least value: a logarithmic axis shows more


Lines: TypeAlias = Sequence[
    tuple[Series, str]
]  # with their colours; of each, points from the lowest load to the highest


def draw_sweep(all_series: Sequence[Series], path: Path) -> None:
    """Draw latency over throughput, and throughput over the load, of one server or several.

    Args:
        all_series: A server's each; all of one unit.
        path: Of the picture.

    Raises:
        OptionError: the path's ending is of no format that can be written.
        SetupError: the file can't be written.
    """
    lines = [(_ordered(series), LINES[i % len(LINES)]) for i, series in enumerate(all_series)]
    goal = any(point.summary.slo_attainment_rate is not None for series in all_series for point in series.points)
    layout: list[Any] = [["latency", "throughput"], *[["latency", "attainment"]] * goal]
    with picture(path, 13, 6.6 + 0.2 * len(lines)) as figure:
        panels = figure.subplot_mosaic(layout, height_ratios=[2.4, 1][: len(layout)])
        _draw_latency_over_throughput(panels["latency"], lines)
        _draw_throughput_over_load(panels["throughput"], lines)
        if goal:
            _draw_attainment(panels["attainment"], lines)
        _scale_loads([axes for name, axes in panels.items() if name != "latency"], lines)
        figure.legend(handles=_verdicts(lines), loc="outside upper left", fontsize=11)
        figure.legend(handles=_keys(lines), loc="outside lower left", ncols=6)
        _label_loads(figure, panels["latency"], lines)


def _ordered(series: Series) -> Series:
    name = short(series.name or "server", NAME_LENGTH)
    return msgspec.structs.replace(series, name=name, points=by_load(series.points))


def _verdict(series: Series) -> str:
    """Where the server tips over, and where more load brings hardly any more throughput."""
    if not series.points:
        return f"{series.name}: nothing was measured"
    if series.top:
        said = f"tips over at {amount(series.top)}"
    elif tipped(series.points):
        said = f"too much already at {amount(series.points[0])}"
    else:
        said = f"takes {amount(series.points[-1])}, the most that was tried"
    bent = knee(series.points)
    return f"{series.name}: {said}{f'; throughput has its knee at {amount(bent)}' if bent else ''}"


def _verdicts(lines: Lines) -> list[Artist]:
    """Which colour is which server, and how it did."""
    return [Line2D([], [], color=colour, linewidth=3, label=_verdict(s)) for s, colour in lines]


def _keys(lines: Lines) -> list[Artist]:
    """What the marks mean."""
    points = [point for s, _ in lines for point in s.points]
    goal = any(point.summary.goodput_qps is not None for point in points)
    grey: dict[str, Any] = {"color": FAINT, "linewidth": 1.6}
    mark: dict[str, Any] = {"color": FAINT, "linestyle": ""}
    handles: list[Artist] = [
        Line2D([], [], **grey, marker="o", label="latency, mean; throughput"),
        Line2D([], [], **grey, linestyle="--", marker="^", label=f"latency, P99{'; goodput' if goal else ''}"),
    ]
    if any(not point.good for point in points):
        handles.append(Line2D([], [], **mark, marker="o", markerfacecolor="white", label="more than the server takes"))
    if any(s.top for s, _ in lines):
        handles.append(Line2D([], [], **mark, marker="*", markersize=14, label="tipping point"))
    if any(knee(s.points) for s, _ in lines):
        handles.append(Line2D([], [], **mark, marker="D", markersize=10, markerfacecolor="none", label="knee"))
    if points and points[0].unit == "rate":
        handles.append(Line2D([], [], color=FAINT, linewidth=1, linestyle=OFFERED, label="as much as was offered"))
    return handles


def _draw_latency_over_throughput(axes: Axes, lines: Lines) -> None:
    """Mean and P99 of each load over the throughput that it brought."""
    answered = [p for s, _ in lines for p in s.points if p.summary.latency_p99 is not None]
    tails = [p.summary.latency_p99 or 0.0 for p in answered]
    means = [p.summary.latency_mean or 0.0 for p in answered]
    unit = Unit(max(tails, default=1.0))
    for s, colour in lines:
        points = [p for p in s.points if p.summary.latency_p99 is not None]
        x = [p.summary.throughput_qps for p in points]
        _draw_line(axes, colour, points, x, [(p.summary.latency_mean or 0.0) * unit.each for p in points], "-", "o")
        _draw_line(axes, colour, points, x, [(p.summary.latency_p99 or 0.0) * unit.each for p in points], "--", "^")
        if (top := s.top) and top.summary.latency_mean is not None:
            _star(axes, colour, top.summary.throughput_qps, top.summary.latency_mean * unit.each)
    axes.set_title("Latency over throughput")
    axes.set_xlabel("throughput (requests a second)")
    axes.set_ylabel(f"latency ({unit.name})")
    axes.set_title("beside each P99: its load", loc="right", **small(FAINT))
    axes.set_xlim(0, 1.1 * max((p.summary.throughput_qps for p in answered), default=0.0) or 1)
    axes.margins(y=0.12)
    if means and min(means) > 0 and max(tails) > WIDE * min(means):
        axes.set_yscale("log")
        log_ticks(axes.yaxis)
    else:
        axes.set_ylim(bottom=0)


def _label_loads(figure: Figure, axes: Axes, lines: Lines) -> None:
    """Write each load beside its P99; the rest of the figure must be there already."""
    found = [(p, tail, colour) for s, colour in lines for p in s.points if (tail := p.summary.latency_p99) is not None]
    each = Unit(max((tail for _, tail, _ in found), default=1.0)).each
    labels = [PointLabel(p.summary.throughput_qps, tail * each, f"{p.load:g}", colour) for p, tail, colour in found]
    draw_labels(figure, axes, labels)


def _draw_throughput_over_load(axes: Axes, lines: Lines) -> None:
    """What was answered, and what was answered in time, of each load; with the tipping point and the knee."""
    found = [p for s, _ in lines for p in s.points]
    for s, colour in lines:
        loads = [p.load for p in s.points]
        _draw_line(axes, colour, s.points, loads, [p.summary.throughput_qps for p in s.points], "-", "o")
        in_time = [p for p in s.points if p.summary.goodput_qps is not None]
        goodput = [p.summary.goodput_qps or 0.0 for p in in_time]
        _draw_line(axes, colour, in_time, [p.load for p in in_time], goodput, "--", "^")
        if top := s.top:
            axes.axvline(top.load, color=colour, linewidth=1, linestyle=":")
            _star(axes, colour, top.load, top.summary.throughput_qps)
        if bent := knee(s.points):
            style: dict[str, Any] = {"color": colour, "marker": "D", "markersize": 12, "markerfacecolor": "none"}
            axes.plot([bent.load], [bent.summary.throughput_qps], linestyle="", zorder=4, **style)
    most = max((p.summary.throughput_qps for p in found), default=0.0) or 1.0
    axes.set_ylim(0, 1.15 * most)
    if found and found[0].unit == "rate":
        offered = np.linspace(min(p.load for p in found), max(p.load for p in found), 200)
        axes.plot(offered, offered, color=FAINT, linewidth=1, linestyle=OFFERED, zorder=1)
    axes.set_title("Throughput over load")
    axes.set_ylabel("requests a second")


def _draw_attainment(axes: Axes, lines: Lines) -> None:
    """The share of requests that met their goal, at each load."""
    for s, colour in lines:
        points = [p for p in s.points if p.summary.slo_attainment_rate is not None]
        rates = [100 * (p.summary.slo_attainment_rate or 0.0) for p in points]
        _draw_line(axes, colour, points, [p.load for p in points], rates, "-", "o")
    axes.set_title("SLO attainment")
    axes.set_ylabel("requests (%)")
    axes.set_ylim(0, 106)


def _scale_loads(panels: Sequence[Axes], lines: Lines) -> None:
    """The same load axis for all panels, logarithmic where loads are far apart."""
    found = [p for s, _ in lines for p in s.points]
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
    colour: str,
    points: Sequence[SweepPoint],
    x: Sequence[float],
    y: Sequence[float],
    dashes: str,
    marker: str,
) -> None:
    """A line through all points, with hollow marks for what was more than the server takes."""
    axes.plot(x, y, color=colour, linestyle=dashes, linewidth=1.6)
    style: dict[str, Any] = {"color": colour, "marker": marker, "markersize": 6, "linestyle": "", "zorder": 3}
    for good, fill in ((True, colour), (False, "white")):
        chosen = [i for i, point in enumerate(points) if point.good == good]
        axes.plot([x[i] for i in chosen], [y[i] for i in chosen], markerfacecolor=fill, **style)


def _star(axes: Axes, colour: str, x: float, y: float) -> None:
    axes.plot([x], [y], color=colour, marker="*", markersize=17, markeredgecolor="white", linestyle="", zorder=5)
