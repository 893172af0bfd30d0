"""Training in several processes, each with a core of its own, that average their gradients."""

from __future__ import annotations

import torch
from torch import distributed as dist
from torch import nn


def join_processes() -> int:
    """Under ``torchrun``, join the processes that train together; returns this one's number."""
    if not dist.is_torchelastic_launched():
        return 0
    dist.init_process_group("gloo")
    return dist.get_rank()


def agree(seconds: float) -> float:
    """The first process's clock, so that all have the same learning rates and end together."""
    clock = torch.tensor(seconds, dtype=torch.float64)
    if dist.is_initialized():
        dist.broadcast(clock, 0)
    return clock.item()


def average_gradients(parameters: list[nn.Parameter]) -> None:
    """Average the gradients over the processes, in one message."""
    if not dist.is_initialized():
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    at = 0
    for gradient in gradients:
        gradient.copy_(flat[at : at + gradient.numel()].view_as(gradient))
        at += gradient.numel()
