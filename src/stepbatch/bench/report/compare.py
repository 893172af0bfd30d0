"""``stepbatch bench compare``: runs of the same work, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.markup import escape
from rich.table import Table

from stepbatch.bench.report.table import bottleneck_text, console_for, number, work_text
from stepbatch.bench.results import Result, Summary, load
from stepbatch.errors import OptionError, SetupError

NOTEWORTHY = 0.01  # a change of less is called neither better nor worse
STYLES = {"better": "green", "worse": "bold red", "": ""}
VOLATILE = ("date", "load")  # of the environment: differ from run to run on the same machine


@dataclass(frozen=True)
class Figure:
    """A row of the comparison."""

    label: str
    name: str  # of the summary's field
    good: Literal[-1, 0, 1]  # whether more is better
    change: Literal["percent", "points", "count"] = "percent"


FIGURES = (
    Figure("Request throughput (req/s)", "throughput_qps", 1),
    Figure("Output throughput (outputs/s)", "output_throughput_ops", 1),
    Figure("Megapixel throughput (MP/s)", "megapixels_per_second", 1),
    Figure("Latency mean (s)", "latency_mean", -1),
    Figure("Latency median (s)", "latency_median", -1),
    Figure("Latency P90 (s)", "latency_p90", -1),
    Figure("Latency P95 (s)", "latency_p95", -1),
    Figure("Latency P99 (s)", "latency_p99", -1),
    Figure("Duration (s)", "duration", -1),
    Figure("Peak memory (MB)", "peak_memory_mb_max", -1),
    Figure("Jobs per step", "jobs_per_step", 0),
    Figure("SLO attainment", "slo_attainment_rate", 1, "points"),
    Figure("Goodput (req/s)", "goodput_qps", 1),
    Figure("Requests not answered well", "", -1, "count"),
)


def run_compare(paths: Sequence[Path], plot: Path | None = None) -> int:
    """Print what each run's figures are, and how they differ from the first's; and draw them, where ``plot`` says.

    Raises:
        OptionError: there are fewer than two runs, or they did different work.
        SetupError: a file has no run in it, or the picture can't be made.
    """
    results = _load(paths)
    _check_same_work(paths, list(results.values()))
    table = _table(results)
    console = console_for(table)
    console.print(table)
    for warning in _warnings(results):
        console.print(f"[yellow]warning:[/] {escape(warning)}", highlight=False, soft_wrap=True)
    if plot is not None:
        _draw(results, plot)
        print(plot)
    return 0


def _load(paths: Sequence[Path]) -> dict[str, Result]:
    """The runs by what they are called: their files' names, or, where two have the same, their paths."""
    if len(paths) < 2:
        raise OptionError("stepbatch bench compare needs the files of two runs or more")
    seen: set[Path] = set()
    for path in paths:
        if path.resolve() in seen:
            raise OptionError(f"{path} is given twice")
        seen.add(path.resolve())
    stems = [path.stem for path in paths]
    names = stems if len(set(stems)) == len(stems) else [str(path) for path in paths]
    return {name: load(path) for name, path in zip(names, paths, strict=True)}


def _check_same_work(paths: Sequence[Path], results: Sequence[Result]) -> None:
    first = results[0].work
    for path, result in zip(paths[1:], results[1:], strict=True):
        if result.work.digest == first.digest:
            continue
        ours, theirs = first.parts, result.work.parts
        parts = [part for part in {**ours, **theirs} if ours.get(part) != theirs.get(part)]
        raise OptionError(f"{paths[0]} and {path} did different work: {', '.join(parts) or 'their digests differ'}")


def _table(results: Mapping[str, Result]) -> Table:
    first, *others = results
    runs = list(results.values())
    table = Table(title=escape(work_text(runs[0].work)), title_justify="left", title_style="bold")
    table.add_column("")
    table.add_column(escape(first), justify="right")
    for name in others:
        table.add_column(escape(name), justify="right")
        table.add_column("Δ")
    for figure in FIGURES:
        values = [_value(figure, run.summary) for run in runs]
        if any(value is not None for value in values):
            cells = [_shown(figure, values[0])]
            for value in values[1:]:
                cells += [_shown(figure, value), _change(figure, values[0], value)]
            table.add_row(figure.label, *cells)
    return table


def _value(figure: Figure, summary: Summary) -> float | None:
    if not figure.name:
        return summary.requests - summary.completed_requests
    value: float | None = getattr(summary, figure.name)
    return value


def _shown(figure: Figure, value: float | None) -> str:
    if value is None:
        return "-"
    return {"percent": number(value), "points": f"{value:.1%}", "count": f"{value:.0f}"}[figure.change]


def _change(figure: Figure, before: float | None, after: float | None) -> str:
    """How a figure differs, and in words, too, whether for the better."""
    if before is None or after is None:
        return ""
    difference = after - before
    if figure.change == "percent":
        if not before:
            return ""
        difference /= before
    text = {
        "percent": f"{difference:+.1%}",
        "points": f"{100 * difference:+.1f} points",
        "count": f"{difference:+.0f}" if difference else "",
    }[figure.change]
    judged = difference * figure.good if abs(difference) >= NOTEWORTHY else 0
    word = "better" if judged > 0 else "worse" if judged < 0 else ""
    return f"[{STYLES[word]}]{text} {word}[/]" if word else text


def _warnings(results: Mapping[str, Result]) -> list[str]:
    """What a reader should know before trusting the differences."""
    lines = []
    for name, result in results.items():
        missed = result.summary.requests - result.summary.completed_requests
        if result.client.bottleneck:
            lines.append(f"{name}: {bottleneck_text(result.client).removeprefix('WARNING: ')}")
        if missed:
            told = f"{missed} of {result.summary.requests} requests were not answered well, and are in no latency"
            lines.append(f"{name}: {told}")
        if result.summary.requests < result.work.requests:
            lines.append(f"{name}: stopped after {result.summary.requests} of its requests")
    (baseline, first), *others = results.items()
    for name, result in others:
        if _goals(result) != _goals(first):
            told = f"{_goals(result)}, not {_goals(first)}: attainment and goodput don't compare"
            lines.append(f"{name}: held to other goals than {baseline}: {told}")
        ours, theirs = first.environment, result.environment
        other = [key for key in {**ours, **theirs} if key not in VOLATILE and ours.get(key) != theirs.get(key)]
        if other:
            told = ", ".join(f"{key} ({theirs.get(key)}, not {ours.get(key)})" for key in other)
            lines.append(f"{name}: measured elsewhere or otherwise than {baseline}: {told}")
    return lines


def _goals(result: Result) -> str:
    """What was asked of latency, in words."""
    found = sorted({record.slo_s for record in result.records if record.slo_s is not None})
    if not found:
        return "none"
    return f"{number(found[0])} s" if len(found) == 1 else f"{number(found[0])} to {number(found[-1])} s"


def _draw(results: Mapping[str, Result], path: Path) -> None:
    try:
        from stepbatch.bench.report.plots import draw_comparison
    except ModuleNotFoundError as error:
        raise SetupError(f"a picture needs {error.name}: pip install 'stepbatch[bench]'") from error
    draw_comparison(results, path)
