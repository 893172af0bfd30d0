"""A simulation's picture: latency, goodput and how busy the machines are over the load, and mean against P99."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from stepbatch.bench.report.canvas import (
    FAINT,
    INK,
    LINES,
    PointLabel,
    Unit,
    draw_labels,
    line_style,
    log_ticks,
    picture,
    small,
)
from stepbatch.bench.simulate.report import against_fcfs, by_load, load_name, name
from stepbatch.bench.simulate.results import Outcome, SimulationResult

AXES = {"load": "load (share of full capacity)", "rate": "requests a second", "concurrency": "requests in flight"}
WIDE = 8  # times the least value: a logarithmic axis shows more
MOST_LINES = 18  # as many as can be told apart
GOALS = 0.75, 1.05  # of mean and P99, as multiples of first come, first served: what a default has to reach

Line: TypeAlias = tuple[str, Sequence[Outcome], dict[str, Any]]  # its name, its points, its style


def draw_simulation(result: SimulationResult, path: Path) -> None:
    """Draw every run of a simulation.

    Raises:
        OptionError: the path's ending is of no format that can be written.
        SetupError: the file can't be written.
    """
    lines = _lines(result.outcomes)
    frontier = [found for o in by_load(result.outcomes) if (found := list(against_fcfs(o)))]
    layout: list[Any] = [["mean", "tail"], ["throughput", "busy"], *[["frontier", "key"]] * bool(frontier)]
    height = 8.5 + 4.5 * bool(frontier) + 0.2 * max(0, len(lines) - 6)
    with picture(path, 13, height) as figure:
        panels = figure.subplot_mosaic(layout)
        _draw(panels["mean"], lines, "Mean latency", lambda o: o.mean, of_time=True)
        _draw(panels["tail"], lines, "P99 of latency", lambda o: o.p99, of_time=True)
        _draw_throughput(panels["throughput"], lines)
        _draw(panels["busy"], lines, "Machines that have something to do", lambda o: 100 * o.utilisation)
        panels["busy"].set_ylabel("%")
        panels["busy"].set_ylim(0, 105)
        figure.suptitle(result.curve, x=0.01, ha="left", fontsize=13, fontweight="bold")
        keys = [Line2D([], [], label=label, marker="o", markersize=4, **style) for label, _, style in lines]
        if len(keys) > 1:
            figure.legend(handles=keys, loc="outside lower left", ncols=min(4, len(keys)), handlelength=3.5)
        if frontier:
            panels["key"].axis("off")
            _draw_frontier(figure, panels["frontier"], panels["key"], frontier)


def _lines(outcomes: Sequence[Outcome]) -> list[Line]:
    """The runs of each kind of machines, from the lowest load to the highest."""
    among = [outcome.setting for outcome in outcomes]
    found: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        found.setdefault(name(outcome.setting, among), []).append(outcome)
    ordered = [(label, sorted(them, key=lambda o: o.setting.amount)) for label, them in found.items()]
    return [(label, them, line_style(i)) for i, (label, them) in enumerate(ordered[:MOST_LINES])]


def _draw(
    axes: Axes, lines: Sequence[Line], title: str, value: Callable[[Outcome], float | None], of_time: bool = False
) -> None:
    """A figure over the load; in hollow marks where the queue grew without end."""
    values = [found for _, them, _ in lines for o in them if (found := value(o)) is not None]
    unit = Unit(max(values, default=1.0))
    each = unit.each if of_time else 1.0
    for _, them, style in lines:
        points = [(o.setting.amount, each * found, o.steady) for o in them if (found := value(o)) is not None]
        axes.plot([x for x, _, _ in points], [y for _, y, _ in points], linewidth=1.5, **style)
        for x, y, steady in points:
            fill = style["color"] if steady else "white"
            axes.plot([x], [y], marker="o", markersize=5, color=style["color"], markerfacecolor=fill, zorder=3)
    axes.set_title(title)
    if of_time:
        axes.set_ylabel(unit.name)
        if values and min(values) > 0 and max(values) > WIDE * min(values):
            axes.set_yscale("log")
            log_ticks(axes.yaxis)
        else:
            axes.set_ylim(bottom=0)
        axes.set_title("hollow: falls behind", loc="right", **small(FAINT))
    _scale_loads(axes, lines)


def _draw_throughput(axes: Axes, lines: Sequence[Line]) -> None:
    goal = any(o.goodput is not None for _, them, _ in lines for o in them)
    refused = any(o.refused or o.dropped for _, them, _ in lines for o in them)
    if goal:
        _draw(axes, lines, "Goodput: requests that met their goal", lambda o: o.goodput)
    elif refused:
        _draw(axes, lines, "Requests refused or dropped", lambda o: 100 * (o.refused + o.dropped) / o.requests)
    else:
        _draw(axes, lines, "Jobs in a step, mean", lambda o: o.width_mean)
    axes.set_ylabel("requests a second" if goal else "%" if refused else "jobs")
    axes.set_ylim(bottom=0)


def _scale_loads(axes: Axes, lines: Sequence[Line]) -> None:
    settings = [o.setting for _, them, _ in lines for o in them]
    amounts = sorted({setting.amount for setting in settings})
    if amounts and amounts[-1] > WIDE * amounts[0]:
        axes.set_xscale("log")
        log_ticks(axes.xaxis)
    axes.set_xlabel(AXES.get(settings[0].unit, "") if settings else "")


def _draw_frontier(
    figure: Figure, axes: Axes, key: Axes, frontier: Sequence[Sequence[tuple[Outcome, tuple[float, float]]]]
) -> None:
    """Mean against P99, as multiples of first come, first served under the same load on the same machines."""
    labels, handles = [], []
    among = [o.setting for them in frontier for o, _ in them]
    curves: dict[str, list[tuple[Outcome, tuple[float, float]]]] = {}
    for outcome, ratios in (each for them in frontier for each in them):
        words = [load_name(outcome.setting), *_machines(outcome, among)]
        curves.setdefault(", ".join(words), []).append((outcome, ratios))
    for i, (label, them) in enumerate(list(curves.items())[:MOST_LINES]):
        style, points = line_style(i), [ratios for _, ratios in them]
        axes.plot([x for x, _ in points], [y for _, y in points], marker="o", markersize=5, linewidth=1.3, **style)
        handles.append(Line2D([], [], label=label, marker="o", **style))
        said = [o.setting.policy if o.setting.ageing is None else f"{o.setting.ageing:g}" for o, _ in them]
        labels += [PointLabel(x, y, text, LINES[i % len(LINES)]) for (x, y), text in zip(points, said, strict=True)]
    axes.plot([1], [1], marker="D", color=INK, linestyle="", markersize=6)
    grey: dict[str, Any] = {"color": FAINT, "linewidth": 1, "linestyle": ":"}
    axes.axvline(GOALS[0], **grey)
    axes.axhline(GOALS[1], **grey)
    handles.append(Line2D([], [], color=INK, marker="D", linestyle="", label="first come, first served"))
    handles.append(Line2D([], [], **grey, label=f"{GOALS[0]:g} of its mean, {GOALS[1]:g} of its P99"))
    axes.set_title("P99 against mean, by the weight of ageing")
    axes.set_xlabel("mean / that of fcfs")
    axes.set_ylabel("P99 / that of fcfs")
    axes.margins(0.08)
    if max(ratios[1] for them in frontier for _, ratios in them) > WIDE / 2:
        axes.set_yscale("log")
        log_ticks(axes.yaxis)
    key.legend(handles=handles, loc="upper left", handlelength=3.5)
    draw_labels(figure, axes, labels)


def _machines(outcome: Outcome, among: Sequence[Any]) -> list[str]:
    """What the machines differ in, but for the policy."""
    words = name(outcome.setting, among).split(", ")
    return [word for word in words if word and not word.startswith(outcome.setting.policy)]
