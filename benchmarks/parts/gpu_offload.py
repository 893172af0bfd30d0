"""Steps of a model whose blocks come out of the CPU's memory, each for its turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from parts.families import dummy_config, our_step
from parts.gpu_record import Record, Task, of
from stepbatch.config import MemoryConfig
from stepbatch.engine.clock import DeviceClock
from stepbatch.models.base import Model
from stepbatch.models.loading import choose_device
from stepbatch.models.native import load_model

CALLS = 3
IN_FLIGHT = (1, 8)


def run(task: Task, record: Record) -> None:
    """Measure steps of one picture and of eight, of the first of the task's sizes."""
    device, size = choose_device(task.device), task.sizes[0]
    began = time.monotonic()
    model = load_model(
        dummy_config(task.model, task.device, task.small, memory=MemoryConfig(dit_layerwise_offload=True))
    )
    record.add("load", seconds=time.monotonic() - began)
    clock = DeviceClock(device)
    for in_flight in IN_FLIGHT:
        seconds = (CALLS + 4) * max((m["ms"] / 1000 for m in of(record.measures, "step")), default=1.0)
        if not record.has_time("step", seconds, size=size, in_flight=in_flight):
            return
        with record.measuring("step", size=size, in_flight=in_flight) as values:
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            step = our_step(model, [size] * in_flight)
            moved = streamed_bytes(model, step)
            times = clock.time(step, 1 + CALLS)[1:]
            middle = statistics.median(times)
            values |= {"ms": 1000 * middle, "gb": moved / 1e9, "gb_per_second": moved / middle / 1e9, "seconds": times}
            if device.type == "cuda":
                values["peak_memory_mb"] = torch.cuda.max_memory_allocated(device) / 2**20


def streamed_bytes(model: Model, step: Callable[[], None]) -> int:
    """How many bytes of weights come to the device in a step: those of the blocks that it uses."""
    lists = [child for child in model.transformer.children() if isinstance(child, nn.ModuleList)]
    blocks = [block for blocks in lists for block in blocks]
    used: set[nn.Module] = set()
    hooks = [block.register_forward_pre_hook(lambda module, args: used.add(module)) for block in blocks]
    step()
    for hook in hooks:
        hook.remove()
    return sum(p.nbytes for block in used for p in block.parameters())
