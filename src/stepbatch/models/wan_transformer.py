"""The transformer of Wan, over packed sequences of a video's tokens.

Prompts are no part of the sequences: every block's second attention looks from each sequence at the rows of its own
prompt. The modulation depends on the timestep alone: its tables have a row a job.

The architecture is that of https://github.com/Wan-Video/Wan2.1; parameter names are those of diffusers'
``WanTransformer3DModel``, whose state dict is loaded as it is.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from stepbatch.errors import NotNative
from stepbatch.models.latents import PATCH
from stepbatch.models.layers import Fusible, RMSNorm, gelu_, sinusoids
from stepbatch.models.packed import Segments, attention, chunk_rows, gather, in_chunks, rotate
from stepbatch.models.two_streams import EPS, Perceptron, modulated

ROTARY_BASE = 10000
KNOWN = {  # the only values that are done here
    "patch_size": [1, PATCH, PATCH],
    "qk_norm": "rms_norm_across_heads",
    "eps": EPS,
    "image_dim": None,
    "added_kv_proj_dim": None,
    "pos_embed_seq_len": None,
}


@dataclass(eq=False)
class Layout:
    """What a batch's forward pass needs to know of its members."""

    network: int  # which of the model's transformers it is for
    rows: torch.Tensor  # [T] row of the latents
    job: torch.Tensor  # [T] row of the times
    rotary: torch.Tensor  # complex64 [T, 1, head_dim / 2]
    segments: Segments
    text: torch.Tensor  # [Tt, D], each prompt's rows once, and a row of padding
    text_rows: torch.Tensor  # [Ta] row of the text, for each row that sequences look at
    text_segments: Segments  # of sequences and what they look at of the text


class Attention(Fusible):
    """The layers around an attention; queries and keys are normed over all heads."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.norm_q, self.norm_k = RMSNorm(dim, EPS), RMSNorm(dim, EPS)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])


class SelfAttention(Attention):
    """Queries, keys and values of rows that look at each other."""

    FUSED: ClassVar = {"to_qkv": ("to_q", "to_k", "to_v")}

    def project(self, x: torch.Tensor, rotary: torch.Tensor) -> torch.Tensor:
        """``[T, D]`` to queries, keys and values, ``[T, 3, heads, head_dim]``."""
        joined = self.joined("to_qkv", x).view(len(x), 3, self.heads, -1)
        for part, norm in ((0, self.norm_q), (1, self.norm_k)):
            normed = norm(joined[:, part].flatten(1)).view(len(x), self.heads, -1)
            joined[:, part] = rotate(normed, rotary)
        return joined


class CrossAttention(Attention):
    """Queries of a video's rows, keys and values of its prompt's."""

    FUSED: ClassVar = {"to_kv": ("to_k", "to_v")}

    def query(self, x: torch.Tensor) -> torch.Tensor:
        """``[T, D]`` to ``[T, heads, head_dim]``."""
        query: torch.Tensor = self.norm_q(self.to_q(x)).view(len(x), self.heads, -1)
        return query

    def key_value(self, text: torch.Tensor) -> torch.Tensor:
        """``[Tt, D]`` to keys and values, ``[Tt, 2, heads, head_dim]``."""
        joined = self.joined("to_kv", text).view(len(text), 2, -1)
        joined[:, 0] = self.norm_k(joined[:, 0])
        return joined.view(len(text), 2, self.heads, -1)


class FeedForward(nn.Module):
    """The feed-forward of a block, row by row."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        inner = nn.Sequential(OrderedDict(proj=nn.Linear(dim, hidden)))
        self.net = nn.Sequential(inner, nn.Identity(), nn.Linear(hidden, dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.net[2](gelu_(self.net[0](x)))
        return out


class Block(nn.Module):
    """Attention within the video, attention to the prompt, feed-forward."""

    def __init__(self, dim: int, heads: int, hidden: int, cross_attn_norm: bool) -> None:
        super().__init__()
        self.hidden = hidden
        self.attn1 = SelfAttention(dim, heads)
        self.attn2 = CrossAttention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, EPS) if cross_attn_norm else nn.Identity()
        self.ffn = FeedForward(dim, hidden)
        self.scale_shift_table = nn.Parameter(torch.empty(1, 6, dim))

    def forward(self, x: torch.Tensor, time: torch.Tensor, layout: Layout) -> torch.Tensor:
        """``[T, D]``, which is overwritten, with the timesteps' ``[J, 6, D]``, to ``[T, D]``."""
        size = chunk_rows(self.hidden, x.device)
        table = modulation(self.scale_shift_table, time, x.dtype)  # shift, scale, gate of attention, of feed-forward

        def before(rows: slice) -> torch.Tensor:
            shift, scale = gather(table[:, :2], layout.job[rows]).unbind(1)
            return self.attn1.project(modulated(x[rows], shift, scale), layout.rotary[rows])

        def between(rows: slice) -> torch.Tensor:
            x[rows].addcmul_(gather(table[:, 2], layout.job[rows]), self.attn1.to_out[0](attended[rows]))
            return self.attn2.query(self.norm2(x[rows]))

        def after(rows: slice) -> torch.Tensor:
            shift, scale, gate = gather(table[:, 3:], layout.job[rows]).unbind(1)
            y = x[rows] + self.attn2.to_out[0](told[rows])
            return torch.addcmul(y, gate, self.ffn(modulated(y, shift, scale)))

        query, key, value = in_chunks(before, len(x), size).unbind(1)
        attended = attention(query, key, value, layout.segments)
        text = in_chunks(lambda rows: self.attn2.key_value(layout.text[rows]), len(layout.text), size)
        key, value = text.index_select(0, layout.text_rows).unbind(1)
        told = attention(in_chunks(between, len(x), size), key, value, layout.text_segments)
        return in_chunks(after, len(x), size)


def modulation(learned: torch.Tensor, time: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A table of shifts, scales and gates, ``[J, parts, D]``; scales are what a row is multiplied with."""
    table = learned.float() + time.float()
    table[:, 1::3] += 1
    return table.to(dtype)


class Transformer(nn.Module):
    """The denoiser over packed sequences.

    Raises:
        NotNative: the config has what is not done here.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        for name, known in KNOWN.items():
            value = list(config[name]) if name == "patch_size" else config[name]
            if value != known:
                raise NotNative(f"its transformer has {name} {value}, which has no native form")
        heads, text_dim = config["num_attention_heads"], config["text_dim"]
        dim = heads * config["attention_head_dim"]
        self.head_dim: int = config["attention_head_dim"]
        self.time_channels: int = config["freq_dim"]
        self.positions: int = config["rope_max_seq_len"]  # along each axis
        self.channels: int = config["in_channels"]
        self.out_channels: int = config["out_channels"] or self.channels
        patch = (1, PATCH, PATCH)
        self.patch_embedding = nn.Conv3d(self.channels, dim, patch, patch)
        self.condition_embedder = nn.ModuleDict(
            {
                "time_embedder": Perceptron(self.time_channels, dim),
                "time_proj": nn.Linear(dim, 6 * dim),
                "text_embedder": nn.ModuleDict({"linear_1": nn.Linear(text_dim, dim), "linear_2": nn.Linear(dim, dim)}),
            }
        )
        layers = config["num_layers"]
        blocks = [Block(dim, heads, config["ffn_dim"], config["cross_attn_norm"]) for _ in range(layers)]
        self.blocks = nn.ModuleList(blocks)
        self.proj_out = nn.Linear(dim, PATCH * PATCH * self.out_channels)
        self.scale_shift_table = nn.Parameter(torch.empty(1, 2, dim))

    def rotary(self, positions: torch.Tensor) -> torch.Tensor:
        """Positions ``[T, 3]`` (frame, row, column) to complex64 ``[T, 1, head_dim / 2]``."""
        side = 2 * (self.head_dim // 6)
        parts = []
        for axis, dim in enumerate((self.head_dim - 2 * side, side, side)):
            frequencies = 1.0 / ROTARY_BASE ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim)
            angles = torch.outer(positions[:, axis].double(), frequencies)
            parts.append(torch.polar(torch.ones_like(angles), angles).to(torch.complex64))
        return torch.cat(parts, dim=-1).unsqueeze(1)

    def embed_text(self, hidden: torch.Tensor) -> torch.Tensor:
        """A text encoder's ``[L, D']`` to ``[L, D]``."""
        layers = self.condition_embedder.get_submodule("text_embedder")
        first, second = layers.get_submodule("linear_1"), layers.get_submodule("linear_2")
        embedded: torch.Tensor = second(gelu_(first(hidden.to(self.proj_out.weight.dtype))))
        return embedded

    def forward(self, latents: torch.Tensor, time: torch.Tensor, layout: Layout) -> torch.Tensor:
        """``[R, C]`` latents and each job's ``[J]`` timestep to ``[R', C]`` velocities."""
        dtype, patches = self.proj_out.weight.dtype, self.patch_embedding
        embedded = self.condition_embedder["time_embedder"](sinusoids(time, self.time_channels).to(dtype))  # [J, D]
        parts = self.condition_embedder["time_proj"](F.silu(embedded)).view(len(time), 6, -1)
        x = F.linear(latents.to(dtype), patches.weight.flatten(1), patches.bias).index_select(0, layout.rows)
        for block in self.blocks:
            x = block(x, parts, layout)
        table = modulation(self.scale_shift_table, embedded[:, None], dtype)
        out = self.proj_out(modulated(x, *gather(table, layout.job).unbind(1)))
        # latents are ordered (channel, row, column) within a token, and what is predicted (row, column, channel)
        velocity: torch.Tensor = out.view(len(out), -1, self.out_channels).transpose(1, 2).flatten(1)
        return velocity
