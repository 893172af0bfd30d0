"""The section of docs/benchmarks.md on whole pipelines, from the JSON of benchmarks/pipelines.py."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from parts.markdown import paragraphs
from parts.serving_report import COLUMNS, OURS, TITLES, rows

CEILING = "in_process"
GOAL = 0.95  # of what the pipeline does in one process with full batches, where all requests are equal

ABOUT = """
A pipeline that has no native model runs through diffusers, a whole call at a time, so there stepbatch batches as the
others do: {requests} requests, {concurrency} in flight, up to 8 of one signature a call, which waits 20 ms for company.
The checkpoint is Stable Diffusion with a small UNet. Each model computes with {threads} thread, one server is up at a
time, and figures are medians of {rounds} rounds whose orders are opposite. LitServe and Ray Serve group a batch's
requests by signature by hand, in [`shared.py`](../benchmarks/peers/shared.py).

*The pipeline in one process* is no server: it has all requests at once, every call is full, and pictures are compressed
as the servers do. No server of whole calls can surpass it but by compressing beside the next call.

Measured on {date}, on {cpu}; `python benchmarks/pipelines.py` measures it anew.
"""


def section(data: Mapping[str, Any]) -> str:
    """The section, as Markdown."""
    about = data["environment"]
    told_of = {"date": about["date"][:10], "cpu": about["cpu"], **about["settings"]}
    parts = ["## Pipelines beside LitServe and Ray Serve", paragraphs(ABOUT.format_map(told_of))]
    for name, about in data["checkpoints"].items():
        for workload in about["workloads"]:
            lines = [f"| {' | '.join(COLUMNS)} |", "| --- " + "| ---: " * (len(COLUMNS) - 1) + "|"]
            lines += [f"| {' | '.join(row.cells())} |" for row in rows(data, name, workload)]
            parts += [f"### {TITLES[workload]}", _explained(about["workloads"][workload]), "\n".join(lines)]
    parts.append(paragraphs(told(data)))
    parts.append("The code is [`pipelines.py`](../benchmarks/pipelines.py).")
    return "\n\n".join(parts)


def told(data: Mapping[str, Any]) -> str:
    """What the figures come to."""
    said = []
    for workload in ("same", "signatures"):
        shares = _shares(data, workload)
        if shares:
            of = ", ".join(f"{share:.1%}" for share in shares)
            text = f"{TITLES[workload]}: {statistics.median(shares):.1%} of the pipeline in one process ({of} by round)"
            said.append(text + (f"; the goal is {GOAL:.0%}." if workload == "same" else "."))
    medians = data["idle"]["medians"]
    figures = " and ".join(f"{seconds * 1000:.1f} ms with a delay of {delay} ms" for delay, seconds in medians.items())
    said.append(f"A lone request to an idle server with a native model takes {figures}: it never waits for company.")
    return "\n\n".join(said)


def _shares(data: Mapping[str, Any], workload: str) -> list[float]:
    """Our throughput over the ceiling's, in each round that has both."""
    rates: dict[str, dict[int, float]] = {OURS: {}, CEILING: {}}
    for run in data["runs"]:
        if run["workload"] == workload and run["server"] in rates:
            rates[run["server"]][run["round"]] = run["summary"]["throughput_qps"]
    return [rate / rates[CEILING][number] for number, rate in rates[OURS].items() if number in rates[CEILING]]


def _explained(choices: Mapping[str, list[Any]]) -> str:
    sizes, steps = choices["size"], choices["num_inference_steps"]
    count = len(sizes) * len(steps)
    kinds = "one signature" if count == 1 else f"{count} signatures"
    return paragraphs(f"{' or '.join(sizes)}, {', '.join(map(str, steps))} steps: {kinds}; prompts and seeds differ.")
