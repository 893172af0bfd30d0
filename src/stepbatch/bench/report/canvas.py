"""What all pictures share: colours, type, units, and how they are written."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.text import Annotation
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from matplotlib.transforms import Bbox

from stepbatch.bench.report.table import number
from stepbatch.errors import OptionError, SetupError

# Okabe and Ito's colours, which people with any kind of colour vision can tell apart.
BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY = "#0072b2", "#d55e00", "#009e73", "#e69f00", "#cc79a7", "#56b4e9"
INK, FAINT, PALE = "#222222", "#666666", "#c4c4c4"
LINES = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, INK)
DASHES = ("-", (0, (5, 1.5)), (0, (1, 1)))  # a colour comes again with the next of these
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": FAINT,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e8e8e8",
    "legend.frameon": False,
    "legend.fontsize": 9,
    "figure.dpi": 150,
    "text.parse_math": False,  # a $ in a name is a $
}
PLACES = (  # of a label beside its point: offset in points, and how it is aligned
    ((0, 7), "center", "bottom"),
    ((7, 0), "left", "center"),
    ((-7, 0), "right", "center"),
    ((0, -7), "center", "top"),
    ((6, 6), "left", "bottom"),
    ((-6, 6), "right", "bottom"),
)
FORMATS = (".png", ".svg", ".pdf")
MOST_GOALS = 3  # that are drawn one by one


@contextmanager
def picture(path: Path, width: float, height: float) -> Iterator[Figure]:
    """A figure of so many inches, which is written when the context ends.

    Raises:
        OptionError: the path's ending is of no format that can be written.
        SetupError: the file can't be written.
    """
    if path.suffix.lower() not in FORMATS:
        raise OptionError(f"pictures are written as {', '.join(FORMATS)}, not as {path}")
    with rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a name in a script that the font lacks shows as boxes
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path)
        except OSError as error:
            raise SetupError(f"can't write {path}: {error.strerror or error}") from error


class Unit:
    """The unit that suits times up to ``longest`` seconds."""

    def __init__(self, longest: float) -> None:
        units = ((0.5, 1e3, "ms"), (300.0, 1.0, "s"), (7200.0, 1 / 60, "min"), (math.inf, 1 / 3600, "h"))
        _, self.each, self.name = next(unit for unit in units if longest < unit[0])

    def text(self, seconds: float) -> str:
        """A time in this unit, with its name."""
        return f"{brief(seconds * self.each)} {self.name}"


def brief(value: float) -> str:
    """A figure of three digits, or more where it has more before the point."""
    return f"{value:.{max(0, 3 - len(str(int(abs(value)))))}f}" if abs(value) >= 1 else number(value)


def short(name: str, length: int = 30) -> str:
    """A name of at most so many characters, with both of its ends."""
    return name if len(name) <= length else f"{name[: length // 2 - 1]}…{name[-(length // 2) :]}"


def pale(colour: str) -> tuple[float, float, float]:
    """A lighter shade."""
    red, green, blue = (1 - 0.38 * (1 - part) for part in to_rgb(colour))
    return red, green, blue


def line_style(i: int) -> dict[str, Any]:
    """Colour and dashes of the line number ``i``."""
    return {"color": LINES[i % len(LINES)], "linestyle": DASHES[i // len(LINES) % len(DASHES)]}


def small(colour: str) -> dict[str, Any]:
    """The type of a remark beside a title."""
    return {"fontsize": 9.5, "fontweight": "normal", "color": colour}


def legend_beside(axes: Axes, handles: Sequence[Artist]) -> None:
    """A legend to the right of a panel, where it hides nothing."""
    if handles:
        axes.legend(handles=list(handles), loc="upper left", bbox_to_anchor=(1.005, 1.02))


def log_ticks(axis: Axis) -> None:
    """Plain figures on a logarithmic axis."""
    axis.set_major_locator(LogLocator(10, subs=(1, 2, 5)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def draw_curve(axes: Axes, latencies: Sequence[float], unit: Unit, **style: Any) -> list[Line2D]:
    """The share of requests that were answered within a latency; percentiles lie on the curve.

    Args:
        latencies: In seconds, sorted; one at least.
    """
    values = [latencies[0], *latencies] if len(latencies) == 1 else latencies
    return axes.plot(np.array(values) * unit.each, np.linspace(0, 100, len(values)), linewidth=1.8, **style)


def draw_goals(axes: Axes, goals: Sequence[float], unit: Unit) -> list[Line2D]:
    """A line for each different goal (seconds) that isn't far outside; none where there are many.

    Many differ by request, so that no line says which requests met theirs.

    Returns:
        What goes into the legend.
    """
    different = sorted(set(goals))
    if len(different) > MOST_GOALS:
        span = f"SLO  {unit.text(different[0])} to {unit.text(different[-1])}, by request"
        return [Line2D([], [], linestyle="", label=span)]
    edge = axes.get_xlim()[1]
    near = [goal for goal in different if goal * unit.each <= 2 * edge]
    style: dict[str, Any] = {"color": INK, "linestyle": ":", "linewidth": 1.6}
    for goal in near:
        axes.axvline(goal * unit.each, **style)
    if near:
        axes.set_xlim(0, max(edge, 1.04 * near[-1] * unit.each))
    told = ", ".join(unit.text(goal) + ("" if goal in near else " (outside)") for goal in different)
    return [Line2D([], [], **style, label=f"SLO  {told}")] if different else []


@dataclass(frozen=True)
class PointLabel:
    """What is written beside a point of a panel."""

    x: float
    y: float
    text: str
    colour: str


def draw_labels(figure: Figure, axes: Axes, labels: Sequence[PointLabel]) -> None:
    """Write labels beside their points: clear of lines if possible, and of other labels, or not at all.

    The rest of the figure must be there already, since its layout says what is free, and is final.
    """
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    inked, written = _inked(axes), list[Bbox]()
    halo = [withStroke(linewidth=3, foreground="white")]
    for label in labels:
        at = (label.x, label.y)
        note = axes.annotate(label.text, at, (0, 0), textcoords="offset points", fontsize=9, color=label.colour)
        note.set(in_layout=False, path_effects=halo)
        place = _place(axes, note, [*written, *inked]) or _place(axes, note, written)
        if place is None:
            note.remove()
        else:
            written.append(place)


def _place(axes: Axes, note: Annotation, taken: Sequence[Bbox]) -> Bbox | None:
    """Move a label to the first place that is free; the room that it takes there, in pixels."""
    for offset, ha, va in PLACES:
        note.set(position=offset, ha=ha, va=va)
        box = note.get_window_extent()
        if axes.bbox.x0 <= box.x0 and axes.bbox.y0 <= box.y0 and not box.count_overlaps(taken):
            return box
    return None


def _inked(axes: Axes) -> list[Bbox]:
    """Where the lines of a panel are: small boxes along them, in pixels."""
    boxes = []
    for line in axes.lines:
        points = axes.transData.transform(line.get_xydata())
        for begin, end in pairwise(points):
            count = int(np.hypot(*(end - begin)) // 6) + 2
            boxes += [Bbox.from_bounds(x - 2, y - 2, 4, 4) for x, y in np.linspace(begin, end, count)]
        if line.get_marker() not in ("None", None, ""):
            boxes += [Bbox.from_bounds(x - 7, y - 7, 14, 14) for x, y in points]
    return boxes
