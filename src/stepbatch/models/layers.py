"""Layers that several families have in common, named as in diffusers so that state dicts load as they are."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional as F


class RMSNorm(nn.Module):
    """Root-mean-square norm with a learned scale."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Fusible(nn.Module):
    """Has linear layers over the same input, which ``fuse`` makes one: fewer and larger multiplications."""

    FUSED: ClassVar[dict[str, tuple[str, ...]]] = {}  # the one layer's name -> those that it takes the place of

    def joined(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """What the layers of ``FUSED[name]`` make of ``[T, D]``, side by side."""
        if name in self._modules:
            return self.get_submodule(name)(x)  # type: ignore[no-any-return]
        return torch.cat([self.get_submodule(part)(x) for part in self.FUSED[name]], dim=-1)


def fuse(model: nn.Module) -> None:
    """Join the layers of every ``Fusible`` within ``model``, once its weights are loaded by their own names."""
    for module in list(model.modules()):
        if isinstance(module, Fusible):
            for name, parts in module.FUSED.items():
                module.add_module(name, _side_by_side([module.get_submodule(part) for part in parts]))
                for part in parts:
                    delattr(module, part)


def _side_by_side(layers: list[nn.Module]) -> nn.Linear:
    linears = [layer for layer in layers if isinstance(layer, nn.Linear)]
    assert len(linears) == len(layers)
    with torch.device("meta"):
        joined = nn.Linear(linears[0].in_features, sum(layer.out_features for layer in linears), bias=False)
    joined.weight = nn.Parameter(torch.cat(tuple(layer.weight for layer in linears)), requires_grad=False)
    biases = tuple(layer.bias for layer in linears if layer.bias is not None)
    if biases:
        joined.bias = nn.Parameter(torch.cat(biases), requires_grad=False)
    return joined


def gelu_(x: torch.Tensor) -> torch.Tensor:
    """The tanh approximation of GELU, in place: what a wide layer makes is not written to memory a second time."""
    out: torch.Tensor = torch.ops.aten.gelu_(x, approximate="tanh")
    return out


class TimestepEmbedder(nn.Module):
    """Sinusoids and a small network: timesteps ``[J]`` to ``[J, out]``."""

    def __init__(self, channels: int, hidden: int, out: int) -> None:
        super().__init__()
        self.channels = channels
        self.mlp = nn.Sequential(nn.Linear(channels, hidden), nn.SiLU(), nn.Linear(hidden, out))

    def forward(self, time: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        embedded: torch.Tensor = self.mlp(sinusoids(time, self.channels).to(dtype))
        return embedded


def sinusoids(values: torch.Tensor, channels: int, scale: float = 1.0) -> torch.Tensor:
    """Numbers ``[J]`` as cosines and then sines of many frequencies, fp32 ``[J, channels]``; ``scale`` is for all."""
    half = channels // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=values.device) / half)
    angles = values[:, None].float() * frequencies * scale
    return torch.cat((angles.cos(), angles.sin()), dim=-1)
