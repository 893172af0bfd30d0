"""The sections of docs/benchmarks.md on time: under overload, predicted, simulated, and what choosing takes itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from parts.markdown import paragraphs, table

OVERLOAD = """
More than a server with the bundled model can do, in an open loop, for two minutes each: `--max-queue-seconds
{queue:g}`. Goodput is of what a closed loop gets through, {capacity:.2f} requests a second. Those who are let in
should take no longer than 1.2 times what they were told may queue before them and their own time (the bound). The
last column is latency ten seconds after the load's end over that before it.
"""
PREDICTION = """
What requests were told on arrival that they would take, beside what they took: everything mixed, with the bundled
model.
"""
SIMULATION = """
`stepbatch bench simulate` beside a server with the bundled model, on the same requests at the same moments: steps of
8, 28 and 50, {requests} requests a load. Simulated over measured, by what that server had learned at the end
(`/v1/profile`), by what another had learned before, and by what `stepbatch profile` measured in peace:
"""
SCHEDULER_TIME = """
A call of the scheduler with {running} jobs that run and {waiting:,} that wait, median, in microseconds: where nothing
has changed since the last, somebody has come, or one of those that ran has left. {requests:,} simulated requests,
mixed steps by the H200's 1024x1024 curve, took one core {seconds:.0f} s.
"""


def overload(data: Mapping[str, Any]) -> str:
    """What a server does when more is asked of it than it can do."""
    columns = ("load", "answered", "refused", "goodput", "refusal, P99", "latency, P99", "bound", "memory", "after")
    rows = [
        (
            f"{run['load']:g}x",
            str(run["answered"]),
            str(run["refused"]),
            f"{run['goodput']:.0%}",
            f"{1000 * run['refusal_p99']:.0f} ms",
            f"{run['latency_p99']:.1f} s",
            f"{run['bound']:.1f} s",
            f"{run['growth_mb']:+.0f} MiB",
            f"{run['after']:.2f}x",
        )
        for run in data["runs"]
    ]
    about = OVERLOAD.format(queue=data["queue_seconds"], capacity=data["capacity"])
    return _section("Overload", about, data, "overload", table(columns, rows))


def prediction(data: Mapping[str, Any]) -> str:
    """How far off predictions on arrival are."""
    rows = [(f"{run['load']:g}", f"{run['median_error']:.1%}", str(len(run["taken"]))) for run in data["runs"]]
    return _section(
        "Prediction on arrival", PREDICTION, data, "prediction", table(("load", "median error", "requests"), rows)
    )


def simulation(data: Mapping[str, Any]) -> str:
    """How near simulations come."""

    def ratios(run: Mapping[str, Any], figure: str) -> list[str]:
        return [f"{run[by][figure] / run['measured'][figure]:.2f}" for by in ("itself", "another", "profile")]

    rows = [(f"{run['load']:g}", *ratios(run, "mean"), *ratios(run, "p99")) for run in data["runs"]]
    columns = ("load", "mean", "by another", "by profile", "P99", "by another", "by profile")
    about = SIMULATION.format(requests=data["environment"]["requests"])
    return _section("Simulation", about, data, "simulation", table(columns, rows))


def scheduler_time(data: Mapping[str, Any]) -> str:
    """What choosing takes."""
    cases = ("nothing", "one came", "one left")
    rows = [(policy, *(f"{took[case]:.0f}" for case in cases)) for policy, took in data["calls"].items()]
    about = SCHEDULER_TIME.format(
        running=data["running"],
        waiting=data["waiting"],
        requests=data["simulated_requests"],
        seconds=data["simulation_seconds"],
    )
    columns = ("policy", "nothing changed", *cases[1:])
    return _section("What choosing takes", about, data, "scheduler_time", table(columns, rows))


def _section(title: str, about: str, data: Mapping[str, Any], script: str, rows: str) -> str:
    measured = data["environment"]
    on = f"Measured on {measured['date'][:10]}, on {measured['cpu']}; `python benchmarks/{script}.py` measures it anew."
    return "\n\n".join([f"## {title}", paragraphs(about), rows, paragraphs(on)])
