"""What a sweep is kept as, and what is said of it: a table, and a sentence or two."""

from __future__ import annotations

from typing import Any, Literal

import msgspec
from rich.markup import escape
from rich.table import Table

from stepbatch.bench.report.table import bottleneck_text, console_for, model_name, number, share
from stepbatch.bench.results import Result, Summary
from stepbatch.bench.sweep.tipping import SweepPoint, Unit, by_load, knee, tipped, tipping

ANSWERED = "were answered"  # what is asked of requests that have no goal
TIPS, KNEE, LATE = "tips over here", "knee", "too late"  # what a table says beside a point


class Series(msgspec.Struct, kw_only=True):
    """One load after another on the same servers."""

    name: str = ""  # the servers' flags that were varied; empty if none were
    unit: Unit
    points: list[SweepPoint] = []  # in the order in which they were measured
    tipping: float | None = None  # the load; None if it isn't known
    knee: float | None = None  # likewise

    def add(self, point: SweepPoint) -> None:
        """Append a point, and find out anew where the server tips over."""
        self.points.append(point)
        top, bend = self.top, knee(self.points)
        self.tipping = top.load if top else None
        self.knee = bend.load if bend else None

    @property
    def top(self) -> SweepPoint | None:
        """The tipping point; ``None`` where every load is too much, or none is."""
        return tipping(self.points) if tipped(self.points) else None


class SweepResult(msgspec.Struct, kw_only=True):
    """A sweep."""

    kind: Literal["sweep"] = "sweep"
    name: str = ""  # the model's
    created: str  # ISO 8601, UTC
    environment: dict[str, Any]  # versions and machine of the client
    options: dict[str, Any]  # the flags, without secrets
    slo_attainment: float  # the share of requests that a point must have met their goal, or answered
    servers: list[dict[str, Any]] = []  # base_url, and what each of the last ones said of itself
    idle_s: float | None = None  # seconds that requests take on idle servers, where that had to be known
    slo_s: list[float] = []  # the different goals of requests, seconds, ascending
    series: list[Series] = []

    def note(self, run: Result) -> None:
        """Keep what a run tells of the servers and of the goals."""
        self.servers = run.servers
        self.name = self.name or model_name(run)
        goals = {record.slo_s for record in run.records if record.slo_s is not None}
        self.slo_s = sorted(goals.union(self.slo_s))


def show(result: SweepResult) -> None:
    """Print each series as a table with its sentences."""
    for series in (series for series in result.series if series.points):
        table = render(series)
        console = console_for(table)
        console.print(table)
        for sentence in sentences(series, result):
            console.print(sentence, markup=False, highlight=False, soft_wrap=True)


def render(series: Series) -> Table:
    """The table of a series, a line a load, from the lowest to the highest."""
    table = Table(title=escape(series.name) or None, title_justify="left", title_style="bold")
    load = "offered\n(req/s)" if series.unit == "rate" else "in\nflight"
    heads = (load, "done\n(req/s)", "mean\n(s)", "P50\n(s)", "P99\n(s)", "SLO\nmet", "goodput\n(req/s)", "jobs/\nstep")
    for head in (*heads, "client\nlag (ms)"):
        table.add_column(head, justify="right")
    table.add_column("")
    for point in by_load(series.points):
        s = point.summary
        met = "-" if s.slo_attainment_rate is None else share(s.slo_attainment_rate)
        figures = (s.throughput_qps, s.latency_mean, s.latency_median, s.latency_p99)
        rest = (s.goodput_qps, s.jobs_per_step, 1000 * point.client.lag_p99)
        cells = [f"{point.load:g}", *map(_figure, figures), met, *map(_figure, rest), ", ".join(marks(point, series))]
        table.add_row(*cells)
    return table


def marks(point: SweepPoint, series: Series) -> list[str]:
    """What a table says beside a point."""
    s = point.summary
    lost = s.failed_requests + s.invalid_requests
    said = (
        (TIPS, point.load == series.tipping and point.good),
        (KNEE, point.load == series.knee),
        (LATE, not point.meets and s.slo_attainment_rate is not None),
        ("fell behind", not point.steady),
        (f"{s.rejected_requests} turned away", s.rejected_requests),
        (f"{s.timed_out_requests} timed out", s.timed_out_requests),
        (f"{lost} failed", lost),
        ("client too slow", point.client.bottleneck),
    )
    return [text for text, so in said if so]


def sentences(series: Series, result: SweepResult) -> list[str]:
    """What a series, which has points, comes to, in plain words."""
    slow = next((point for point in series.points if point.client.bottleneck), None)
    found = [_tipping(series, result), _knee(series)]
    name = f"{series.name}: " if series.name else ""
    return [name + sentence for sentence in found] + (
        [f"{bottleneck_text(slow.client)} (at {amount(slow)})"] if slow else []
    )


def _tipping(series: Series, result: SweepResult) -> str:
    at, over = tipping(series.points), tipped(series.points)
    what, did = "rate" if series.unit == "rate" else "number of requests in flight", _did(series, result)
    goal = f"{100 * result.slo_attainment:g}% of requests {did}"
    if series.unit == "rate" and did == ANSWERED:
        goal += " and the server kept up"
    if at is None:
        assert over is not None  # the lowest
        return f"never met the goal: at {amount(over)} {_shortfall(over, f'of requests {did}')}"
    if over is None:
        return f"did not tip over up to {amount(at)}, at which {goal}"
    short = _shortfall(over, "were" if did == ANSWERED else "did")
    return f"tips over at {amount(at)}: the highest {what} at which {goal}; at {amount(over)} {short}"


def _did(series: Series, result: SweepResult) -> str:
    """What is asked of requests."""
    goals = result.slo_s
    if not goals or all(point.summary.slo_attainment_rate is None for point in series.points):
        return ANSWERED
    return f"met {goals[0]:.3g} s" if len(goals) == 1 else f"met their goals of {goals[0]:.3g} to {goals[-1]:.3g} s"


def _shortfall(point: SweepPoint, did: str) -> str:
    """Why a load was too much."""
    return "the server fell behind" if point.meets else f"{share(attained(point.summary))} {did}"


def _knee(series: Series) -> str:
    bend = knee(series.points)
    last = max(series.points, key=lambda point: point.load)
    if not any(point.summary.throughput_qps for point in series.points):
        return "nothing was answered"
    if bend is None:
        done = number(last.summary.throughput_qps)
        return f"throughput's knee was not reached up to {amount(last)}, where it was {done} req/s"
    offered = " offered" if series.unit == "rate" else ""
    return f"throughput's knee: {amount(bend)}{offered}, {number(bend.summary.throughput_qps)} req/s"


def attained(summary: Summary) -> float:
    """The share of requests that met their goal, or, where they have none, that were answered as asked."""
    rate = summary.slo_attainment_rate
    return summary.completed_requests / max(1, summary.requests) if rate is None else rate


def amount(point: SweepPoint) -> str:
    """A load with its unit."""
    return f"{point.load:g} req/s" if point.unit == "rate" else f"concurrency {point.load:g}"


def _figure(value: float | None) -> str:
    return "-" if value is None else number(value)


def said_of(point: SweepPoint, series: Series) -> str:
    """A point in a line."""
    s = point.summary
    parts = [f"{number(s.throughput_qps)} req/s"]
    if s.latency_p99 is not None:
        parts.append(f"P99 {number(s.latency_p99)} s")
    if s.slo_attainment_rate is not None:
        parts.append(f"{share(s.slo_attainment_rate)} met their goal")
    known = (TIPS, KNEE, LATE)  # these may change with the next point, or were just said
    said = [mark for mark in marks(point, series) if mark not in known]
    name = f"{series.name}: " if series.name else ""
    return f"{name}{amount(point)}: {', '.join([*parts, *said])}"


def series_by_unit(result: SweepResult) -> dict[Unit, list[Series]]:
    """What pictures show: of each kind of load, the series with points, each with a name if there is any."""
    found: dict[Unit, list[Series]] = {}
    for series in result.series:
        if series.points:
            named = msgspec.structs.replace(series, name=series.name or result.name)
            found.setdefault(series.unit, []).append(named)
    return found
