"""What the scheduler's choices come to: widths that it finds by itself beside fixed ones, and the policies.

Run with: python benchmarks/scheduling.py [--model-path DIR] [--quick] [--requests N] [--rounds N] [--output FILE]

Widths: on four workloads, each fixed width's closed-loop throughput, then all of them and ``auto`` in an open loop with
the same arrivals, at three loads of the best one's throughput. A width that can't keep up is left out. Policies: mixed
steps at a load of 0.8, each policy against first come, first served, at the same widths.

The engine runs in this process, without a server: what is measured is the scheduler. Costs are probed at the start.
Settings take turns, and each figure is the median of its rounds: the best of several is otherwise the luckiest.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from parts.open_loop import Served, poisson, serve
from parts.scheduling_docs import against_fcfs, against_fixed
from parts.serving_docs import rewrite_page
from stepbatch.bench.environment import environment
from stepbatch.config import BatchingConfig, EngineConfig, ModelConfig
from stepbatch.demo import MODEL_PATH
from stepbatch.engine.backends import load_runner
from stepbatch.engine.cost import Costs
from stepbatch.engine.engine import Runner
from stepbatch.engine.probe import probe
from stepbatch.request import GenerationRequest

RESULTS = Path(__file__).parent / "results" / "scheduling.json"
PACKAGES = ("torch", "diffusers", "transformers")
WIDTHS = (1, 2, 4, 8, 16)
LOADS = (0.5, 0.8, 0.95)
POLICY_LOAD = 0.8
AGEINGS = (0.0, 0.2, 0.5)
NO_LIMIT = 1 << 30  # tokens: with a number, nothing but the width counts
STEPS = ((8, 6), (28, 3), (50, 1))  # and how often each comes
SIZES = ((128, 128), (192, 192), (256, 256), (128, 192))
SEED = 2026


@dataclass(frozen=True)
class Settings:
    """How much is measured."""

    requests: int = 24
    rounds: int = 3
    policy_requests: int = 100  # in one round: a P99 of few is the longest of them
    in_flight: int = 20
    threads: int = 1
    probe_seconds: float = 20.0


QUICK = Settings(requests=4, rounds=1, policy_requests=4, in_flight=4, probe_seconds=2.0)


def workloads(count: int) -> dict[str, list[GenerationRequest]]:
    """The requests of each, as many."""
    random_ = random.Random(SEED)
    steps = [steps for steps, often in STEPS for _ in range(often)]

    def make(
        sizes: Sequence[tuple[int, int]], steps: Sequence[int], guidance: Sequence[float]
    ) -> list[GenerationRequest]:
        made = []
        for index in range(count):
            width, height = random_.choice(sizes)
            made.append(
                GenerationRequest(
                    prompt=f"a red circle above {index} blue squares",
                    width=width,
                    height=height,
                    num_inference_steps=random_.choice(steps),
                    guidance_scale=random_.choice(guidance),
                    seed=index,
                )
            )
        return made

    small, large = SIZES[0], SIZES[2]
    return {
        "equal small": make([small], [6], [1.5]),
        "equal large": make([large], [4], [1.5]),
        "mixed steps": make([small], steps, [1.5]),
        "mixed everything": make(SIZES, [4, 8, 12], [0.0, 1.5]),
    }


class Contest:
    """What has been measured so far."""

    def __init__(self, runner: Runner, costs: Costs, settings: Settings, progress: Callable[[str], None]) -> None:
        self.runner = runner
        self.costs = costs
        self.settings = settings
        self.progress = progress
        self.errors: list[float] = []  # of steps' predictions, by run

    def widths(self, name: str, requests: Sequence[GenerationRequest]) -> dict[str, Any]:
        """Every fixed width, and auto, at every load."""
        limits = {str(width): _fixed(width) for width in WIDTHS} | {"auto": BatchingConfig()}
        rounds = self.settings.rounds
        capacity = {width: figures["rate"] for width, figures in self._measure(limits, requests, None, rounds).items()}
        best = max(rate for width, rate in capacity.items() if width != "auto")
        self.progress(f"{name}: " + ", ".join(f"{width} {rate:.2f}/s" for width, rate in capacity.items()))
        loads: dict[str, dict[str, Any]] = {}
        for load in LOADS:
            arrivals = poisson(load * best, len(requests), SEED)
            able = {width: one for width, one in limits.items() if capacity[width] > load * best or width == "auto"}
            loads[str(load)] = found = self._measure(able, requests, arrivals, rounds)
            self.progress(
                f"  load {load}: " + ", ".join(f"{w} {f['mean']:.3f}/{f['p99']:.3f}" for w, f in found.items())
            )
        return {"capacity": capacity, "loads": loads}

    def policies(self, requests: Sequence[GenerationRequest], width: int | None) -> dict[str, Any]:
        """First come, first served, the default, and the shortest first with every ageing, at one width."""
        limits = _fixed(width) if width else BatchingConfig()
        best = self._measure({"": limits}, requests, None, rounds=1)[""]["rate"]
        arrivals = poisson(POLICY_LOAD * best, len(requests), SEED)
        kinds = {"fcfs": ("fcfs", 0.0), "boost": ("boost", 0.0)}
        kinds |= {f"srpt {ageing:g}": ("srpt", ageing) for ageing in AGEINGS}
        settings = {
            name: replace(limits, scheduling_policy=policy, ageing=ageing)  # type: ignore[arg-type]
            for name, (policy, ageing) in kinds.items()
        }
        found = self._measure(settings, requests, arrivals, rounds=1)
        for name, figures in found.items():
            self.progress(f"  width {width or 'auto'}, {name}: {figures['mean']:.3f}/{figures['p99']:.3f}")
        return found

    def _measure(
        self,
        settings: dict[str, BatchingConfig],
        requests: Sequence[GenerationRequest],
        arrivals: Sequence[float] | None,
        rounds: int,
    ) -> dict[str, dict[str, float]]:
        """The figures of each setting, which take turns: medians."""
        served: dict[str, list[Served]] = {name: [] for name in settings}
        for turn in range(rounds):
            names = [*settings] if turn % 2 == 0 else [*settings][::-1]
            for name in names:
                served[name].append(self._serve(settings[name], requests, arrivals))
        return {name: _figures(each) for name, each in served.items()}

    def _serve(
        self, limits: BatchingConfig, requests: Sequence[GenerationRequest], arrivals: Sequence[float] | None
    ) -> Served:
        served = serve(self.runner, self.costs, limits, requests, arrivals, self.settings.in_flight)
        self.errors.append(served.error)
        return served


def _fixed(width: int) -> BatchingConfig:
    return BatchingConfig(dynamic_batch_max_size=width, max_batch_tokens=NO_LIMIT)


def _figures(served: Sequence[Served]) -> dict[str, float]:
    figures = [(one.rate, one.mean, one.p99, one.width) for one in served]
    medians = (round(median(values), 5) for values in zip(*figures, strict=True))
    return dict(zip(("rate", "mean", "p99", "width"), medians, strict=True))


def show(console: Console, found: dict[str, Any]) -> None:
    """Auto against the best fixed width of each figure, and the policies."""
    table = Table(title="auto over the best fixed width", title_justify="left")
    for column in ("workload", "load", "throughput", "mean", "P99"):
        table.add_column(column)
    for row in against_fixed(found):
        table.add_row(*row)
    console.print(table)
    table = Table(title="policies over first come, first served, mixed steps", title_justify="left")
    for column in ("width", "policy", "mean", "P99"):
        table.add_column(column)
    for row in against_fcfs(found):
        table.add_row(*row)
    console.print(table)
    console.print(f"steps' seconds, predicted: {found['step_error']:.1%} off at the median")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model-path", default=str(MODEL_PATH), help="a checkpoint that has a native model")
    parser.add_argument("--quick", action="store_true", help="a little of everything, to see that it runs")
    parser.add_argument("--requests", type=int, default=0, help="of each run")
    parser.add_argument("--rounds", type=int, default=0, help="of each run, of which the median counts")
    parser.add_argument("--output", type=Path, help="where the JSON goes; without it, in results/ beside this script")
    options = parser.parse_args(arguments)
    wanted = Settings(requests=options.requests or Settings.requests, rounds=options.rounds or Settings.rounds)
    settings = QUICK if options.quick else wanted
    output = options.output or (RESULTS.with_name("quick.json") if options.quick else RESULTS)
    console = Console() if sys.stdout.isatty() else Console(width=120)
    torch.set_num_threads(settings.threads)
    runner = load_runner(EngineConfig(model=ModelConfig(model_path=options.model_path, device="cpu")))
    torch.set_num_threads(settings.threads)
    measured = probe(runner, settings.probe_seconds)
    contest = Contest(runner, measured.costs(), settings, console.print)
    kinds = workloads(settings.requests)
    output.parent.mkdir(exist_ok=True)
    found: dict[str, Any] = {
        "environment": environment(PACKAGES) | {"settings": asdict(settings), "model": Path(options.model_path).name},
        "probe_seconds": round(measured.seconds, 2),
        "widths": {},
        "policy_load": POLICY_LOAD,
        "policies": {},
    }
    for name, requests in kinds.items():
        found["widths"][name] = contest.widths(name, requests)
        _save(found, contest, output)
    for width in (1, None):
        mixed = workloads(settings.policy_requests)["mixed steps"]
        found["policies"][str(width or "auto")] = contest.policies(mixed, width)
        _save(found, contest, output)
    show(console, found)
    if output == RESULTS:
        rewrite_page()


def _save(found: dict[str, Any], contest: Contest, output: Path) -> None:
    """Keep what there is so far: all of it takes long."""
    found["step_error"] = round(sorted(contest.errors)[len(contest.errors) // 2], 4)
    output.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
