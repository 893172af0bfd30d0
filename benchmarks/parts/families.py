"""A step of a family, packed, against a step of diffusers' own pipeline with random weights of the same shapes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, count, pairwise
from typing import Any

import diffusers
import torch
from torch.utils.flop_counter import FlopCounterMode

from parts.common import Case, Effort, Figure, alternate, ratio, timed
from stepbatch.config import EngineConfig, ModelConfig
from stepbatch.engine.runner import TorchRunner
from stepbatch.models import load_model
from stepbatch.models.base import Model
from stepbatch.models.checkpoint import read_index
from stepbatch.models.dummy import dummy_components, dummy_module, packaged_config, transformer_config
from stepbatch.request import MAX_STEPS, GenerationRequest, Job

PROMPT = "a lighthouse on a cliff above a stormy sea at night, in the style of an old engraving"
STEPS = 6  # of diffusers' pipeline; the first is not counted


@dataclass(eq=False)
class Pair:
    """The same architecture twice."""

    ours: Model
    theirs: Any  # a diffusers pipeline
    dtype: torch.dtype


def load_pair(name: str, device: str, small: bool) -> Pair:
    """Both sides of a packaged config."""
    size: Any = "small" if small else "full"
    model = ModelConfig(model_path=name, load_format="dummy", dummy_size=size, device=device)
    ours = load_model(EngineConfig(model=model))
    folder = packaged_config(name)
    assert folder is not None
    dtype: torch.dtype = getattr(torch, ours.info.dtype)
    index = read_index(folder, weights=False)
    transformer = getattr(diffusers, index["transformer"][1])
    config = transformer_config(folder, small)
    parts = dummy_components(folder, ours.device, dtype, small)
    parts["transformer"] = dummy_module(lambda: transformer(**config), ours.device, dtype, 0)
    theirs = getattr(diffusers, index["_class_name"])(**parts)
    theirs.set_progress_bar_config(disable=True)
    return Pair(ours, theirs, dtype)


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a large square multiplication."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(8):
        began = time.perf_counter()
        _ = a @ b
        _wait(device)
        seconds.append(time.perf_counter() - began)
    return 2 * n**3 / min(seconds[2:])


def against_diffusers(pair: Pair, size: tuple[int, int], batch: int, rate: float, effort: Effort) -> Case:
    """Both sides' seconds a step for ``batch`` pictures of a size, unguided."""
    step, operations = _our_step(pair.ours, [size] * batch)
    step(), _their_steps(pair, size, batch)
    least, most = effort.step_repeats
    works: dict[str, Callable[[], list[float]]] = {
        "ours": lambda: [timed(step)() for _ in range(STEPS - 1)],
        "theirs": lambda: _their_steps(pair, size, batch),
    }
    repeats = alternate(works, least, most, effort.step_seconds)
    seconds = {name: list(chain.from_iterable(runs)) for name, runs in repeats.items()}
    ours = statistics.median(seconds["ours"])
    figures = [
        Figure("ms", 1000 * ours),
        Figure("diffusers, ms", 1000 * statistics.median(seconds["theirs"])),
        Figure("times faster", ratio(seconds["theirs"], seconds["ours"]), at_least=1.0),
        Figure("share of the matrix rate", operations / ours / rate),
    ]
    return Case(f"{size[0]}x{size[1]}, {batch} at once", figures, seconds, {"size": size, "batch": batch})


def mixed_against_serial(pair: Pair, sizes: Sequence[tuple[int, int]], effort: Effort) -> Case:
    """A step of pictures of every size, and each picture's step by itself."""
    together, _ = _our_step(pair.ours, sizes)
    alone = [_our_step(pair.ours, [size])[0] for size in sizes]

    def parts() -> None:
        for step in alone:
            step()

    together(), parts()
    least, most = effort.step_repeats
    seconds = alternate({"parts": timed(parts), "packed": timed(together)}, least, most, effort.step_seconds)
    figures = [Figure("times faster", ratio(seconds["parts"], seconds["packed"]), at_least=1.0)]
    return Case(" + ".join(f"{w}x{h}" for w, h in sizes), figures, seconds)


def _our_step(model: Model, sizes: Sequence[tuple[int, int]]) -> tuple[Callable[[], None], int]:
    """A denoising step of these pictures, and how many operations it takes."""
    runner, ids = TorchRunner(model), count()
    off: dict[str, Any] = {model.info.guidance.field: model.info.guidance.off}
    jobs = []
    for width, height in sizes:
        request = GenerationRequest(
            prompt=PROMPT, width=width, height=height, num_inference_steps=MAX_STEPS, seed=1, **off
        ).resolve(model.info)
        jobs.append(Job(str(next(ids)), 0, request, runner.tokens(request), 0.0))
    runner.encode(jobs)

    def step() -> None:
        runner.denoise(jobs)
        _wait(model.device)

    with FlopCounterMode(display=False) as counter:
        step()
    return step, counter.get_total_flops()


def _their_steps(pair: Pair, size: tuple[int, int], batch: int) -> list[float]:
    """Seconds of each step but the first of one call."""
    times: list[float] = []

    def stamp(pipeline: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        _wait(pair.ours.device)
        times.append(time.perf_counter())
        return values

    guidance = pair.ours.info.guidance
    off = {guidance.field: guidance.off}
    pair.theirs(
        prompt=[PROMPT] * batch,
        width=size[0],
        height=size[1],
        num_inference_steps=STEPS,
        output_type="latent",
        callback_on_step_end=stamp,
        **off,
    )
    return [after - before for before, after in pairwise(times)]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
