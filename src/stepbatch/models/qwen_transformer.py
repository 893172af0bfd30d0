"""The transformer of Qwen-Image, over packed sequences of a prompt, a picture and its references.

All of its blocks are of two streams: text rows and image rows have weights of their own and meet in attention only, so
all text rows lie in one tensor and all image rows in another. The modulation depends on the timestep alone: its tables
have a row a job, and one more for references where the model takes them as finished pictures, at timestep 0.

The architecture is that of https://github.com/QwenLM/Qwen-Image; parameter names are those of diffusers'
``QwenImageTransformer2DModel``, whose state dict is loaded as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from stepbatch.errors import CheckpointError
from stepbatch.models.latents import PATCH
from stepbatch.models.layers import RMSNorm, sinusoids
from stepbatch.models.packed import gather
from stepbatch.models.two_streams import (
    EPS,
    TIME_CHANNELS,
    FeedForward,
    JointAttention,
    Order,
    Perceptron,
    Stream,
    bounded,
    meet,
    modulated,
)

ROTARY_BASE = 10000
ELSEWHERE = ("guidance_embeds", "use_additional_t_cond", "use_layer3d_rope")  # switches of other models


@dataclass(eq=False)
class Layout:
    """What a batch's forward pass needs to know of its members."""

    text: torch.Tensor  # [Tt, D]
    text_rotary: torch.Tensor  # complex64 [Tt, 1, head_dim / 2]
    text_time: torch.Tensor  # [Tt] row of the modulation's tables
    references: torch.Tensor  # [Q, D]
    image_rotary: torch.Tensor  # complex64 [Ti, 1, head_dim / 2]
    image_time: torch.Tensor  # [Ti]
    order: Order
    out_time: torch.Tensor  # [R']


class Block(nn.Module):
    """Text rows and image rows, each with weights of their own, meet in attention.

    After the last block nothing looks at text any more, so there it ends with attention.
    """

    def __init__(self, dim: int, heads: int, is_last: bool) -> None:
        super().__init__()
        self.is_last = is_last
        self.img_mod = nn.Sequential(nn.Identity(), nn.Linear(dim, 6 * dim))
        self.txt_mod = nn.Sequential(nn.Identity(), nn.Linear(dim, 6 * dim))
        self.attn = JointAttention(dim, heads)
        self.img_mlp = FeedForward(dim)
        self.txt_mlp = FeedForward(dim)

    def forward(
        self, text: torch.Tensor, image: torch.Tensor, time: torch.Tensor, layout: Layout
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``[Tt, D]`` and ``[Ti, D]``, with the timesteps' ``[J, D]``, to the same."""
        words = Stream(text, table(self.txt_mod, time), layout.text_time, layout.text_rotary, self.txt_mlp)
        pictures = Stream(image, table(self.img_mod, time), layout.image_time, layout.image_rotary, self.img_mlp)
        text, image = meet(self.attn, words, pictures, layout.order, self.is_last)
        return bounded(text), bounded(image)


def table(modulation: nn.Module, time: torch.Tensor) -> torch.Tensor:
    """Rows of a block's modulation, ``[J, 6, D]``: shift, scale and gate of attention, then of feed-forward."""
    rows: torch.Tensor = modulation(time).view(len(time), 6, -1)
    rows[:, 1::3] += 1  # what a row is multiplied with
    return rows


class Transformer(nn.Module):
    """The denoiser over packed sequences.

    Raises:
        CheckpointError: the config has what is not done here.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        for name in ELSEWHERE:
            if config[name]:
                raise CheckpointError(f"its transformer has {name}, which has no native form")
        if config["patch_size"] != PATCH:
            raise CheckpointError(f"its transformer has patch_size {config['patch_size']}, which has no native form")
        heads, layers = config["num_attention_heads"], config["num_layers"]
        dim = heads * config["attention_head_dim"]
        self.channels: int = config["in_channels"]
        self.axes_dims: list[int] = config["axes_dims_rope"]
        if sum(self.axes_dims) != config["attention_head_dim"]:
            raise CheckpointError("its transformer's axes_dims_rope don't add up to attention_head_dim")
        self.references_finished: bool = config["zero_cond_t"]
        self.time_text_embed = nn.ModuleDict({"timestep_embedder": Perceptron(TIME_CHANNELS, dim)})
        self.txt_norm = RMSNorm(config["joint_attention_dim"], EPS)
        self.txt_in = nn.Linear(config["joint_attention_dim"], dim)
        self.img_in = nn.Linear(self.channels, dim)
        self.transformer_blocks = nn.ModuleList([Block(dim, heads, i == layers - 1) for i in range(layers)])
        self.norm_out = nn.ModuleDict({"linear": nn.Linear(dim, 2 * dim)})
        self.proj_out = nn.Linear(dim, PATCH * PATCH * (config["out_channels"] or self.channels))

    def rotary(self, positions: torch.Tensor) -> torch.Tensor:
        """Positions ``[T, 3]`` (picture, row, column) to complex64 ``[T, 1, head_dim / 2]``."""
        parts = []
        for axis, dim in enumerate(self.axes_dims):
            frequencies = 1.0 / ROTARY_BASE ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
            angles = torch.outer(positions[:, axis].float(), frequencies)
            parts.append(torch.polar(torch.ones_like(angles), angles))
        return torch.cat(parts, dim=-1).unsqueeze(1)

    def embed_prompt(self, hidden: torch.Tensor) -> torch.Tensor:
        """A text encoder's ``[L, D']`` to ``[L, D]``."""
        embedded: torch.Tensor = self.txt_in(self.txt_norm(hidden.to(self.txt_in.weight.dtype)))
        return embedded

    def embed_picture(self, rows: torch.Tensor) -> torch.Tensor:
        """fp32 ``[N, C]`` to ``[N, D]``."""
        embedded: torch.Tensor = self.img_in(rows.to(self.img_in.weight.dtype))
        return embedded

    def embed_time(self, sigma: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Each job's ``[J]`` sigma to what modulates its rows, ``[J, D]``; with a last row for finished references."""
        # diffusers goes through the timestep, and so do these roundings
        time = (sigma * 1000).to(dtype) / 1000
        if self.references_finished:
            time = F.pad(time, (0, 1))
        embedded = self.time_text_embed["timestep_embedder"](sinusoids(time, TIME_CHANNELS, scale=1000).to(dtype))
        return F.silu(embedded)

    def forward(self, latents: torch.Tensor, sigma: torch.Tensor, layout: Layout) -> torch.Tensor:
        """``[R, C]`` latents and each job's ``[J]`` sigma to ``[R', C]`` velocities."""
        text = layout.text
        image = torch.cat((self.embed_picture(latents), layout.references)).index_select(0, layout.order.sources)
        time = self.embed_time(sigma, image.dtype)
        for block in self.transformer_blocks:
            text, image = block(text, image, time, layout)
        scale, shift = gather(self.norm_out["linear"](time).view(len(time), 2, -1), layout.out_time).unbind(1)
        out: torch.Tensor = self.proj_out(modulated(image.index_select(0, layout.order.pictures), shift, 1 + scale))
        return out
