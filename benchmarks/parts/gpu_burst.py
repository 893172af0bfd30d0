"""A burst of requests against servers of the same model: requests that share steps, and one after another."""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from parts.gpu_record import Record, Task, load, of
from stepbatch.bench.options import (
    DatasetOptions,
    LoadOptions,
    ReportOptions,
    RequestOptions,
    ServingOptions,
    TargetOptions,
)
from stepbatch.bench.results import Result
from stepbatch.bench.servers import Server, started
from stepbatch.bench.serving import measure

CONCURRENCY = (4, 12)
BATCHING = {"off": 1, "on": 8}  # the most jobs in a step; four requests in flight make no step wider than four
GUIDED = {"Qwen-Image": {"true_cfg_scale": 4.0}}  # as its users ask; by how the model's name begins
BESIDE_GIB = 8.0  # what a server needs besides its weights
FIRST_SECONDS = 20.0  # that a burst is taken for until one has been measured
SEED = 2026


def run(task: Task, record: Record) -> None:
    """Measure every concurrency with batching and without."""
    together = fit_together(task)
    record.add("servers", together=together)
    groups = [("off", "on")] if together else [("on",), ("off",)]
    with tempfile.TemporaryDirectory() as folder:
        for group in groups:
            with ExitStack() as stack:
                servers = {
                    batching: stack.enter_context(started(command(task, batching), Path(folder) / f"{batching}.log"))
                    for batching in group
                }
                for server in servers.values():
                    server.wait_until_ready(max(60.0, record.left))
                for concurrency in CONCURRENCY:
                    for batching in group if concurrency == CONCURRENCY[0] else group[::-1]:
                        burst(task, record, servers[batching], batching, concurrency)


def fit_together(task: Task) -> bool:
    """Whether there is room for two servers of the model, so that they can load at the same time."""
    if task.small:
        return True
    entry = load(Path(task.folder), "steps").get(task.model, {})
    loaded = [m for m in of(entry.get("measures", []), "load") if "gib" in m]
    return bool(loaded) and 2 * (loaded[0]["gib"] + BESIDE_GIB) < loaded[0]["free_gib"]


def command(task: Task, batching: str) -> list[str]:
    """What starts a server."""
    return [
        *(sys.executable, "-m", "stepbatch", "serve", "--port", "{port}", "--log-level", "warning"),
        *("--model-path", task.model, "--load-format", "dummy", "--dummy-size", "small" if task.small else "full"),
        *("--device", task.device, "--dynamic-batch-max-size", str(BATCHING[batching]), "--warmup", "false"),
    ]


def burst(task: Task, record: Record, server: Server, batching: str, concurrency: int) -> None:
    """Send all requests, so many at a time."""
    seconds = max((1.2 * m["measuring_seconds"] for m in of(record.measures, "burst")), default=FIRST_SECONDS)
    settings: dict[str, Any] = {"batching": batching, "concurrency": concurrency, "max_size": BATCHING[batching]}
    if not task.quick and not record.has_time("burst", seconds, **settings):
        return
    with record.measuring("burst", **settings) as values:
        result = asyncio.run(_measure(task, server.base_url, concurrency))
        values |= figures(result)
        errors = sorted({r.error for r in result.records if r.outcome != "ok"})
        if errors:
            values["errors"] = errors[:5]
        server.check()


async def _measure(task: Task, base_url: str, concurrency: int) -> Result:
    width, height = task.sizes[0]
    extra = next((json.dumps(body) for name, body in GUIDED.items() if task.model.startswith(name)), "")
    options = ServingOptions(
        target=TargetOptions(base_url=(base_url,)),
        # no prompt comes twice to a server, which would remember it
        dataset=DatasetOptions(dataset="random", num_prompts=task.burst_prompts, seed=SEED + 1000 * concurrency),
        wanted=RequestOptions(
            width=width, height=height, num_inference_steps=task.burst_steps or None, extra_body=extra
        ),
        load=LoadOptions(max_concurrency=concurrency, warmup_requests=1, warmup_inference_steps=2),
        report=ReportOptions(disable_tqdm=True),
    )
    return await measure(options)


def figures(result: Result) -> dict[str, Any]:
    """Of a burst: what the table shows, and every latency."""
    summary, asked = result.summary, result.records[0].asked
    return {
        "size": f"{asked['width']}x{asked['height']}",
        "steps": asked.get("num_inference_steps"),  # None: the model's own
        "requests": summary.requests,
        "completed": summary.completed_requests,
        "duration": summary.duration,
        "qps": summary.throughput_qps,
        "latency_mean": summary.latency_mean,
        "latency_p99": summary.latency_p99,
        "jobs_per_step": summary.jobs_per_step,
        "peak_memory_mb": summary.peak_memory_mb_max,
        "client_bottleneck": result.client.bottleneck,
        "latencies": [record.latency for record in result.records if record.outcome == "ok"],
    }
