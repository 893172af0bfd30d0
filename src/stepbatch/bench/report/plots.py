"""Pictures of runs: one by itself, several over each other, and a sweep."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from textwrap import fill, shorten
from typing import Any

from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from stepbatch.bench.report.canvas import (
    FAINT,
    LINES,
    VERMILION,
    Unit,
    brief,
    draw_curve,
    draw_goals,
    line_style,
    picture,
    short,
)
from stepbatch.bench.report.run_panels import (
    draw_latencies,
    draw_occupancy,
    draw_requests,
    draw_waiting,
    latencies,
    tells_occupancy,
)
from stepbatch.bench.report.sweep_panels import (
    draw_attainment,
    draw_latency_over_throughput,
    draw_throughput_over_load,
    keys,
    label_loads,
    scale_loads,
    series,
    verdicts,
)
from stepbatch.bench.report.table import bottleneck_text, model_name, work_text
from stepbatch.bench.report.timeline import lanes
from stepbatch.bench.results import Result
from stepbatch.bench.sweep.report import share
from stepbatch.bench.sweep.tipping import SweepPoint

LINE_LENGTH = 115  # characters, of what is written over the whole width


def draw_run(result: Result, path: Path) -> None:
    """Draw latencies, the requests over time, and how full the batch was over time.

    Raises:
        OptionError: the path's ending is of no format that can be written.
        SetupError: the file can't be written.
    """
    chosen = lanes(result.records)
    telling = tells_occupancy(result.samples)
    waiting = telling and any(sample.waiting for sample in result.samples)
    heights = [3.0, min(4.0, 1.4 + 0.14 * (max(chosen, default=0) + 1)), *[1.9] * telling, *[0.9] * waiting]
    with picture(path, 12, sum(heights) + 0.35 * len(heights) + 1) as figure:
        panels = list(figure.subplots(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0])
        figure.suptitle(_heading(result), x=0.008, ha="left")
        unit = Unit(result.summary.duration)
        draw_latencies(panels[0], result)
        draw_requests(panels[1], result.records, chosen, unit)
        if telling:
            draw_occupancy(panels[2], result.samples, unit)
        if waiting:
            draw_waiting(panels[3], result.samples, unit)
        for panel in panels[1:]:
            panel.set_xlim(0, result.summary.duration * unit.each or 1)
        panels[-1].set_xlabel(f"time since the start ({unit.name})")
        note = "" if telling else "How full the batch was is not known: the server told nothing of its steps."
        if result.client.bottleneck:
            note = fill(bottleneck_text(result.client), LINE_LENGTH)
        colour = VERMILION if result.client.bottleneck else FAINT
        figure.supxlabel(note, x=0.008, ha="left", fontsize=10, color=colour)


def _heading(result: Result) -> str:
    summary, work = result.summary, result.work
    title = " · ".join(part for part in (result.name, model_name(result)) if part) or "stepbatch bench serving"
    facts = [f"{brief(summary.throughput_qps)} req/s answered"]
    if summary.latency_mean is not None and summary.latency_p99 is not None:
        unit = Unit(summary.latency_p99)
        facts += [f"mean {unit.text(summary.latency_mean)}", f"P99 {unit.text(summary.latency_p99)}"]
    if summary.slo_attainment_rate is not None:
        facts.append(f"{share(summary.slo_attainment_rate)} met their SLO")
    return f"{shorten(title, LINE_LENGTH, placeholder=' …')}\n{work_text(work)}\n{' · '.join(facts)}"


def draw_comparison(results: Sequence[Result], path: Path) -> None:
    """Draw latencies over each other, and throughput, mean and P99 as bars.

    Raises:
        OptionError: the path's ending is of no format that can be written.
        SetupError: the file can't be written.
    """
    work = results[0].work
    names = [short(result.name or f"run {i}") for i, result in enumerate(results, start=1)]
    unit = Unit(max((value for result in results for value in latencies(result)), default=1.0))
    with picture(path, 13, max(5.2, 2.2 + 0.34 * 3 * len(results))) as figure:
        figure.suptitle(work_text(work), x=0.008, ha="left")
        panels = figure.subplot_mosaic(
            [["curves", "rate"], ["curves", "mean"], ["curves", "p99"]], width_ratios=[1.5, 1]
        )
        handles = _draw_curves(panels["curves"], results, names, unit)
        figure.legend(handles=handles, loc="outside lower left", ncols=3)
        _draw_bars(
            panels["rate"], "Throughput (req/s)", names, [result.summary.throughput_qps for result in results], 1
        )
        means = [result.summary.latency_mean for result in results]
        _draw_bars(panels["mean"], f"Latency, mean ({unit.name})", names, means, unit.each)
        tails = [result.summary.latency_p99 for result in results]
        _draw_bars(panels["p99"], f"Latency, P99 ({unit.name})", names, tails, unit.each)


def _draw_curves(axes: Axes, results: Sequence[Result], names: Sequence[str], unit: Unit) -> list[Line2D]:
    axes.set_title("Latency")
    axes.set_ylabel("requests answered (%)")
    axes.set_xlabel(f"latency ({unit.name}), from when a request should have been sent")
    axes.set_ylim(0, 103)
    handles: list[Line2D] = []
    for i, (result, name) in enumerate(zip(results, names, strict=True)):
        values = latencies(result)
        missed = len(result.records) - len(values)
        label = f"{name}{f' ({missed} of {len(result.records)} failed)' if missed else ''}"
        style = {"label": label, **line_style(i)}
        handles += draw_curve(axes, values, unit, **style) if values else [Line2D([], [], **style)]
    longest = max((value for result in results for value in latencies(result)), default=0.0)
    axes.set_xlim(0, 1.04 * longest * unit.each or 1)
    goals = [record.slo_s for result in results for record in result.records if record.slo_s is not None]
    return handles + draw_goals(axes, goals, unit)


def _draw_bars(axes: Axes, title: str, names: Sequence[str], values: Sequence[float | None], each: float) -> None:
    """A bar for each run, with its value, and its difference from the first."""
    scaled = [None if value is None else value * each for value in values]
    top = max((value for value in scaled if value is not None), default=0.0) or 1.0
    axes.set_title(title)
    axes.set_xlim(0, 1.3 * top)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")
    for i, value in enumerate(scaled):
        if value is None:
            axes.text(0.015 * top, i, "none", va="center", fontsize=9.5)
            continue
        axes.barh(i, value, color=LINES[i % len(LINES)], height=0.66)
        change = f"  {value / scaled[0] - 1:+.0%}" if i and scaled[0] else ""
        axes.text(value + 0.015 * top, i, f"{brief(value)}{change}", va="center", fontsize=9.5)


def draw_sweep(runs: Sequence[tuple[str, Sequence[SweepPoint]]], path: Path) -> None:
    """Draw latency over throughput, and throughput over the load, of one server or several.

    Args:
        runs: What each server is called, and what was measured at each load, all of one unit.

    Raises:
        OptionError: the path's ending is of no format that can be written.
        SetupError: the file can't be written.
    """
    all_series = series(runs)
    goal = any(point.summary.slo_attainment_rate is not None for _, points in runs for point in points)
    layout: list[Any] = [["latency", "throughput"], *[["latency", "attainment"]] * goal]
    with picture(path, 13, 6.6 + 0.2 * len(runs)) as figure:
        panels = figure.subplot_mosaic(layout, height_ratios=[2.4, 1][: len(layout)])
        draw_latency_over_throughput(panels["latency"], all_series)
        draw_throughput_over_load(panels["throughput"], all_series)
        if goal:
            draw_attainment(panels["attainment"], all_series)
        scale_loads([axes for name, axes in panels.items() if name != "latency"], all_series)
        figure.legend(handles=verdicts(all_series), loc="outside upper left", fontsize=11)
        figure.legend(handles=keys(all_series), loc="outside lower left", ncols=6)
        label_loads(figure, panels["latency"], all_series)
