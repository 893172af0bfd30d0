"""Our server beside what a user would write today, on the same load: throughput and latency, side by side.

Run with: python benchmarks/serving.py [--quick] [--threads N] [--rounds N] [--servers NAME ...] [--model-path DIR]

One server is up at a time, and each takes its turn in every round, so that what disturbs the machine disturbs all of
them. The load is that of ``stepbatch bench serving``. The servers are those of benchmarks/peers; LitServe and Ray Serve
come with the extra ``peers`` and are left out where they are not installed.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console

from parts.serving_docs import PAGE, write_docs
from parts.serving_report import SERVERS, rounded, save, show
from parts.workloads import NEGATIVE, POISSON_LOAD, WORKLOADS, Checkpoint, Name, choices, load, write_prompts
from stepbatch.bench.environment import environment
from stepbatch.bench.options import ServingOptions, TargetOptions
from stepbatch.bench.results import Result
from stepbatch.bench.servers import running
from stepbatch.bench.serving import measure
from stepbatch.demo import MODEL_PATH
from stepbatch.errors import SetupError

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "serving.json"
PACKAGES = ("torch", "diffusers", "transformers", "fastapi", "uvicorn", "litserve", "ray")
SERIAL = "fastapi_lock"  # whose throughput says what one request at a time can serve
NEEDS = {"litserve_server": "litserve", "ray_server": "ray"}


@dataclass(frozen=True)
class Settings:
    """How much is measured."""

    threads: int = 1  # that a server's model computes with; the second core is the client's and the server's own
    rounds: int = 2
    requests: int = 28  # of each load: no multiple of 8, so that no server's last batch happens to be full
    concurrency: int = 12  # so that a batch of 8 is waiting when one is done
    workloads: tuple[Name, ...] = WORKLOADS
    warmup_seconds: float = 10.0  # that ours may take to measure what a step costs, before it listens


QUICK = Settings(rounds=1, requests=4, concurrency=4, workloads=("everything",), warmup_seconds=1.0)


@dataclass(eq=False)
class Contest:
    """What has been measured so far."""

    settings: Settings
    folder: Path  # for prompts and the servers' logs
    progress: Callable[[str], None]
    rates: dict[str, float] = field(default_factory=dict)  # of Poisson arrivals, requests a second, by checkpoint
    digests: dict[tuple[str, Name], str] = field(default_factory=dict)
    runs: list[dict[str, Any]] = field(default_factory=list)

    def session(self, checkpoint: Checkpoint, server: str, number: int) -> None:
        """All workloads on a server that is started for them.

        Raises:
            SetupError: it doesn't start.
        """
        log = self.folder / f"{checkpoint.name}-{server}-{number}.log"
        with running(command(server, checkpoint, self.settings), log) as started:
            for workload in self.settings.workloads:
                result = self._measure(checkpoint, workload, started.base_url)
                summary = result.summary
                if workload == "everything" and server == SERIAL:
                    self.rates.setdefault(checkpoint.name, round(POISSON_LOAD * summary.throughput_qps, 3))
                self.runs.append(record(checkpoint.name, workload, server, number, result))
                answered = f"{summary.completed_requests} of {summary.requests} answered"
                where = f"{checkpoint.name}, round {number + 1}, {workload}, {SERVERS[server]}"
                self.progress(f"{where}: {summary.throughput_qps:.2f} req/s, {answered}")

    def _measure(self, checkpoint: Checkpoint, workload: Name, base_url: str) -> Result:
        settings = self.settings
        prompts = write_prompts(self.folder / f"{workload}.txt", workload, settings.requests)
        rate = self.rates.get(checkpoint.name, 1.0)
        dataset, wanted, times = load(checkpoint, workload, prompts, settings.requests, settings.concurrency, rate)
        target = TargetOptions(base_url=(base_url,))
        result = asyncio.run(measure(ServingOptions(target=target, dataset=dataset, wanted=wanted, load=times)))
        if len(result.records) < result.work.requests:
            raise KeyboardInterrupt
        assert self.digests.setdefault((checkpoint.name, workload), result.work.digest) == result.work.digest
        return result


def record(checkpoint: str, workload: Name, server: str, number: int, result: Result) -> dict[str, Any]:
    """What is kept of a run."""
    return {
        "checkpoint": checkpoint,
        "workload": workload,
        "server": server,
        "round": number,
        "machine_load": round(os.getloadavg()[0], 2),  # over 2 or so: something else was running
        "summary": rounded(msgspec.to_builtins(result.summary)),
        "client": rounded(msgspec.to_builtins(result.client)),
        "latencies": rounded([kept.latency for kept in result.records if kept.outcome == "ok"]),
        "errors": sorted({kept.error for kept in result.records if kept.error}),
    }


def command(server: str, checkpoint: Checkpoint, settings: Settings) -> list[str]:
    """What starts a server; ``{port}`` is to be filled in."""
    flags = ["--model-path", checkpoint.path, "--num-threads", str(settings.threads), "--port", "{port}"]
    if server == "ours":
        warmup = ["--warmup-seconds", str(settings.warmup_seconds)]
        return [sys.executable, "-m", "stepbatch", "serve", "--log-level", "warning", *warmup, *flags]
    return [sys.executable, str(HERE / "peers" / f"{server}.py"), *flags]


def order(servers: Sequence[str], number: int) -> Iterator[str]:
    """The servers' order in a round: every other time the other way round."""
    return iter(servers) if number % 2 == 0 else reversed(servers)


def checkpoints(model_path: str | None) -> list[Checkpoint]:
    """Those that are served: the bundled model and a small FLUX.1, or the one that is asked for."""
    if model_path:
        return [Checkpoint(Path(model_path).name, model_path, 1.5, (0.0, 1.5, 2.5))]
    written = subprocess.run(  # in a process of its own: it needs torch, and this one is to stay small
        [sys.executable, str(HERE / "peers" / "checkpoint.py")], stdout=subprocess.PIPE, text=True, check=True
    )
    flux = written.stdout.splitlines()[-1]
    return [
        Checkpoint("bundled model", str(MODEL_PATH), 1.5, (0.0, 1.5, 2.5), (None, NEGATIVE)),
        Checkpoint("small FLUX.1", flux, 3.5, (2.5, 3.5, 5.0)),
    ]


def available(names: Sequence[str], progress: Callable[[str], None]) -> list[str]:
    """Those of the servers whose framework is installed; the serial one comes first, for the others' sake."""
    found = []
    for name in sorted(names, key=lambda name: name != SERIAL):
        needed = NEEDS.get(name)
        if needed is None or importlib.util.find_spec(needed):
            found.append(name)
        else:
            progress(f"{SERVERS[name]} is left out: {needed} is not installed (pip install 'stepbatch[peers]')")
    return found


def read(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--threads", type=int, help="of each server's model")
    parser.add_argument("--rounds", type=int, help="how often each server takes its turn")
    parser.add_argument("--requests", type=int, help="of each load")
    parser.add_argument("--servers", nargs="+", choices=list(SERVERS), help="without it, all that are installed")
    parser.add_argument("--model-path", help="a checkpoint, instead of the bundled model and the small FLUX.1")
    parser.add_argument("--quick", action="store_true", help="a little of one workload, to see that it runs")
    parser.add_argument("--output", type=Path, help="where the JSON goes; without it, in results/ beside this script")
    parser.add_argument("--docs", type=Path, help="where the page goes; without it, docs/benchmarks.md if all was run")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and write the JSON and the page."""
    options = read(arguments)
    console = Console() if sys.stdout.isatty() else Console(width=120)
    given = {name: getattr(options, name) for name in ("threads", "rounds", "requests") if getattr(options, name)}
    settings = replace(QUICK if options.quick else Settings(), **given)
    servers = available(options.servers or list(SERVERS), console.print)
    whole = len(servers) == len(SERVERS) and not (options.quick or options.model_path)
    output = options.output or (RESULTS if whole else RESULTS.with_name("serving-quick.json"))
    docs = options.docs or (PAGE if output == RESULTS else None)
    try:
        data = run(settings, servers, options.model_path, output, console.print)
    except (SetupError, subprocess.CalledProcessError) as error:
        print(f"serving.py: {error}", file=sys.stderr)
        return 2
    show(console, data)
    if docs:
        write_docs(output, docs)
    console.print(f"every run's figures: {output}")
    return 1 if any(run["summary"]["completed_requests"] < run["summary"]["requests"] for run in data["runs"]) else 0


def run(
    settings: Settings, servers: Sequence[str], model_path: str | None, output: Path, progress: Callable[[str], None]
) -> dict[str, Any]:
    """All rounds; what has been measured is kept after every server's turn.

    Raises:
        SetupError: a server doesn't start.
    """
    if "poisson" in settings.workloads and SERIAL not in servers:
        raise SetupError(f"the rate of arrivals is a share of what {SERIAL} can serve: name it too")
    os.environ["OMP_NUM_THREADS"] = str(settings.threads)  # of all servers
    about: dict[str, Any] = {}
    data = {"environment": environment(PACKAGES) | {"settings": asdict(settings)}, "checkpoints": about, "runs": []}
    with tempfile.TemporaryDirectory() as folder:
        contest = Contest(settings, Path(folder), progress)
        data["runs"] = contest.runs
        for checkpoint in checkpoints(model_path):
            name = checkpoint.name
            about[name] = {"workloads": {workload: choices(checkpoint, workload) for workload in settings.workloads}}
            for number in range(settings.rounds):
                for server in order(servers, number):
                    contest.session(checkpoint, server, number)
                    about[name]["poisson_rate"] = contest.rates.get(name)
                    save(output, data)
    return data


if __name__ == "__main__":
    sys.exit(main())
