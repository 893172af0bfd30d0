"""A step of a family, packed, against diffusers' own transformer with the same weights and inputs."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, count
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights
from torch import nn

from parts.common import SEED, Case, Effort, Figure, alternate, ratio
from stepbatch.bench.offline import operations_of
from stepbatch.config import EngineConfig, MemoryConfig, ModelConfig
from stepbatch.engine.clock import DeviceClock
from stepbatch.engine.runner import TorchRunner
from stepbatch.models.base import Model
from stepbatch.models.checkpoint import find_checkpoint, read_index
from stepbatch.models.dummy import dummy_components, transformer_config
from stepbatch.models.layers import Fusible
from stepbatch.models.native import load_model
from stepbatch.request import MAX_STEPS, GenerationRequest, Job

PROMPT = "a lighthouse on a cliff above a stormy sea at night, in the style of an old engraving"
CALLS = (2, 5)  # steps that are timed without a break: at least, at most
CALLS_SECONDS = 0.5  # between those two
STEPS = 2  # of diffusers' pipeline; what it calls its transformer with at the last is what is timed

Size = tuple[int, int]  # width and height, pixels


@dataclass(eq=False)
class Pair:
    """The same model twice, its transformer's weights in memory once."""

    ours: Model
    theirs: Any  # a diffusers pipeline
    dtype: torch.dtype

    @property
    def clock(self) -> DeviceClock:
        """Of the device that both compute on."""
        return DeviceClock(self.ours.device)


def dummy_config(
    path: str, device: str, small: bool, dtype: str = "auto", memory: MemoryConfig | None = None
) -> EngineConfig:
    """Random weights for packaged configs, by name, or for those in a folder."""
    size: Any = "small" if small else "full"
    precision: Any = dtype
    model = ModelConfig(model_path=path, load_format="dummy", dummy_size=size, device=device, dtype=precision)
    return EngineConfig(model=model, memory=memory or MemoryConfig())


def load_pair(path: str, device: str, small: bool, dtype: str = "auto") -> Pair:
    """Both sides of packaged configs, by name, or of those in a folder."""
    config = dummy_config(path, device, small, dtype)
    return beside_diffusers(load_model(config), config)


def beside_diffusers(ours: Model, config: EngineConfig) -> Pair:
    """A model that was loaded as ``config`` says, and diffusers' pipeline with the weights of its transformer."""
    folder, small = find_checkpoint(config.model), config.model.dummy_size == "small"
    index, arguments = read_index(folder, weights=False), transformer_config(folder, small)
    with init_empty_weights(include_buffers=False):
        transformer = getattr(diffusers, index["transformer"][1])(**arguments).eval()
    transformer.load_state_dict(unfused(ours.transformer), assign=True)
    dtype: torch.dtype = getattr(torch, ours.info.dtype)
    parts = dummy_components(folder, ours.device, dtype, small)
    parts["transformer"] = transformer.requires_grad_(False).to(ours.device)  # what isn't there yet are buffers
    theirs = getattr(diffusers, index["_class_name"])(**parts)
    theirs.set_progress_bar_config(disable=True)
    return Pair(ours, theirs, dtype)


def unfused(transformer: nn.Module) -> dict[str, torch.Tensor]:
    """The weights of one of our transformers by the names that its files have; they share its memory."""
    state: dict[str, torch.Tensor] = dict(transformer.state_dict())
    for path, module in transformer.named_modules():
        if not isinstance(module, Fusible):
            continue
        for name, parts in module.FUSED.items():
            for kind in ("weight", "bias"):
                joined = state.pop(f"{path}.{name}.{kind}", None)
                if joined is not None:
                    rows = joined.chunk(len(parts))
                    state |= {f"{path}.{part}.{kind}": own for part, own in zip(parts, rows, strict=True)}
    return state


def unguided(model: Model, size: Size, steps: int = MAX_STEPS) -> GenerationRequest:
    """A resolved request for a picture that takes one sequence a step."""
    off: dict[str, Any] = {model.info.guidance.field: model.info.guidance.off}
    width, height = size
    request = GenerationRequest(prompt=PROMPT, width=width, height=height, num_inference_steps=steps, seed=SEED, **off)
    return request.resolve(model.info)


def our_step(model: Model, sizes: Sequence[Size]) -> Callable[[], None]:
    """What takes a denoising step of pictures of these sizes."""
    runner, ids = TorchRunner(model), count()
    requests = [unguided(model, size) for size in sizes]
    jobs = [Job(str(next(ids)), 0, request, runner.lengths(request), 0.0) for request in requests]
    runner.encode(jobs)
    return lambda: runner.denoise(jobs, lambda step, steps: None)


def operations(model: Model, size: Size) -> int:
    """How many operations a step of a picture of this size takes."""
    return operations_of(TorchRunner(model), unguided(model, size))


@dataclass(eq=False)
class Call:
    """How a pipeline called its transformer."""

    transformer: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @torch.no_grad()
    def __call__(self) -> Any:
        return self.transformer(*self.args, **self.kwargs)[0]


def their_step(pair: Pair, size: Size, batch: int) -> Call:
    """What takes a step of as many pictures with diffusers' transformer, as its pipeline does."""
    guidance, transformer = pair.ours.info.guidance, pair.theirs.transformer
    off = {guidance.field: guidance.off}
    calls: list[Call] = []

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append(Call(module, args, kwargs))

    hook = transformer.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        pair.theirs(
            prompt=[PROMPT] * batch,
            width=size[0],
            height=size[1],
            num_inference_steps=STEPS,
            output_type="latent",
            generator=torch.Generator("cpu").manual_seed(SEED),
            **off,
        )
    finally:
        hook.remove()
    assert len(calls) == STEPS
    return calls[-1]


def against_diffusers(pair: Pair, size: Size, batch: int, rate: float, effort: Effort) -> Case:
    """Both sides' seconds a step for ``batch`` pictures of a size, unguided."""
    ours, theirs, clock = our_step(pair.ours, [size] * batch), their_step(pair, size, batch), pair.clock
    work = batch * operations(pair.ours, size)
    once = clock.time(ours, 2)[1]  # the first lays out the batch; their pipeline has run both of its steps
    calls = max(CALLS[0], min(CALLS[1], round(CALLS_SECONDS / once)))
    works: dict[str, Callable[[], list[float]]] = {
        "ours": lambda: clock.time(ours, calls),
        "theirs": lambda: clock.time(theirs, calls),
    }
    least, most = effort.step_repeats
    repeats = alternate(works, least, most, effort.step_seconds)
    seconds = {name: list(chain.from_iterable(runs)) for name, runs in repeats.items()}
    median = statistics.median(seconds["ours"])
    figures = [
        Figure("ms", 1000 * median),
        Figure("diffusers, ms", 1000 * statistics.median(seconds["theirs"])),
        Figure("times faster", ratio(seconds["theirs"], seconds["ours"]), at_least=1.0),
        Figure("TFLOP/s", work / median / 1e12),
        Figure("share of the matrix rate", work / median / rate),
    ]
    return Case(f"{size[0]}x{size[1]}, {batch} at once", figures, seconds, {"size": size, "batch": batch})


def mixed_against_serial(pair: Pair, sizes: Sequence[Size], effort: Effort) -> Case:
    """A step of pictures of every size, and each picture's step by itself."""
    together, clock = our_step(pair.ours, sizes), pair.clock
    alone = [our_step(pair.ours, [size]) for size in sizes]

    def parts() -> None:
        for step in alone:
            step()

    works: dict[str, Callable[[], float]] = {
        "parts": lambda: clock.time(parts, 1)[0],
        "packed": lambda: clock.time(together, 1)[0],
    }
    for work in works.values():
        work()
    least, most = effort.step_repeats
    seconds = alternate(works, least, most, effort.step_seconds)
    figures = [Figure("times faster", ratio(seconds["parts"], seconds["packed"]), at_least=1.0)]
    return Case(" + ".join(f"{w}x{h}" for w, h in sizes), figures, seconds)
