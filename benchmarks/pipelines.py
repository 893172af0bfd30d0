"""A whole pipeline served by us beside LitServe and Ray Serve, and beside what no server could surpass.

Run with: python benchmarks/pipelines.py [--quick] [--rounds N] [--servers NAME ...]

A pipeline without a native model is batched by whole calls, as the peers do it. So where all requests are equal, what
tells servers apart is how full their calls are and what a server costs; the ceiling is the pipeline called with full
batches in one process. Then sizes and steps are mixed, and only requests of one signature can share a call. Last, what
a lone request to an idle server pays for the delay that calls wait for company: with a native model, nothing.

One server is up at a time and takes its turn in every round, as in serving.py; the load is that of
``stepbatch bench serving``.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console

from parts.pipelines_docs import told
from parts.serving_docs import PAGE, write_docs
from parts.serving_report import rounded, save, show
from parts.workloads import SEED, write_prompts
from serving import HERE, PACKAGES, available, order
from stepbatch.bench.environment import environment
from stepbatch.bench.load.api import prepare
from stepbatch.bench.options import DatasetOptions, LoadOptions, RequestOptions, ServingOptions, TargetOptions
from stepbatch.bench.results import Result
from stepbatch.bench.servers import running
from stepbatch.bench.serving import measure
from stepbatch.bench.workload.work import build
from stepbatch.demo import MODEL_PATH
from stepbatch.errors import SetupError

RESULTS = HERE / "results" / "pipelines.json"
CHECKPOINT = "small Stable Diffusion"
CEILING = "in_process"
SERVERS = ("in_process", "fastapi_lock", "ours", "litserve_server", "ray_server")
BATCH, WAIT_MS = 8, 20
IDLE_DELAYS_MS = (0, 50)
WORKLOADS: dict[str, dict[str, list[Any]]] = {  # each combination as often as the others
    "same": {"size": ["128x128"], "num_inference_steps": [8], "guidance_scale": [5.0]},
    "signatures": {"size": ["128x128", "128x160"], "num_inference_steps": [6, 8, 10], "guidance_scale": [5.0]},
}


@dataclass(frozen=True)
class Settings:
    """How much is measured."""

    threads: int = 1  # that a model computes with
    rounds: int = 3
    requests: int = 48
    concurrency: int = BATCH
    idle_requests: int = 12  # of each delay in each round


QUICK = Settings(rounds=1, requests=8, concurrency=4, idle_requests=2)


@dataclass(eq=False)
class Contest:
    """What has been measured so far."""

    settings: Settings
    path: str  # of the checkpoint
    folder: Path  # for prompts, bodies and the servers' logs
    progress: Callable[[str], None]
    runs: list[dict[str, Any]] = field(default_factory=list)

    def session(self, server: str, number: int) -> None:
        """All workloads on a server that is started for them.

        Raises:
            SetupError: it doesn't start.
        """
        if server == CEILING:
            for workload in WORKLOADS:
                self._keep(server, workload, number, self._ceiling(workload))
            return
        with running(self._command(server), self.folder / f"{server}-{number}.log") as started:
            for workload in WORKLOADS:
                result = self._measure(workload, started.base_url)
                self._keep(server, workload, number, rounded(msgspec.to_builtins(result.summary)))

    def _command(self, server: str) -> list[str]:
        flags = ["--model-path", self.path, "--num-threads", str(self.settings.threads), "--port", "{port}"]
        if server != "ours":
            return [sys.executable, str(HERE / "peers" / f"{server}.py"), *flags, "--batch-wait", str(WAIT_MS / 1000)]
        batching = ["--dynamic-batch-max-size", str(BATCH), "--dynamic-batch-delay-ms", str(WAIT_MS)]
        serve = [sys.executable, "-m", "stepbatch", "serve", "--log-level", "warning", "--backend", "diffusers"]
        return [*serve, *flags, *batching]

    def _options(self, workload: str) -> tuple[DatasetOptions, RequestOptions]:
        prompts = write_prompts(self.folder / f"{workload}.txt", workload, self.settings.requests)
        return (
            DatasetOptions(dataset="text", dataset_path=str(prompts), num_prompts=self.settings.requests, seed=SEED),
            RequestOptions(random_request_config=json.dumps(profiles(workload))),
        )

    def _measure(self, workload: str, base_url: str) -> Result:
        dataset, wanted = self._options(workload)
        load = LoadOptions(warmup_requests=2, max_concurrency=self.settings.concurrency)
        return ask(
            ServingOptions(target=TargetOptions(base_url=(base_url,)), dataset=dataset, wanted=wanted, load=load)
        )

    def _ceiling(self, workload: str) -> dict[str, Any]:
        bodies = self.folder / f"{workload}.jsonl"
        prepared = prepare(build(*self._options(workload)), "images", "any")
        bodies.write_bytes(b"".join(b"".join(request.body) + b"\n" for request in prepared))
        flags = ["--model-path", self.path, "--num-threads", str(self.settings.threads), "--requests", str(bodies)]
        command = [sys.executable, str(HERE / "peers" / "in_process.py"), *flags]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        count, rate = found["answers"], found["answers"] / found["seconds"]
        return {"requests": count, "completed_requests": count, "throughput_qps": round(rate, 4)}

    def _keep(self, server: str, workload: str, number: int, summary: dict[str, Any]) -> None:
        of_machine = {"machine_load": round(os.getloadavg()[0], 2)}
        run = {"checkpoint": CHECKPOINT, "workload": workload, "server": server, "round": number}
        self.runs.append(run | of_machine | {"summary": summary})
        self.progress(f"round {number + 1}, {workload}, {server}: {summary['throughput_qps']:.2f} req/s")


def profiles(workload: str) -> list[dict[str, Any]]:
    """A workload as ``stepbatch bench serving`` takes it: every combination."""
    fields = WORKLOADS[workload]
    return [
        {"size": size, "num_inference_steps": steps, "guidance_scale": guidance}
        for size in fields["size"]
        for steps in fields["num_inference_steps"]
        for guidance in fields["guidance_scale"]
    ]


def ask(options: ServingOptions) -> Result:
    """A load, all of which must have been sent."""
    result = asyncio.run(measure(options))
    if len(result.records) < result.work.requests:
        raise KeyboardInterrupt
    return result


def idle(settings: Settings, folder: Path, progress: Callable[[str], None]) -> dict[str, Any]:
    """Latencies of lone requests to the bundled, native model, by the delay that its server is told, seconds.

    Both servers are up, and asked in turns.
    """
    latencies: dict[str, list[float]] = {str(delay): [] for delay in IDLE_DELAYS_MS}
    serve = [sys.executable, "-m", "stepbatch", "serve", "--log-level", "warning", "--model-path", str(MODEL_PATH)]
    serve += ["--num-threads", str(settings.threads), "--port", "{port}"]
    dataset = DatasetOptions(dataset="demo", num_prompts=settings.idle_requests, seed=SEED)
    wanted = RequestOptions(width=128, height=128, num_inference_steps=4)
    load = LoadOptions(warmup_requests=1, max_concurrency=1)
    with ExitStack() as stack:
        commands = {d: [*serve, "--dynamic-batch-delay-ms", d] for d in latencies}
        up = {d: stack.enter_context(running(c, folder / f"idle-{d}.log")) for d, c in commands.items()}
        for number in range(settings.rounds):
            for delay in order(list(latencies), number):
                target = TargetOptions(base_url=(up[delay].base_url,))
                result = ask(ServingOptions(target=target, dataset=dataset, wanted=wanted, load=load))
                latencies[delay] += [record.latency for record in result.records if record.outcome == "ok"]
    for delay, values in latencies.items():
        progress(f"idle, delay {delay} ms: {statistics.median(values) * 1000:.1f} ms")
    return {
        "latencies": rounded(latencies),
        "medians": {d: round(statistics.median(v), 4) for d, v in latencies.items()},
    }


def run(settings: Settings, servers: Sequence[str], output: Path, progress: Callable[[str], None]) -> dict[str, Any]:
    """All rounds; what has been measured is kept after every server's turn.

    Raises:
        SetupError: a server doesn't start.
    """
    os.environ["OMP_NUM_THREADS"] = str(settings.threads)  # of all servers
    written = subprocess.run(  # in a process of its own: it needs torch, and this one is to stay small
        [sys.executable, str(HERE / "peers" / "unet_checkpoint.py")], stdout=subprocess.PIPE, text=True, check=True
    )
    data: dict[str, Any] = {
        "environment": environment(PACKAGES) | {"settings": asdict(settings)},
        "checkpoints": {CHECKPOINT: {"workloads": WORKLOADS}},
        "runs": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        contest = Contest(settings, written.stdout.splitlines()[-1], Path(folder), progress)
        data["runs"] = contest.runs
        for number in range(settings.rounds):
            for server in order(servers, number):
                contest.session(server, number)
                save(output, data)
        data["idle"] = idle(settings, Path(folder), progress)
        save(output, data)
    return data


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and write the JSON, and the section of the page if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, help="how often each server takes its turn")
    parser.add_argument("--servers", nargs="+", choices=SERVERS, help="without it, all that are installed")
    parser.add_argument("--quick", action="store_true", help="a few requests, to see that it runs")
    parser.add_argument("--output", type=Path, help="where the JSON goes; without it, in results/ beside this script")
    parser.add_argument("--docs", type=Path, help="where the page goes; without it, docs/benchmarks.md if all was run")
    options = parser.parse_args(arguments)
    console = Console() if sys.stdout.isatty() else Console(width=120)
    settings = replace(QUICK if options.quick else Settings(), **({"rounds": options.rounds} if options.rounds else {}))
    servers = available(options.servers or SERVERS, console.print)
    output = options.output or (RESULTS.with_name("pipelines-quick.json") if options.quick else RESULTS)
    try:
        data = run(settings, servers, output, console.print)
    except (SetupError, subprocess.CalledProcessError) as error:
        print(f"pipelines.py: {error}", file=sys.stderr)
        return 2
    show(console, data)
    console.print(told(data))
    whole = not options.quick and options.output is None and set(servers) == set(SERVERS)
    if docs := options.docs or (PAGE if whole else None):
        write_docs(output.with_name("serving.json"), docs)
    console.print(f"every run's figures: {output}")
    return 1 if any(run["summary"]["completed_requests"] < run["summary"]["requests"] for run in data["runs"]) else 0


if __name__ == "__main__":
    sys.exit(main())
