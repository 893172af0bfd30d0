"""What batching at the level of steps gains and what the engine costs, as ratios of medians measured side by side.

Run with: python benchmarks/batching.py [--model-path DIR] [--quick] [--only PART ...] [--output FILE]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from parts.bursts import bursts, poisson
from parts.common import QUICK, Case, Effort
from parts.host import engine_against_bare, host_time
from parts.report import environment, save, show, show_grid
from parts.steps import wide_against_parts
from stepbatch.config import EngineConfig, ModelConfig
from stepbatch.demo import MODEL_PATH
from stepbatch.engine.backends import load_runner
from stepbatch.engine.runner import TorchRunner
from stepbatch.errors import SetupError

RESULTS = Path(__file__).parent / "results" / "batching.json"
TITLES = {
    "bare": "Throughput of the engine over a bare loop's, one thread",
    "host": "Host time outside the model, 16 jobs in the step and a long queue",
    "steps": "A wide step against its jobs' own steps (how many times faster)",
    "bursts": "A closed loop, 16 in flight: batching over the other",
    "poisson": "Poisson arrivals at 0.7 of what one at a time can serve: batching over the other",
}


def measure(
    model_path: str, effort: Effort, only: Sequence[str], progress: Callable[[str], None]
) -> dict[str, list[Case]]:
    """The chosen parts' cases, by part."""
    config = EngineConfig(model=ModelConfig(model_path=model_path, device="cpu"))
    runner = load_runner(config)
    assert isinstance(runner, TorchRunner)
    model = runner.model
    parts: dict[str, Callable[[], list[Case]]] = {
        "bare": lambda: engine_against_bare(model, config, effort),
        "host": lambda: host_time(model, effort),
        "steps": lambda: wide_against_parts(model, effort, progress),
        "bursts": lambda: bursts(model, _pipeline(model_path), config, effort, progress),
        "poisson": lambda: poisson(model, config, effort, progress),
    }
    measured = {}
    for name in only:
        progress(TITLES[name])
        measured[name] = parts[name]()
    return measured


def _pipeline(model_path: str) -> Any:
    from diffusers import DiffusionPipeline  # here, for stepbatch quiets what its import prints

    pipeline = DiffusionPipeline.from_pretrained(model_path, dtype=torch.float32, use_safetensors=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model-path", default=str(MODEL_PATH), help="a checkpoint that has a native model")
    parser.add_argument("--quick", action="store_true", help="a little of everything, to see that it runs")
    parser.add_argument(
        "--only", nargs="+", choices=list(TITLES), default=list(TITLES), help="leave out the rest, in the JSON too"
    )
    parser.add_argument("--output", type=Path, help="where the JSON goes; without it, in results/ beside this script")
    options = parser.parse_args(arguments)
    effort = QUICK if options.quick else Effort()
    output = options.output or (RESULTS.with_name("quick.json") if options.quick else RESULTS)
    console = Console() if sys.stdout.isatty() else Console(width=120)
    about = environment(Path(options.model_path).name, effort)
    try:
        measured = measure(options.model_path, effort, options.only, console.print)
    except SetupError as error:
        parser.error(str(error))
    for name, cases in measured.items():
        (show_grid if name == "steps" else show)(console, TITLES[name], cases)
    save(output, about, measured)
    console.print(f"every repeat's seconds: {output}")


if __name__ == "__main__":
    main()
