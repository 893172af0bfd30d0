"""Whether `stepbatch bench simulate` tells what happens: simulated beside measured, on the same requests and arrivals.

Run with: python benchmarks/simulation.py [--model-path DIR] [--quick] [--requests N] [--output FILE]

`stepbatch profile` measures what steps cost in peace. A server gets some work to learn from, at a low load and a high
one, and says what they cost there (``/v1/profile``). Then others are sent mixed steps in an open loop, at shares of
what by that they can do; and the simulator is given the requests and the moments at which they were sent, and one curve
after the other: what the same server has learned in the meantime, what the first one had, and the profile. Means and
99th percentiles of latency should be within a tenth. The server and the client share the machine, so it should have
nothing else to do.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from rich.console import Console
from rich.table import Table

from parts.serving_docs import rewrite_page
from stepbatch.bench.environment import environment
from stepbatch.bench.options import (
    DatasetOptions,
    GoalOptions,
    LoadOptions,
    ReportOptions,
    RequestOptions,
    ServingOptions,
    SimulateOptions,
    TargetOptions,
)
from stepbatch.bench.results import Record
from stepbatch.bench.servers import running
from stepbatch.bench.serving import measure
from stepbatch.bench.simulate.cluster import Fleet, Simulation
from stepbatch.bench.simulate.curves import Curve, read_curve
from stepbatch.bench.simulate.kinds import Kind, capacity, make_kind, pace
from stepbatch.bench.simulate.workload import read_workload
from stepbatch.config import BatchingConfig
from stepbatch.demo import MODEL_PATH
from stepbatch.request import GenerationRequest

RESULTS = Path(__file__).parent / "results" / "simulation.json"
PACKAGES = ("torch", "diffusers", "transformers", "numpy")
LOADS = (0.5, 0.8, 1.5)
LEARNING_LOADS = (0.5, 0.9)  # narrow steps and wide ones
CURVES = (
    "itself",
    "another",
    "profile",
)  # what the server has learned, what another had, and what was measured in peace
NEAR = 0.1  # how far a simulated figure may be from the measured one
SIZE = "128x128"
PROFILES = [
    {"weight": 6, "size": SIZE, "num_inference_steps": 8},
    {"weight": 3, "size": SIZE, "num_inference_steps": 28},
    {"weight": 1, "size": SIZE, "num_inference_steps": 50},
]
SEED = 2026


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model-path", default=str(MODEL_PATH), help="a checkpoint that has a native model")
    parser.add_argument("--requests", type=int, default=400, help="of each load")
    parser.add_argument("--quick", action="store_true", help="a few requests of each load, to see that it runs")
    parser.add_argument("--output", type=Path, help="where the JSON goes; without it, in results/ beside this script")
    options = parser.parse_args(arguments)
    count = 12 if options.quick else options.requests
    output = options.output or (RESULTS.with_name("simulation-quick.json") if options.quick else RESULTS)
    console = Console() if sys.stdout.isatty() else Console(width=120)
    model = ["--model-path", options.model_path, "--num-threads", "1"]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        in_peace = profile(model, folder, seconds=3.0 if options.quick else 20.0)
        command = [sys.executable, "-m", "stepbatch", "serve", "--port", "0", *model]
        runs = []
        with running([*command, "--max-queue-seconds", "inf"], folder / "log") as server:
            for load in LEARNING_LOADS:
                send(server.base_url, in_peace, load, max(count // 4, 12))
            curves = {"profile": in_peace, "another": learned(server.base_url, folder)}
        for load in LOADS:  # on a server that remembers no other load, as the simulator doesn't
            with running([*command, "--max-queue-seconds", "inf"], folder / "log") as server:
                rate, records = send(server.base_url, curves["another"], load, count)
                itself = {"itself": learned(server.base_url, folder)}
            runs.append({"load": load, "rate": rate, **compare(records, itself | curves)})
    show(console, runs)
    output.parent.mkdir(parents=True, exist_ok=True)
    about = environment(PACKAGES) | {"model": Path(options.model_path).name, "requests": count, "profiles": PROFILES}
    output.write_text(json.dumps({"environment": about, "runs": runs}, indent=2) + "\n")
    if output == RESULTS:
        rewrite_page()
    console.print(f"all of it: {output}")


def profile(model: Sequence[str], folder: Path, seconds: float) -> Curve:
    """What the model's work costs, measured now."""
    command = [sys.executable, "-m", "stepbatch", "profile", *model, "--output", str(folder)]
    subprocess.run(
        [*command, "--warmup-sizes", SIZE, "--warmup-seconds", str(seconds)], check=True, stdout=subprocess.DEVNULL
    )
    return read_curve(str(folder / "profile.json"))


def learned(base_url: str, folder: Path) -> Curve:
    """What a server's work costs, as it has learned."""
    path = folder / "learned.json"
    path.write_bytes(httpx.get(f"{base_url}/v1/profile").content)
    return read_curve(str(path))


def send(base_url: str, curve: Curve, load: float, count: int) -> tuple[float, list[Record]]:
    """Requests at a share of what by this curve can be done: their rate, and what became of them."""
    wanted = RequestOptions(random_request_config=json.dumps(PROFILES))
    simulated = SimulateOptions(num_requests=count, seed=SEED)
    kinds, weights = read_workload(simulated, wanted, GoalOptions(), curve, None, 1).mixture
    rate = load * capacity(kinds, weights, curve.costs)
    options = ServingOptions(
        target=TargetOptions(base_url=(base_url,)),
        dataset=DatasetOptions(dataset="random", num_prompts=count, seed=SEED),
        wanted=wanted,
        load=LoadOptions(request_rate=rate, warmup_requests=3),
        report=ReportOptions(disable_tqdm=True),
    )
    records = asyncio.run(measure(options)).records
    lost = [record for record in records if record.outcome != "ok"]
    if lost:
        raise SystemExit(f"{len(lost)} requests failed: {lost[0].error}")
    return rate, records


def compare(records: Sequence[Record], curves: dict[str, Curve]) -> dict[str, Any]:
    """What was measured, and what each curve makes of it."""
    latencies = {"measured": [record.latency for record in records]}
    latencies |= {name: simulate(records, curve) for name, curve in curves.items()}
    return {name: _figures(of) for name, of in latencies.items()} | {"latencies": latencies}


def simulate(records: Sequence[Record], curve: Curve) -> list[float]:
    """The latencies of the same requests, sent at the same moments."""
    asked = [_kind(record.asked, curve) for record in records]
    fleet = Fleet(limits=BatchingConfig(), pace=pace(asked, [1.0] * len(asked), curve.costs))
    course = Simulation(asked, [record.intended for record in records], curve.costs, fleet).run()
    return [ended - came for came, ended in zip(course.came, course.ended, strict=True)]


def _kind(asked: dict[str, Any], curve: Curve) -> Kind:
    request = GenerationRequest(
        prompt=asked["prompt"],
        width=asked["width"],
        height=asked["height"],
        num_inference_steps=asked["num_inference_steps"],
        seed=0,
    )
    return make_kind(request, curve)


def _figures(latencies: Sequence[float]) -> dict[str, float]:
    return {"mean": float(np.mean(latencies)), "p99": float(np.percentile(latencies, 99))}


def show(console: Console, runs: Sequence[dict[str, Any]]) -> None:
    """A row a load."""
    table = Table(title="Latency, simulated over measured", title_justify="left", title_style="bold")
    of_each = [f"by {name}" for name in CURVES]
    for column in ("load", "mean measured (s)", *of_each, "P99 measured (s)", *of_each):
        table.add_column(column, justify="right")
    for one in runs:
        cells = [f"{one['load']:g}"]
        for figure in ("mean", "p99"):
            measured = one["measured"][figure]
            ratios = [one[name][figure] / measured for name in CURVES]
            styles = ["green" if abs(ratio - 1) <= NEAR else "bold red" for ratio in ratios]
            cells += [f"{measured:.3f}"]
            cells += [f"[{style}]{ratio:.3f}[/]" for style, ratio in zip(styles, ratios, strict=True)]
        table.add_row(*cells)
    console.print(table)


if __name__ == "__main__":
    main()
