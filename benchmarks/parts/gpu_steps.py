"""A model's steps beside diffusers', how close their results are, and seconds an image."""

from __future__ import annotations

import gc
import statistics
import tempfile
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import msgspec
import torch
import torch._dynamo

from parts.common import Effort
from parts.families import (
    CALLS,
    CALLS_SECONDS,
    Pair,
    Size,
    against_diffusers,
    beside_diffusers,
    dummy_config,
    load_pair,
    mixed_against_serial,
    their_step,
)
from parts.gpu_parity import compare, shallow_configs
from parts.gpu_record import Record, Task, of
from stepbatch.bench.hardware import matrix_rate
from stepbatch.bench.offline import measure
from stepbatch.config import EngineConfig
from stepbatch.engine.clock import DeviceClock
from stepbatch.engine.probe import probe
from stepbatch.engine.runner import TorchRunner
from stepbatch.engine.width import best_width
from stepbatch.models.loading import choose_device
from stepbatch.models.native import load_model
from stepbatch.request import GenerationRequest

EFFORT = Effort(step_repeats=(2, 6), step_seconds=0.8)
QUICK = Effort(step_repeats=(1, 1), step_seconds=0.0)
COMPILE_SECONDS = 20.0  # what compiling a family's blocks for one case may take
PROBE_SECONDS = 15.0  # as long as a server might take
RESERVED_SECONDS = 30.0  # for what comes after the steps and matters more than wide ones
IMAGE_PROMPT = "an old fishing harbour in the morning fog, boats with red sails, gulls, oil on canvas"


def run(task: Task, record: Record) -> None:
    """Measure a model that is loaded once; what takes longest comes last."""
    device, effort = choose_device(task.device), QUICK if task.quick else EFFORT
    pair = load(task, record, device)
    rate = matrix_rate(device, pair.dtype)
    record.add("matrix", of="large and square", dtype=pair.ours.info.dtype, tflops=rate / 1e12)
    for batch, size in product(sorted(task.batch), sorted(task.sizes)):
        seconds = _expected(record, size, batch) + (RESERVED_SECONDS if batch > 1 else 0.0)
        if record.has_time("step", seconds, size=size, batch=batch):
            with record.measuring("step", size=size, batch=batch) as values:
                values |= step(pair, size, batch, rate, effort)
        _tidy(device)
    parity(pair, task, record)
    image(pair, task, record)
    costs(pair, task, record)
    to_compile = list(product(sorted(task.batch), sorted(task.sizes, reverse=True)))
    compiled(pair, record, to_compile[:1])
    shallow_parity(task, record)
    mixed(pair, task, record, effort)
    compiled(pair, record, to_compile[1:])


def load(task: Task, record: Record, device: torch.device) -> Pair:
    """Both sides; and how long that takes, and how much memory a server takes for the model."""
    free = _free_gib(device)
    config = dummy_config(task.model, task.device, task.small)
    clock = DeviceClock(device)
    began = time.monotonic()
    ours = load_model(config)
    clock.wait()
    values = {"seconds": time.monotonic() - began}
    if device.type == "cuda":
        values |= {"gib": torch.cuda.memory_allocated(device) / 2**30, "free_gib": free}
    record.add("load", **values)
    return beside_diffusers(ours, config)


def _free_gib(device: torch.device) -> float:
    return torch.cuda.mem_get_info(device)[0] / 2**30 if device.type == "cuda" else 0.0


def _tidy(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def step(pair: Pair, size: Size, batch: int, rate: float, effort: Effort) -> dict[str, Any]:
    """Milliseconds a step of both sides."""
    case = against_diffusers(pair, size, batch, rate, effort)
    figures = {figure.name: figure.value for figure in case.figures}
    return {
        "ms": figures["ms"],
        "diffusers_ms": figures["diffusers, ms"],
        "times_faster": figures["times faster"],
        "tflops": figures["TFLOP/s"],
        "matrix_share": figures["share of the matrix rate"],
        "seconds": case.raw,
    }


def _expected(record: Record, size: Size, batch: int) -> float:
    """Seconds that measuring a step may take, by the last one that was measured."""
    known = of(record.measures, "step")
    if not known:
        return 2.0
    last, pixels = known[-1], size[0] * size[1] * batch
    one = max(last["ms"], last["diffusers_ms"]) / 1000 * pixels / (last["size"][0] * last["size"][1] * last["batch"])
    calls = max(CALLS[0], min(CALLS[1], CALLS_SECONDS / one))
    return one * (2 * EFFORT.step_repeats[0] * calls + 5) + 1.0


def parity(pair: Pair, task: Task, record: Record) -> None:
    """How far predictions are apart, at the model's own depth and precision."""
    size, other = task.sizes[-1], task.sizes[0]
    if record.has_time("parity", 5.0):
        with record.measuring("parity", size=size, dtype=pair.ours.info.dtype, depth="whole") as values:
            values["differences"] = compare(pair, size, other)


def shallow_parity(task: Task, record: Record) -> None:
    """The same in fp32, at a depth that this takes no time for."""
    if not record.has_time("parity", 10.0):
        return
    with record.measuring("parity", size=task.sizes[0], dtype="float32", depth="two layers") as values:
        with tempfile.TemporaryDirectory() as folder:
            pair = load_pair(str(shallow_configs(task.model, Path(folder))), task.device, task.small, "float32")
        values["differences"] = compare(pair, task.sizes[0], task.sizes[-1])


def mixed(pair: Pair, task: Task, record: Record, effort: Effort) -> None:
    """A step of several sizes at once, against each by itself."""
    if record.has_time("mixed", 5.0):
        with record.measuring("mixed", sizes=task.sizes) as values:
            case = mixed_against_serial(pair, task.sizes, effort)
            values |= {"times_faster": case.figures[0].value, "seconds": case.raw}


def image(pair: Pair, task: Task, record: Record) -> None:
    """Seconds an image by itself, with the model's default steps and guidance, and where they go."""
    model = pair.ours
    width, height = max(task.sizes)
    guidance = {model.info.guidance.field: getattr(model.info.defaults, model.info.guidance.field)}
    request = GenerationRequest(prompt=IMAGE_PROMPT, width=width, height=height, seed=1, **guidance)
    short = GenerationRequest(prompt="warm-up", width=width, height=height, num_inference_steps=2, seed=1, **guidance)
    resolved = request.resolve(model.info)
    guided = resolved.guided(model.info)
    measured = [m["ms"] for m in of(record.measures, "step") if tuple(m["size"]) == (width, height) and m["batch"] == 1]
    seconds = (measured[0] if measured else 100.0) / 1000 * resolved.steps * (1 + guided) + 2.0
    if not record.has_time("image", seconds, size=(width, height)):
        return
    with record.measuring("image", size=(width, height), steps=resolved.steps, guided=guided) as values:
        measure(TorchRunner(model), EngineConfig(), [short])
        one = measure(TorchRunner(model), EngineConfig(), [request])
        if one.failures:
            raise RuntimeError(one.failures[0].message)
        values["seconds"] = one.seconds
        values |= {f"{stage}_seconds": sum(one.stage(stage)) for stage in ("encode", "denoise", "decode")}


def costs(pair: Pair, task: Task, record: Record) -> None:
    """What a server would find at its start: how many pictures share a step, and whether to decode beside steps."""
    seconds = 1.0 if task.quick else PROBE_SECONDS
    if not record.has_time("costs", seconds + 5.0):
        return
    with record.measuring("costs") as values:
        measured = probe(TorchRunner(pair.ours), seconds, task.sizes)
        step = measured.costs().step
        alone = [point for point in measured.points if point.jobs == 1]
        values |= {
            "knees": {f"{p.width}x{p.height}": best_width(step, p.tokens, p.squares) for p in alone},
            "host_ms": 1000 * step.host,
            "base_ms": 1000 * step.base,
            "ms_per_thousand_tokens": 1e6 * step.per_token,
            "beside": measured.beside,
            "measured": msgspec.to_builtins(measured),
        }


def compiled(pair: Pair, record: Record, cases: Sequence[tuple[int, Size]]) -> None:
    """Milliseconds a step of diffusers' transformer with its repeated blocks compiled, for one case after another."""
    if pair.ours.device.type != "cuda":
        return
    pair.theirs.transformer.compile_repeated_blocks(dynamic=False)  # again makes no difference
    for batch, size in cases:
        seconds = max((m["compile_seconds"] for m in of(record.measures, "compiled")), default=COMPILE_SECONDS)
        if record.has_time("compiled", seconds, size=size, batch=batch):
            with record.measuring("compiled", size=size, batch=batch) as values:
                values |= _compiled(pair, size, batch)


def _compiled(pair: Pair, size: Size, batch: int) -> dict[str, Any]:
    torch._dynamo.reset()  # or each size would count as one more version of the same code, of which there may be few
    counters = torch._dynamo.utils.counters
    counters.clear()
    began = time.monotonic()
    call = their_step(pair, size, batch)  # it takes two steps, and is compiled for the first
    pair.clock.wait()
    seconds = time.monotonic() - began
    times = pair.clock.time(call, 2 + CALLS[1])[2:]
    return {
        "ms": 1000 * statistics.median(times),
        "compile_seconds": seconds,
        "graphs": counters["stats"]["unique_graphs"],  # few: a block that falls back to eager code is compiled often
        "seconds": times,
    }
