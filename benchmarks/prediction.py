"""How long requests take, by what they were told when they came.

Run with: python benchmarks/prediction.py [--model-path DIR] [--quick] [--requests N] [--output FILE]

Mixed steps in an open loop, at shares of what a closed loop finds the engine can do. The engine runs in a process of
its own, as under a server; costs are probed at its start.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from parts.open_loop import poisson
from parts.serving_docs import rewrite_page
from stepbatch import AsyncEngine, EngineConfig, GenerationRequest, ModelConfig
from stepbatch.bench.environment import environment
from stepbatch.demo import MODEL_PATH

RESULTS = Path(__file__).parent / "results" / "prediction.json"
PACKAGES = ("torch", "diffusers", "transformers")
LOADS = (0.6, 0.9)
IN_FLIGHT = 24  # of the closed loop
STEPS = ((8, 6), (28, 3), (50, 1))  # and how often each comes
SIDE = 128  # pixels
SEED = 2026

Taken = tuple[float, float]  # seconds predicted, seconds that it took


def requests(count: int) -> list[GenerationRequest]:
    random_ = random.Random(SEED)
    steps = [steps for steps, often in STEPS for _ in range(often)]
    return [
        GenerationRequest(
            prompt="a red circle above a blue square",
            width=SIDE,
            height=SIDE,
            num_inference_steps=random_.choice(steps),
            seed=index,
        )
        for index in range(count)
    ]


async def serve(engine: AsyncEngine, request: GenerationRequest) -> Taken:
    handle = engine.submit(request)
    await handle.outputs()
    assert handle.predicted is not None
    return handle.predicted.total, time.monotonic() - handle.arrival


async def closed(engine: AsyncEngine, wanted: Sequence[GenerationRequest]) -> float:
    """Requests a second, with so many in flight."""
    free = asyncio.Semaphore(IN_FLIGHT)

    async def one(request: GenerationRequest) -> None:
        async with free:
            await serve(engine, request)

    began = time.monotonic()
    await asyncio.gather(*(one(request) for request in wanted))
    return len(wanted) / (time.monotonic() - began)


async def opened(engine: AsyncEngine, wanted: Sequence[GenerationRequest], rate: float) -> list[Taken]:
    async def one(request: GenerationRequest, due: float) -> Taken:
        await asyncio.sleep(due)
        return await serve(engine, request)

    times = poisson(rate, len(wanted), SEED)
    return await asyncio.gather(*(one(request, due) for request, due in zip(wanted, times, strict=True)))


async def measure(model_path: str, count: int) -> dict[str, Any]:
    engine = AsyncEngine(EngineConfig(model=ModelConfig(model_path=model_path, num_threads=1)))
    await engine.start()
    try:
        await closed(engine, requests(IN_FLIGHT))  # the first steps set things up
        capacity = await closed(engine, requests(count))
        runs = []
        for load in LOADS:
            taken = await opened(engine, requests(count), load * capacity)
            off = [abs(predicted / seconds - 1) for predicted, seconds in taken]
            runs.append({"load": load, "median_error": statistics.median(off), "taken": taken})
    finally:
        await engine.stop()
    return {"capacity": capacity, "runs": runs}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model-path", default=str(MODEL_PATH), help="a checkpoint that has a native model")
    parser.add_argument("--requests", type=int, default=150, help="of each load")
    parser.add_argument("--quick", action="store_true", help="a few requests of each load, to see that it runs")
    parser.add_argument("--output", type=Path, help="where the JSON goes; without it, in results/ beside this script")
    options = parser.parse_args(arguments)
    output = options.output or (RESULTS.with_name("prediction-quick.json") if options.quick else RESULTS)
    console = Console() if sys.stdout.isatty() else Console(width=120)
    found = asyncio.run(measure(options.model_path, 12 if options.quick else options.requests))
    for run in found["runs"]:
        console.print(f"load {run['load']:g}: predicted seconds {run['median_error']:.1%} off at the median")
    output.parent.mkdir(parents=True, exist_ok=True)
    about = environment(PACKAGES) | {"model": Path(options.model_path).name}
    output.write_text(json.dumps({"environment": about, **found}, indent=2) + "\n")
    if output == RESULTS:
        rewrite_page()
    console.print(f"all of it: {output}")


if __name__ == "__main__":
    main()
