"""Weights that don't fit on the device: they lie in the CPU's memory and are on the device for their turn alone.

Diffusers' group offloading moves them: out of pinned memory, and no copy back, since what is dropped on the device is
still there in the CPU's memory. It is applied to finished modules, which know nothing of it. What it asks of them is
that weights are used nowhere but in the ``forward`` of the module that is moved: a block, or a text encoder's or VAE's
layer.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from itertools import chain, pairwise
from typing import Any

import torch
from diffusers.hooks import HookRegistry, apply_group_offloading
from torch import nn

from stepbatch.config import MemoryConfig

FLAGS = ("dit_layerwise_offload", "text_encoder_cpu_offload", "vae_cpu_offload")
CPU = torch.device("cpu")

log = logging.getLogger(__name__)


def possible_offload(memory: MemoryConfig, device: torch.device) -> MemoryConfig:
    """``memory`` without the offload that can't be on this device, after a word about it."""
    given = [name for name in FLAGS if getattr(memory, name)]
    if device.type == "cuda" or not given:
        return memory
    flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
    log.warning("%s: no effect on %s, only on a CUDA device", flags, device)
    return replace(memory, **dict.fromkeys(given, False))


def offload_blocks(transformer: nn.Module, device: torch.device) -> None:
    """Let the blocks of a transformer's lists take turns on the device, where all else of it stays.

    Each block crosses the bus once for each time that its list is run through, however many sequences are packed, and
    while it computes, the next of its list is on its way: two blocks are on the device at most.

    Args:
        transformer: In the CPU's memory, its layers fused.
        device: Where it computes.
    """
    children = transformer.named_children()
    lists = {name: child for name, child in children if isinstance(child, nn.ModuleList) and len(child)}
    away = {id(tensor) for blocks in lists.values() for tensor in chain(blocks.parameters(), blocks.buffers())}
    for tensor in chain(transformer.parameters(), transformer.buffers()):
        if id(tensor) not in away:
            tensor.data = tensor.data.to(device)
    # It is given the lists by themselves. With the whole transformer it would move the small parts too, just for
    # ``forward``, though prompts pass some of them on other ways; and it would learn the blocks' order from all that
    # happens until the first ``forward`` is over, prompts included, which is no step's order. So it is told here.
    _apply(nn.ModuleDict(lists), device, offload_type="block_level", num_blocks_per_group=1)
    for blocks in lists.values():
        hooks = [_hook(block) for block in blocks]
        hooks[0].group.non_blocking = False  # nothing brings it ahead, so it is waited for
        for hook, following in pairwise(hooks):
            hook.next_group = following.group
            following.group.onload_self = False


def offload_network(network: nn.Module, device: torch.device) -> None:
    """Let the blocks of a transformer or UNet that diffusers calls take turns on the device.

    All else of it is there while it computes. The blocks' order is learned from the first call.

    Args:
        network: In the CPU's memory.
        device: Where it computes.
    """
    _apply(network, device, offload_type="block_level", num_blocks_per_group=1)


def offload_part(part: nn.Module, device: torch.device) -> None:
    """Let the layers of a text encoder or VAE take turns on the device.

    Args:
        part: In the CPU's memory.
        device: Where it computes.
    """
    _apply(part, device, offload_type="leaf_level")
    # Nothing is brought ahead: the order could only be learned from a first call, and calls differ (with and without
    # images; a VAE has two directions). Little is lost, as for a few prompts or a picture the way takes longest.
    registry = HookRegistry.check_if_exists_or_initialize(part)
    for name in ("lazy_prefetch_group_offloading", "layer_execution_tracker"):
        registry.remove_hook(name)
    for module in part.modules():
        hook = _hook(module)
        if hook is not None:
            hook.group.non_blocking = False


def _apply(module: nn.Module, device: torch.device, **level: Any) -> None:
    # Without ``record_stream`` the host waits for a block before it drops it. With it, the host would run ahead where
    # computing takes longer than copying, which is what wide batches are for, and fill the device with blocks.
    apply_group_offloading(
        module, onload_device=device, offload_device=CPU, use_stream=device.type == "cuda", record_stream=False, **level
    )


def _hook(module: nn.Module) -> Any:
    return HookRegistry.check_if_exists_or_initialize(module).get_hook("group_offloading")
