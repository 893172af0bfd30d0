"""The section of docs/benchmarks.md on the scheduler, from the JSON of benchmarks/scheduling.py."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from parts.markdown import paragraphs, table

ABOUT = """
Widths that the scheduler finds by itself beside fixed ones, with the bundled model in one process, {threads} thread,
{requests} requests a run, the same arrivals for all. Each figure is auto's over that of the best fixed width, which is
another one for each figure: throughput above 1 and latency below 1 are better than any of {widths}. Loads are shares of
the best fixed width's closed-loop throughput.

Measured on {date}, on {cpu}; `python benchmarks/scheduling.py` measures it anew. All settings took turns, and each
figure is the median of {rounds} rounds; a P99 is as good as the longest of {requests}.
"""
POLICIES = """
A start for what is short, and the shortest remaining time first with different ageing, over first come, first served
at the same width; steps of 8, 28 and 50, load {load}, {requests} requests.
"""


def section(data: Mapping[str, Any]) -> str:
    """The section, as Markdown."""
    about = data["environment"]
    widths = ", ".join(width for width in next(iter(data["widths"].values()))["capacity"] if width != "auto")
    told_of = {"date": about["date"][:10], "cpu": about["cpu"], "widths": widths, **about["settings"]}
    return "\n\n".join(
        [
            "## Scheduling",
            paragraphs(ABOUT.format_map(told_of)),
            table(("workload", "load", "throughput", "mean latency", "P99"), against_fixed(data)),
            paragraphs(POLICIES.format(load=data["policy_load"], requests=about["settings"]["policy_requests"])),
            table(("width", "policy", "mean latency", "P99"), against_fcfs(data)),
            f"Steps' seconds were predicted with a median error of {data['step_error']:.1%}.",
        ]
    )


def against_fixed(data: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """Auto over the best fixed width, by workload and load."""
    for name, measured in data["widths"].items():
        capacity = measured["capacity"]
        best = max(rate for width, rate in capacity.items() if width != "auto")
        yield name, "closed loop", f"{capacity['auto'] / best:.2f}", "", ""
        for load, runs in measured["loads"].items():
            auto, fixed = runs["auto"], [run for width, run in runs.items() if width != "auto"]
            rate = auto["rate"] / max(run["rate"] for run in fixed)
            mean, p99 = (auto[key] / min(run[key] for run in fixed) for key in ("mean", "p99"))
            yield name, load, f"{rate:.2f}", f"{mean:.2f}", f"{p99:.2f}"


def against_fcfs(data: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """Every policy over first come, first served."""
    for width, runs in data["policies"].items():
        for name, run in runs.items():
            if name != "fcfs":
                yield width, name, *(f"{run[key] / runs['fcfs'][key]:.2f}" for key in ("mean", "p99"))
