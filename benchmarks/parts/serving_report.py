"""What came of servers side by side: JSON to keep, and tables for the terminal."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

SERVERS = {
    "fastapi_lock": "FastAPI and a lock",
    "ours": "stepbatch",
    "litserve_server": "LitServe",
    "ray_server": "Ray Serve",
}
NAMES = SERVERS | {"in_process": "the pipeline in one process"}  # which is no server
OURS = "ours"

TITLES = {
    "same": "The same for all",
    "steps": "Mixed steps",
    "everything": "Mixed everything",
    "poisson": "Mixed everything, at random times",
    "signatures": "Mixed sizes and steps",  # of whole pipelines
}
COLUMNS = ("server", "req/s", "mean, s", "P99, s", "jobs a step", "throughput", "mean latency")


@dataclass(frozen=True)
class Row:
    """A server's figures on a workload: medians over the rounds."""

    server: str
    throughput: float  # answered requests a second
    least: float  # of the rounds' throughput
    most: float
    mean: float | None  # latency, seconds
    p99: float | None
    jobs_per_step: float | None
    unanswered: int
    faster: float | None  # ours over its throughput; None for ours
    sooner: float | None  # its mean latency over ours

    def cells(self) -> list[str]:
        """As text, in the order of ``COLUMNS``."""
        name = NAMES[self.server] + f" ({self.unanswered} unanswered)" * bool(self.unanswered)
        rate = f"{self.throughput:.2f} ({self.least:.2f} to {self.most:.2f})"
        ratios = [f"{ratio:.2f}x" if ratio else "" for ratio in (self.faster, self.sooner)]
        return [
            name,
            rate,
            *(f"{x:.2f}" if x is not None else "" for x in (self.mean, self.p99, self.jobs_per_step)),
            *ratios,
        ]


def rows(data: Mapping[str, Any], checkpoint: str, workload: str) -> list[Row]:
    """The servers' figures on a workload, ours first."""
    runs: dict[str, list[dict[str, Any]]] = {}
    for run in data["runs"]:
        if (run["checkpoint"], run["workload"]) == (checkpoint, workload):
            runs.setdefault(run["server"], []).append(run["summary"])
    names = sorted(runs, key=lambda name: (name != OURS, list(NAMES).index(name)))
    ours = runs.get(OURS, [])
    return [_row(name, runs[name], ours if name != OURS else []) for name in names]


def _row(server: str, runs: Sequence[Mapping[str, Any]], ours: Sequence[Mapping[str, Any]]) -> Row:
    rates = [run["throughput_qps"] for run in runs]
    rate, mean = statistics.median(rates), _median(runs, "latency_mean")
    our_rate, our_mean = _median(ours, "throughput_qps"), _median(ours, "latency_mean")
    return Row(
        server=server,
        throughput=rate,
        least=min(rates),
        most=max(rates),
        mean=mean,
        p99=_median(runs, "latency_p99"),
        jobs_per_step=_median(runs, "jobs_per_step"),
        unanswered=sum(run["requests"] - run["completed_requests"] for run in runs),
        faster=our_rate / rate if our_rate and rate else None,
        sooner=mean / our_mean if our_mean and mean else None,
    )


def _median(runs: Iterable[Mapping[str, Any]], name: str) -> float | None:
    values = [run[name] for run in runs if run.get(name) is not None]
    return statistics.median(values) if values else None


def show(console: Console, data: Mapping[str, Any]) -> None:
    """Print a table for each checkpoint and workload."""
    for checkpoint, about in data["checkpoints"].items():
        for workload in about["workloads"]:
            table = Table(title=f"{checkpoint}: {TITLES[workload]}", title_justify="left", title_style="bold")
            for column in COLUMNS:
                table.add_column(column, justify="left" if column == "server" else "right")
            for row in rows(data, checkpoint, workload):
                table.add_row(*row.cells())
            console.print(table)


def save(path: Path, data: Mapping[str, Any]) -> None:
    """Write everything that was measured: a run a line, for there are many."""
    path.parent.mkdir(parents=True, exist_ok=True)
    runs = ",\n".join(f"  {json.dumps(run)}" for run in data["runs"])
    rest = json.dumps({name: value for name, value in data.items() if name != "runs"}, indent=1)
    path.write_text(f'{rest.removesuffix("}").rstrip()},\n "runs": [\n{runs}\n ]\n}}\n')


def rounded(value: Any) -> Any:
    """The same with four decimals, and without what is not known."""
    if isinstance(value, dict):
        return {name: rounded(item) for name, item in value.items() if item is not None}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return round(value, 4) if isinstance(value, float) else value
