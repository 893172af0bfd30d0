"""Pictures of runs: one by itself, and several over each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill, shorten

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
from stepbatch.bench.report.table import bottleneck_text, model_name, share, work_text
from stepbatch.bench.report.timeline import lanes
from stepbatch.bench.results import Result

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
    title = model_name(result) or "stepbatch bench serving"
    facts = [f"{brief(summary.throughput_qps)} req/s answered"]
    if summary.latency_mean is not None and summary.latency_p99 is not None:
        unit = Unit(summary.latency_p99)
        facts += [f"mean {unit.text(summary.latency_mean)}", f"P99 {unit.text(summary.latency_p99)}"]
    if summary.slo_attainment_rate is not None:
        facts.append(f"{share(summary.slo_attainment_rate)} met their SLO")
    return f"{shorten(title, LINE_LENGTH, placeholder=' …')}\n{work_text(work)}\n{' · '.join(facts)}"


def draw_comparison(runs: Mapping[str, Result], path: Path) -> None:
    """Draw latencies over each other, and throughput, mean and P99 as bars.

    Args:
        runs: By what they are called.

    Raises:
        OptionError: the path's ending is of no format that can be written.
        SetupError: the file can't be written.
    """
    names, results = [short(name) for name in runs], list(runs.values())
    unit = Unit(max((value for result in results for value in latencies(result)), default=1.0))
    with picture(path, 13, max(5.2, 2.2 + 0.34 * 3 * len(results))) as figure:
        figure.suptitle(work_text(results[0].work), x=0.008, ha="left")
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
