"""What choosing takes: a call of the scheduler with a long queue, and a million requests through the simulator.

Run with: python benchmarks/scheduler_time.py [--quick] [--output FILE]

64 jobs run and 10,000 wait, of three sizes and three numbers of steps. Between two calls nothing has changed, or one
job has come, or one has left; each is the median of as many calls. Then the simulator has the scheduler serve mixed
steps by a published curve. One process, one core, which should have nothing else to do.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from parts.serving_docs import rewrite_page
from stepbatch.bench.environment import environment
from stepbatch.config import BatchingConfig
from stepbatch.engine.cost import Costs, LinearCost, StepCost
from stepbatch.engine.policies import POLICIES
from stepbatch.engine.scheduler import Scheduler
from stepbatch.request import GenerationRequest, Job, JobState

RESULTS = Path(__file__).parent / "results" / "scheduler_time.json"
RUNNING, WAITING, CALLS = 64, 10_000, 300
GOAL_MICROSECONDS, GOAL_SECONDS = 200, 300
SIZES, STEPS = ((512, 512), (768, 768), (1024, 1024)), (8, 28, 50)
# launching a step takes so long that all 64 are worth it
COSTS = Costs(
    known=True,
    step=StepCost(host=2.0, per_token=1e-6),
    prompt=LinearCost(each=0.01),
    decode=LinearCost(each=0.05),
)
MIXED_STEPS = [{"weight": weight, "num_inference_steps": steps} for weight, steps in zip((6, 3, 1), STEPS, strict=True)]
SIMULATE = "--curve qwen-image-2512-h200-1024 --loads 0.8 --disable-tqdm --num-requests"


class Queue:
    """A scheduler with as many jobs as are wanted."""

    def __init__(self, policy: str, waiting: int) -> None:
        self.scheduler = Scheduler(BatchingConfig(scheduling_policy=policy), COSTS)
        self._numbers = count()
        for _ in range(RUNNING + waiting):
            self.come()
        self.plan = self.scheduler.schedule(0.0)
        while self.plan.encode:
            self.call(lambda: None)

    def come(self) -> None:
        """Somebody comes."""
        number = next(self._numbers)
        width, height = SIZES[number % len(SIZES)]
        tokens = (width // 16) * (height // 16) + number % 64
        request = GenerationRequest(
            prompt="x", width=width, height=height, num_inference_steps=STEPS[number // 3 % 3], seed=0
        )
        self.scheduler.add(Job(str(number), 0, request, (tokens, tokens), float(number)), float(number))

    def leave(self) -> None:
        """One of those that run ends."""
        job = self.plan.denoise[0]
        job.cancel()
        self.scheduler.remove(job)

    def call(self, before: Callable[[], object]) -> float:
        """Seconds of a call after something has happened."""
        for job in self.plan.encode:
            job.to(JobState.RUNNING)
        before()
        began = time.perf_counter()
        self.plan = self.scheduler.schedule(0.0)
        return time.perf_counter() - began


def calls(policy: str, waiting: int, times: int) -> dict[str, float]:
    """Microseconds of a call, by what has happened since the last."""
    found = {}
    for name in ("nothing", "one came", "one left"):
        queue = Queue(policy, waiting)
        happens = {"nothing": lambda: None, "one came": queue.come, "one left": queue.leave}[name]
        found[name] = round(1e6 * median(queue.call(happens) for _ in range(times)), 1)
        found["jobs"] = len(queue.plan.denoise)
    return found


def simulation(requests: int) -> float:
    """Seconds of the command, from start to end."""
    began = time.perf_counter()
    subprocess.run(
        [
            *(sys.executable, "-m", "stepbatch", "bench", "simulate", *SIMULATE.split(), str(requests)),
            *("--random-request-config", json.dumps(MIXED_STEPS)),
        ],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return time.perf_counter() - began


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="a little of everything, to see that it runs")
    parser.add_argument("--output", type=Path, help="where the JSON goes; without it, in results/ beside this script")
    options = parser.parse_args(arguments)
    waiting, times, requests = (500, 10, 2_000) if options.quick else (WAITING, CALLS, 1_000_000)
    output = options.output or (RESULTS.with_name("scheduler_time-quick.json") if options.quick else RESULTS)
    found: dict[str, Any] = {
        "environment": environment(()),
        "running": RUNNING,
        "waiting": waiting,
        "calls": {policy: calls(policy, waiting, times) for policy in POLICIES},
        "simulated_requests": requests,
        "simulation_seconds": round(simulation(requests), 1),
    }
    show(Console() if sys.stdout.isatty() else Console(width=120), found)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(found, indent=2) + "\n")
    if output == RESULTS:
        rewrite_page()


def show(console: Console, found: dict[str, Any]) -> None:
    """A row a policy, and the simulation."""
    title = f"schedule(), {found['running']} running, {found['waiting']:,} waiting (us; goal {GOAL_MICROSECONDS})"
    table = Table(title=title, title_justify="left")
    for column in ("policy", "jobs in a step", "nothing changed", "one came", "one left"):
        table.add_column(column, justify="left" if column == "policy" else "right")
    for policy, took in found["calls"].items():
        table.add_row(policy, f"{took['jobs']:.0f}", *(f"{took[what]:.0f}" for what in list(took) if what != "jobs"))
    console.print(table)
    seconds, requests = found["simulation_seconds"], found["simulated_requests"]
    console.print(f"{requests:,} simulated requests took {seconds:.0f} s (goal {GOAL_SECONDS} s for a million)")


if __name__ == "__main__":
    main()
