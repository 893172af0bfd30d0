"""How much memory a device has, and how much of it is in use."""

from __future__ import annotations

import math
import resource

import torch


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


def release(device: torch.device) -> None:
    """Give back what is held only to be used again."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
