"""What batching at the level of steps gains and what the engine costs, as ratios of medians measured side by side.

Run with: python benchmarks/batching.py [--model-path DIR] [--quick] [--only PART ...] [--output FILE]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from rich.console import Console

from parts.bursts import bursts, poisson
from parts.common import QUICK, Case, Effort
from parts.host import engine_against_bare, host_time
from parts.report import environment, save, show, show_grid
from parts.steps import wide_against_parts
from stepbatch.config import EngineConfig, ModelConfig
from stepbatch.demo import MODEL_PATH
from stepbatch.engine.runner import TorchRunner, load_runner

RESULTS = Path(__file__).parent / "results" / "batching.json"
TITLES = {
    "bare": "Throughput of the engine over a bare loop's, one thread",
    "host": "Host time outside the model, 16 jobs in the step, 1,000 waiting",
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


def _pipeline(model_path: str) -> DiffusionPipeline:
    pipeline = DiffusionPipeline.from_pretrained(model_path, dtype=torch.float32, use_safetensors=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model-path", default=str(MODEL_PATH), help="a checkpoint that has a native model")
    parser.add_argument("--quick", action="store_true", help="a little of everything, to see that it runs")
    parser.add_argument("--only", nargs="+", choices=list(TITLES), default=list(TITLES), help="leave out the rest")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where the JSON goes")
    options = parser.parse_args(arguments)
    effort = QUICK if options.quick else Effort()
    console = Console()
    about = environment(Path(options.model_path).name, effort)
    with console.status("loading") as status:
        measured = measure(options.model_path, effort, options.only, status.update)
    for name, cases in measured.items():
        (show_grid if name == "steps" else show)(console, TITLES[name], cases)
    save(options.output, about, measured)
    console.print(f"every repeat's seconds: {options.output}")


if __name__ == "__main__":
    main()
