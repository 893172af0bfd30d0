"""What a server does when more is asked of it than it can do: 2, 3 and 5 times its capacity, and right after.

Run with: python benchmarks/overload.py [--model-path DIR] [--seconds N] [--quick] [--output FILE]

A closed loop finds the capacity. Then each load comes in an open loop, whatever the server says: how much of the
capacity is answered in time, how soon the rest is refused, how long those that are let in take, how the memory of the
server's processes grows, and how long requests take again when the load has ended for ten seconds.
The client shares the machine with the server, so the model computes with one thread.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from parts.processes import resident_mb
from parts.serving_docs import rewrite_page
from stepbatch.bench.environment import environment
from stepbatch.bench.options import (
    DatasetOptions,
    GoalOptions,
    LoadOptions,
    ReportOptions,
    RequestOptions,
    ServingOptions,
    TargetOptions,
)
from stepbatch.bench.results import Record
from stepbatch.bench.servers import running
from stepbatch.bench.serving import measure
from stepbatch.demo import MODEL_PATH

RESULTS = Path(__file__).parent / "results" / "overload.json"
PACKAGES = ("torch", "diffusers", "transformers", "aiohttp", "uvicorn")
LOADS = (2.0, 3.0, 5.0)
QUEUE_SECONDS = 5.0  # --max-queue-seconds
IN_FLIGHT = 24  # of the closed loop: not so many that some are refused
CALM = 0.3  # the load of the runs before and after
REST_SECONDS = 10.0  # between the last request of an overload and the next run
REFUSED = 429
SIDE, STEPS = 128, 8  # pixels


@dataclass(frozen=True)
class Lengths:
    """Of each part, seconds."""

    closed: float = 30.0
    calm: float = 20.0
    overload: float = 120.0


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model-path", default=str(MODEL_PATH), help="a checkpoint that has a native model")
    parser.add_argument("--seconds", type=float, default=Lengths.overload, help="of each overload")
    parser.add_argument("--quick", action="store_true", help="a little of everything, to see that it runs")
    parser.add_argument("--output", type=Path, help="where the JSON goes; without it, in results/ beside this script")
    options = parser.parse_args(arguments)
    lengths = Lengths(closed=3.0, calm=3.0, overload=4.0) if options.quick else Lengths(overload=options.seconds)
    output = options.output or (RESULTS.with_name("overload-quick.json") if options.quick else RESULTS)
    console = Console() if sys.stdout.isatty() else Console(width=120)
    flags = ["--model-path", options.model_path, "--num-threads", "1", "--max-queue-seconds", f"{QUEUE_SECONDS:g}"]
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "stepbatch", "serve", "--port", "0", "--log-level", "warning", *flags]
        with running(command, Path(scratch) / "log") as server:
            found = _measure(server.base_url, lengths)
    show(console, found)
    output.parent.mkdir(parents=True, exist_ok=True)
    about = environment(PACKAGES) | {"model": Path(options.model_path).name, "side": SIDE, "steps": STEPS}
    output.write_text(json.dumps({"environment": about, "queue_seconds": QUEUE_SECONDS, **found}, indent=2) + "\n")
    if output == RESULTS:
        rewrite_page()
    console.print(f"all of it: {output}")


def _measure(base_url: str, lengths: Lengths) -> dict[str, Any]:
    first = _send(base_url, IN_FLIGHT, max_concurrency=IN_FLIGHT)  # its first steps set things up
    rate = IN_FLIGHT / first[-1].ended
    closed = _send(base_url, max(IN_FLIGHT, int(rate * lengths.closed)), max_concurrency=IN_FLIGHT)
    if any(record.outcome != "ok" for record in closed):
        raise SystemExit("the closed loop, which is to tell the capacity, was not answered in full")
    capacity = len(closed) / max(record.ended for record in closed)
    before = _calm(base_url, capacity, lengths)
    runs = []
    for load in LOADS:
        memory = resident_mb()
        began = time.monotonic()
        sent = _send(base_url, int(load * capacity * lengths.overload), rate=load * capacity)
        rest = began + max(record.intended for record in sent) + REST_SECONDS
        run = {"load": load} | _figures(sent, capacity, memory)
        time.sleep(max(0.0, rest - time.monotonic()))
        runs.append(run | {"after": _calm(base_url, capacity, lengths) / before})
    return {"capacity": capacity, "calm_latency": before, "runs": runs}


def _calm(base_url: str, capacity: float, lengths: Lengths) -> float:
    """The mean latency at a low load, seconds."""
    rate = CALM * capacity
    records = _send(base_url, max(3, int(rate * lengths.calm)), rate=rate)
    return float(np.mean([record.latency for record in records]))


def _figures(sent: Sequence[Record], capacity: float, memory: float) -> dict[str, float]:
    """Of an overload; ``memory`` is what there was before it, MiB."""
    done = [record for record in sent if record.outcome == "ok"]
    refused = [record for record in sent if record.status == REFUSED]
    lost = [record for record in sent if record.outcome != "ok" and record.status != REFUSED]
    end = max(record.intended for record in sent)
    in_time = [record for record in done if record.ended <= end]
    services = [record.service_s for record in done if record.service_s is not None]
    return {
        "requests": len(sent),
        "answered": len(done),
        "refused": len(refused),
        "lost": len(lost),
        "goodput": len(in_time) / end / capacity,
        "refusal_p99": _p99([record.ended - record.sent for record in refused]),
        "latency_p99": _p99([record.latency for record in done]),
        "bound": QUEUE_SECONDS + _p99(services),  # of the latency: a full queue, then the work
        "growth_mb": resident_mb() - memory,
    }


def _p99(values: Sequence[float]) -> float:
    return float(np.percentile(values, 99)) if values else 0.0


def _send(base_url: str, count: int, rate: float = float("inf"), max_concurrency: int = 0) -> list[Record]:
    options = ServingOptions(
        target=TargetOptions(base_url=(base_url,)),
        dataset=DatasetOptions(dataset="demo", num_prompts=count, seed=count),
        wanted=RequestOptions(width=SIDE, height=SIDE, num_inference_steps=STEPS),
        load=LoadOptions(request_rate=rate, max_concurrency=max_concurrency, warmup_requests=0),
        goal=GoalOptions(),
        report=ReportOptions(disable_tqdm=True),
    )
    return asyncio.run(measure(options)).records


def show(console: Console, found: dict[str, Any]) -> None:
    """A row an overload."""
    console.print(
        f"capacity {found['capacity']:.2f} req/s, latency at a load of {CALM:g} {found['calm_latency']:.3f} s"
    )
    table = Table(title="more than the server can do", title_justify="left", title_style="bold")
    columns = (
        "load", "answered", "refused", "lost", "goodput / capacity", "refusal P99 (ms)", "P99 (s)", "bound (s)",
        "memory (MiB)", "latency after / before",
    )  # fmt: skip
    for column in columns:
        table.add_column(column, justify="right")
    for run in found["runs"]:
        table.add_row(
            f"{run['load']:g}", str(run["answered"]), str(run["refused"]), str(run["lost"]), f"{run['goodput']:.3f}",
            f"{1000 * run['refusal_p99']:.1f}", f"{run['latency_p99']:.2f}", f"{run['bound']:.2f}",
            f"{run['growth_mb']:+.1f}", f"{run['after']:.2f}",
        )  # fmt: skip
    console.print(table)


if __name__ == "__main__":
    main()
