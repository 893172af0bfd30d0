"""The transformer of FLUX.1, over packed sequences of a prompt, a picture and its references.

Double-stream blocks have weights of their own for text and for image rows, which meet in attention only; so all text
rows lie in one tensor there, and all image rows in another. Single-stream blocks take sequence after sequence. The
modulation depends on timestep, guidance and prompt: its tables have a row a sequence.

The architecture is that of https://github.com/black-forest-labs/flux; parameter names are those of diffusers'
``FluxTransformer2DModel``, whose state dict is loaded as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from stepbatch.errors import CheckpointError
from stepbatch.models.layers import gelu_, sinusoids
from stepbatch.models.packed import attention, chunk_rows, gather, in_chunks
from stepbatch.models.two_streams import (
    TIME_CHANNELS,
    Attention,
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


@dataclass(eq=False)
class Layout:
    """What a batch's forward pass needs to know of its members."""

    job: torch.Tensor  # [S] row of sigma
    condition: torch.Tensor  # [S, D], what the modulation depends on besides the timestep
    text: torch.Tensor  # [Tt, D]
    references: torch.Tensor  # [Q, D]
    order: Order
    image_rotary: torch.Tensor  # complex64 [Ti, 1, head_dim / 2]
    rotary: torch.Tensor  # complex64 [T, 1, head_dim / 2]; text is at the origin, where nothing turns
    sequence: torch.Tensor  # [T]
    out_rows: torch.Tensor  # [R'] the rows among T that are pictures
    out_sequence: torch.Tensor  # [R']


class Modulation(nn.Module):
    """Shifts, scales and gates for a block's rows, made of each sequence's vector."""

    def __init__(self, dim: int, parts: int, scales: tuple[int, ...]) -> None:
        super().__init__()
        self.parts, self.scales = parts, scales
        self.linear = nn.Linear(dim, parts * dim)

    def forward(self, vector: torch.Tensor) -> torch.Tensor:
        """``[S, D]`` to ``[S, parts, D]``; scales are what a row is multiplied with."""
        table: torch.Tensor = self.linear(vector).view(len(vector), self.parts, -1)
        for part in self.scales:
            table[:, part] += 1
        return table


class DoubleBlock(nn.Module):
    """Text rows and image rows, each with weights of their own, meet in attention."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1 = Modulation(dim, 6, scales=(1, 4))
        self.norm1_context = Modulation(dim, 6, scales=(1, 4))
        self.attn = JointAttention(dim, heads)
        self.ff = FeedForward(dim)
        self.ff_context = FeedForward(dim)

    def forward(
        self, text: torch.Tensor, image: torch.Tensor, vector: torch.Tensor, layout: Layout
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``[Tt, D]`` and ``[Ti, D]`` to the same."""
        order = layout.order
        words = Stream(text, self.norm1_context(vector), order.text_sequence, None, self.ff_context)
        pictures = Stream(image, self.norm1(vector), order.image_sequence, layout.image_rotary, self.ff)
        text, image = meet(self.attn, words, pictures, order)
        return bounded(text), image


class SingleBlock(nn.Module):
    """Attention and feed-forward beside each other, over whole sequences."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm = Modulation(dim, 3, scales=(1,))
        self.attn = Attention(dim, heads)
        self.proj_mlp = nn.Linear(dim, 4 * dim)
        self.proj_out = nn.Linear(5 * dim, dim)

    def forward(self, x: torch.Tensor, vector: torch.Tensor, layout: Layout) -> torch.Tensor:
        """``[T, D]`` to the same."""
        size = chunk_rows(5 * x.shape[1], x.device)
        table = self.norm(vector)  # [S, 3, D]
        weight, dim = self.proj_out.weight, x.shape[1]

        def norm(rows: slice) -> torch.Tensor:
            return modulated(x[rows], *gather(table[:, :2], layout.sequence[rows]).unbind(1))

        def after(rows: slice) -> torch.Tensor:
            mlp = gelu_(self.proj_mlp(normed[rows]))
            # one multiplication each, so that their rows need not be joined
            update = F.linear(attended[rows], weight[:, :dim], self.proj_out.bias).addmm_(mlp, weight[:, dim:].T)
            return torch.addcmul(x[rows], gather(table[:, 2], layout.sequence[rows]), update)

        normed = in_chunks(norm, len(x), size)
        joined = in_chunks(lambda rows: self.attn.project(normed[rows], layout.rotary[rows]), len(x), size)
        query, key, value = joined.unbind(1)
        attended = attention(query, key, value, layout.order.segments)
        return bounded(in_chunks(after, len(x), size))


class Conditioning(nn.Module):
    """What the modulation depends on; its parts are used one by one, each as soon as it is known."""

    def __init__(self, dim: int, pooled: int, guided: bool) -> None:
        super().__init__()
        self.timestep_embedder = Perceptron(TIME_CHANNELS, dim)
        self.guidance_embedder = Perceptron(TIME_CHANNELS, dim) if guided else None
        self.text_embedder = Perceptron(pooled, dim)


class Transformer(nn.Module):
    """The denoiser over packed sequences.

    Raises:
        CheckpointError: the config has what is not done here.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.channels: int = config["in_channels"]
        if config["patch_size"] != 1 or config["out_channels"] not in (None, self.channels):
            shape = ", ".join(f"{name} {config[name]}" for name in ("patch_size", "in_channels", "out_channels"))
            raise CheckpointError(f"its transformer has {shape}, which has no native form")
        heads = config["num_attention_heads"]
        dim = heads * config["attention_head_dim"]
        self.axes_dims: list[int] = config["axes_dims_rope"]
        if sum(self.axes_dims) != config["attention_head_dim"]:
            raise CheckpointError("its transformer's axes_dims_rope don't add up to attention_head_dim")
        self.is_guided: bool = config["guidance_embeds"]
        self.time_text_embed = Conditioning(dim, config["pooled_projection_dim"], self.is_guided)
        self.context_embedder = nn.Linear(config["joint_attention_dim"], dim)
        self.x_embedder = nn.Linear(self.channels, dim)
        self.transformer_blocks = nn.ModuleList([DoubleBlock(dim, heads) for _ in range(config["num_layers"])])
        self.single_transformer_blocks = nn.ModuleList(
            [SingleBlock(dim, heads) for _ in range(config["num_single_layers"])]
        )
        self.norm_out = Modulation(dim, 2, scales=(0,))
        self.proj_out = nn.Linear(dim, self.channels)

    def rotary(self, positions: torch.Tensor) -> torch.Tensor:
        """Positions ``[T, 3]`` (picture, row, column) to complex64 ``[T, 1, head_dim / 2]``."""
        parts = []
        for axis, dim in enumerate(self.axes_dims):
            frequencies = 1.0 / ROTARY_BASE ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim)
            angles = torch.outer(positions[:, axis].double(), frequencies)
            parts.append(torch.polar(torch.ones_like(angles), angles))
        return torch.cat(parts, dim=-1).to(torch.complex64).unsqueeze(1)

    def embed_prompt(self, hidden: torch.Tensor, pooled: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """T5's ``[L, D']`` and CLIP's ``[D'']`` to ``[L, D]`` and ``[D]``."""
        dtype = self.x_embedder.weight.dtype
        return self.context_embedder(hidden.to(dtype)), self.time_text_embed.text_embedder(pooled.to(dtype))

    def embed_picture(self, rows: torch.Tensor) -> torch.Tensor:
        """fp32 ``[N, C]`` to ``[N, D]``."""
        embedded: torch.Tensor = self.x_embedder(rows.to(self.x_embedder.weight.dtype))
        return embedded

    def condition(self, pooled: torch.Tensor, guidance: torch.Tensor) -> torch.Tensor:
        """Embedded prompts ``[S, D]`` and fp32 guidance ``[S]``, if this model knows it, to ``[S, D]``."""
        embedder = self.time_text_embed.guidance_embedder
        if embedder is None:
            return pooled
        # 3.5 times 1000 is no bfloat16, and is rounded to one in diffusers
        embedded: torch.Tensor = embedder(sinusoids(guidance.to(pooled.dtype) * 1000, TIME_CHANNELS).to(pooled.dtype))
        return embedded + pooled

    def forward(self, latents: torch.Tensor, sigma: torch.Tensor, layout: Layout) -> torch.Tensor:
        """``[R, C]`` latents and each job's ``[J]`` sigma to ``[R', C]`` velocities."""
        dtype = self.x_embedder.weight.dtype
        # diffusers goes through the timestep, and so do these roundings
        time = (sigma * 1000).to(dtype) / 1000 * 1000
        time = self.time_text_embed.timestep_embedder(sinusoids(time, TIME_CHANNELS).to(dtype))  # [J, D]
        vector = F.silu(time.index_select(0, layout.job) + layout.condition)  # [S, D]
        image = torch.cat((self.embed_picture(latents), layout.references)).index_select(0, layout.order.sources)
        text = layout.text
        for block in self.transformer_blocks:
            text, image = block(text, image, vector, layout)
        x = layout.order.join(text, image)
        for block in self.single_transformer_blocks:
            x = block(x, vector, layout)
        scale, shift = gather(self.norm_out(vector), layout.out_sequence).unbind(1)
        out: torch.Tensor = self.proj_out(modulated(x.index_select(0, layout.out_rows), shift, scale))
        return out
