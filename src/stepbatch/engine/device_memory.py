"""How much memory a device has, and how much of it is in use."""

from __future__ import annotations

import math
import resource
from itertools import chain

import torch
from torch import nn

from stepbatch.engine.clock import DeviceClock

PIECE, PIECES = 2**28, 4  # bytes that are brought over to see how long that takes, and how often


def peak_mb(device: torch.device) -> float:
    """The most that was in use by this process since its start, MiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def budget(device: torch.device) -> float:
    """What this process has and could still get, bytes; endless on a CPU, where nobody says what is its own."""
    if device.type != "cuda":
        return math.inf
    free, _ = torch.cuda.mem_get_info(device)
    return float(free + torch.cuda.memory_reserved(device))


def bytes_away(module: nn.Module, device: torch.device) -> int:
    """How much of a module isn't on its device, where it is brought when it is needed."""
    tensors = chain(module.parameters(), module.buffers())
    return sum(tensor.nbytes for tensor in tensors if tensor.device.type != device.type)


def seconds_per_byte(clock: DeviceClock) -> float:
    """How long a byte takes from the CPU's pinned memory to a device, at best."""
    there = torch.empty(PIECE, dtype=torch.uint8, pin_memory=True)
    return min(clock.time(lambda: there.to(clock.device, non_blocking=True), PIECES)) / PIECE


def release(device: torch.device) -> None:
    """Give back what is held only to be used again."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
