"""What is said of a simulation: a table a load, and how policies compare."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec
from rich.markup import escape
from rich.table import Table

from stepbatch.bench.report.table import console_for, number, share
from stepbatch.bench.simulate.results import Outcome, Setting, SimulationResult

UNITS = {"load": "load {:g}", "rate": "{:g} req/s", "concurrency": "concurrency {:g}", "trace": "the trace's times"}
BASELINE = "fcfs"


def show(result: SimulationResult) -> None:
    """Print a table of each load."""
    for outcomes in by_load(result.outcomes):
        table = render(outcomes, result.curve)
        console_for(table).print(table)


def by_load(outcomes: Sequence[Outcome]) -> list[list[Outcome]]:
    """The runs of each load, in the order in which they were simulated."""
    found: dict[tuple[str, float], list[Outcome]] = {}
    for outcome in outcomes:
        found.setdefault((outcome.setting.unit, outcome.setting.amount), []).append(outcome)
    return list(found.values())


def load_name(setting: Setting) -> str:
    """A load in words."""
    return UNITS[setting.unit].format(setting.amount)


def name(setting: Setting, among: Sequence[Setting]) -> str:
    """What machines differ in from others."""
    words = []
    if _vary(among, "policy") or _vary(among, "ageing"):
        words.append(setting.policy if setting.ageing is None else f"{setting.policy} {setting.ageing:g}")
    if _vary(among, "width"):
        words.append(f"width {setting.width or 'auto'}")
    if _vary(among, "replicas"):
        words.append(f"{setting.replicas} replica{'s' * (setting.replicas > 1)}")
    if _vary(among, "routing"):
        words.append(setting.routing)
    return ", ".join(words)


def _vary(among: Sequence[Setting], field: str) -> bool:
    return len({getattr(setting, field) for setting in among}) > 1


def render(outcomes: Sequence[Outcome], curve: str) -> Table:
    """The table of a load, a line a run. What is set against first come, first served has the same machines."""
    first, among = outcomes[0], [outcome.setting for outcome in outcomes]
    title = f"{curve}: {load_name(first.setting)}, {first.requests} requests"
    table = Table(title=escape(title), title_justify="left", title_style="bold")
    refused, dropped = any(o.refused for o in outcomes), any(o.dropped for o in outcomes)
    goals, compared = any(o.attainment is not None for o in outcomes), bool(list(against_fcfs(outcomes)))
    shown = (
        ("came\n(req/s)", True),
        ("done\n(req/s)", True),
        ("mean\n(s)", True),
        ("P50\n(s)", True),
        ("P99\n(s)", True),
        ("mean\n/ fcfs", compared),
        ("P99\n/ fcfs", compared),
        ("SLO\nmet", goals),
        ("goodput\n(req/s)", goals),
        ("refused", refused),
        ("dropped", dropped),
        ("busy", True),
        ("jobs/\nstep", True),
    )
    table.add_column("")
    for head, there in shown:
        if there:
            table.add_column(head, justify="right")
    table.add_column("")
    for o in outcomes:
        mean, tail = against(o, outcomes) or (None, None)
        cells = (
            *(number(o.rate), number(o.throughput), _figure(o.mean), _figure(o.p50), _figure(o.p99)),
            *(_figure(mean), _figure(tail), "-" if o.attainment is None else share(o.attainment), _figure(o.goodput)),
            *(share(o.refused / o.requests), share(o.dropped / o.requests), share(o.utilisation)),
            number(o.width_mean),
        )
        row = [cell for cell, (_, wanted) in zip(cells, shown, strict=True) if wanted]
        table.add_row(name(o.setting, among), *row, "" if o.steady else "falls behind")
    return table


def against(outcome: Outcome, outcomes: Sequence[Outcome]) -> tuple[float, float] | None:
    """Mean and P99 as multiples of first come, first served on the same machines under the same load, if both ran."""
    same = msgspec.structs.replace(outcome.setting, policy=BASELINE, ageing=None)
    base = next((o for o in outcomes if o.setting == same), None)
    if base is None or base is outcome or not (outcome.mean and outcome.p99 and base.mean and base.p99):
        return None
    return outcome.mean / base.mean, outcome.p99 / base.p99


def against_fcfs(outcomes: Sequence[Outcome]) -> Iterator[tuple[Outcome, tuple[float, float]]]:
    """Every run that can be set against first come, first served: the frontier of mean against P99."""
    for outcome in outcomes:
        ratios = against(outcome, outcomes)
        if ratios:
            yield outcome, ratios


def said_of(outcome: Outcome) -> str:
    """A run in a line."""
    s = outcome.setting
    policy = s.policy if s.ageing is None else f"{s.policy} {s.ageing:g}"
    machines = f"{policy}, width {s.width or 'auto'}, {s.replicas} x {s.routing}"
    return f"{load_name(s)}, {machines}: mean {_figure(outcome.mean)} s, P99 {_figure(outcome.p99)} s"


def _figure(value: float | None) -> str:
    return "-" if value is None else number(value)
