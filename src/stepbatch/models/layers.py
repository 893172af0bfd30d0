"""Layers that several families have in common, named as in diffusers so that state dicts load as they are."""

from __future__ import annotations

import math

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


class TimestepEmbedder(nn.Module):
    """Sinusoids and a small network: timesteps ``[J]`` to ``[J, out]``."""

    def __init__(self, channels: int, hidden: int, out: int) -> None:
        super().__init__()
        self.channels = channels
        self.mlp = nn.Sequential(nn.Linear(channels, hidden), nn.SiLU(), nn.Linear(hidden, out))

    def forward(self, time: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        half = self.channels // 2
        frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=time.device) / half)
        angles = time[:, None].float() * frequencies
        embedded: torch.Tensor = self.mlp(torch.cat((angles.cos(), angles.sin()), dim=-1).to(dtype))
        return embedded
