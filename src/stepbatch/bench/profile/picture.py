"""A profile's picture: the curve with its points, and how work a second goes with a step's width."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from stepbatch.bench.profile.knees import Knee, knees
from stepbatch.bench.profile_file import ProfileFile
from stepbatch.bench.report.canvas import FAINT, LINES, log_ticks, picture
from stepbatch.engine.cost import StepCost

MOST_WIDTH = 32


def draw_profile(profile: ProfileFile, path: Path) -> None:
    """Draw what was measured, the curve through it, and the knees.

    Args:
        path: Of the picture.

    Raises:
        OptionError: the path's ending is of no format that can be written.
        SetupError: the file can't be written.
    """
    at = knees(profile)
    with picture(path, 13, 6) as figure:
        figure.suptitle(f"{profile.name} on {profile.device}, {profile.dtype}", x=0.01, ha="left")
        curve, work = figure.subplots(1, 2)
        _draw_curve(curve, profile.costs.step, at)
        _draw_work(work, profile.costs.step, at)
        handles = [
            Line2D([], [], color=LINES[i % len(LINES)], linewidth=3, label=_said(knee)) for i, knee in enumerate(at)
        ]
        marks = [
            Line2D([], [], color=FAINT, marker="o", linestyle="", label="measured"),
            Line2D([], [], color=FAINT, label="the curve"),
            Line2D([], [], color=FAINT, marker="D", markersize=9, markerfacecolor="none", linestyle="", label="knee"),
        ]
        figure.legend(handles=[*handles, *marks], loc="outside lower left", ncols=4)


def _said(knee: Knee) -> str:
    return f"{knee.size}: {knee.width} job{'s' * (knee.width != 1)} pay{'s' * (knee.width == 1)}"


def _draw_curve(axes: Axes, cost: StepCost, at: Sequence[Knee]) -> None:
    for i, knee in enumerate(at):
        colour, jobs = LINES[i % len(LINES)], np.geomspace(1, max(point.jobs for point in knee.points) * 2, 40)
        tokens = [knee.tokens * count for count in jobs]
        seconds = [
            1000 * cost.seconds(round(n), round(knee.squares * count)) for n, count in zip(tokens, jobs, strict=True)
        ]
        axes.plot(tokens, seconds, color=colour, linewidth=1.6)
        measured = [(point.tokens, 1000 * point.seconds) for point in knee.points]
        axes.plot(*zip(*measured, strict=True), color=colour, marker="o", linestyle="")
    axes.set(xscale="log", yscale="log", xlabel="tokens in the step", ylabel="ms", title="What a step takes")
    log_ticks(axes.xaxis)
    log_ticks(axes.yaxis)


def _draw_work(axes: Axes, cost: StepCost, at: Sequence[Knee]) -> None:
    widths = range(1, max(MOST_WIDTH, *(knee.width for knee in at)) + 1)
    for i, knee in enumerate(at):
        colour, alone = LINES[i % len(LINES)], knee.rate(cost, 1)
        axes.plot(widths, [knee.rate(cost, width) / alone for width in widths], color=colour, linewidth=1.6)
        measured = [(point.jobs, point.jobs / point.seconds / alone) for point in knee.points]
        axes.plot(*zip(*measured, strict=True), color=colour, marker="o", linestyle="", markersize=5)
        style: dict[str, Any] = {
            "color": colour,
            "marker": "D",
            "markersize": 10,
            "markerfacecolor": "none",
            "linestyle": "",
        }
        axes.plot([knee.width], [knee.rate(cost, knee.width) / alone], **style)
    axes.set(xscale="log", xlabel="jobs in the step", ylabel="times that of one job", title="Work a second")
    axes.set_ylim(bottom=0)
    log_ticks(axes.xaxis)
