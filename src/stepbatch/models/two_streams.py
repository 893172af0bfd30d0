"""What families with two streams have in common: rows of text and rows of images have weights of their own.

They meet in attention only. So all text rows lie in one tensor, and all image rows (a picture's, then its references')
in another. Parameter names are those that diffusers has in these families' transformers.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from stepbatch.models.base import PackedSequence
from stepbatch.models.layers import Fusible, RMSNorm
from stepbatch.models.packed import rotate

TIME_CHANNELS = 256
EPS = 1e-6


@dataclass(eq=False)
class Order:
    """Where text and image rows are in the joint sequences, each of which has its text first."""

    text: torch.Tensor  # [Tt] row among T
    image: torch.Tensor  # [Ti]
    text_sequence: torch.Tensor  # [Tt]
    image_sequence: torch.Tensor  # [Ti]
    within_image: torch.Tensor  # [Ti] row of the sequence's image rows

    @classmethod
    def of(cls, text: torch.Tensor, image: torch.Tensor, device: torch.device) -> Order:
        """For sequences with so many rows of text and of images, ``[S]`` each."""
        text_sequence = torch.arange(len(text)).repeat_interleave(text)
        image_sequence = torch.arange(len(image)).repeat_interleave(image)
        text_rows, image_rows = torch.arange(len(text_sequence)), torch.arange(len(image_sequence))
        image_before = image.cumsum(0) - image
        return cls(
            text=(text_rows + image_before[text_sequence]).to(device),
            image=(image_rows + text.cumsum(0)[image_sequence]).to(device),
            text_sequence=text_sequence.to(device),
            image_sequence=image_sequence.to(device),
            within_image=(image_rows - image_before[image_sequence]).to(device),
        )

    def join(self, text: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        """``[Tt, ...]`` and ``[Ti, ...]`` to ``[T, ...]``, sequence after sequence."""
        joint = image.new_empty((len(text) + len(image), *image.shape[1:]))
        return joint.index_copy_(0, self.text, text).index_copy_(0, self.image, image)


def reference_rows(
    sequences: Sequence[PackedSequence], channels: int, device: torch.device
) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
    """All jobs' references, ``[Q, C]``; and by job which rows are theirs, counted on from the last of the latents."""
    of_job = {s.job: s.references for s in sequences}
    at = max(s.latents.stop for s in sequences)
    parts, rows = [torch.empty((0, channels), device=device)], {}
    for job, references in of_job.items():
        count = sum(len(reference.rows) for reference in references)
        rows[job] = torch.arange(at, at + count)
        at += count
        parts += [reference.rows for reference in references]
    return torch.cat(parts), rows


def modulated(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Rows, normed and modulated."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[1:], eps=EPS), scale)


def bounded(x: torch.Tensor) -> torch.Tensor:
    """In half precision some rows outgrow it, and are cut there as they are in diffusers."""
    return x.clip(-65504, 65504) if x.dtype == torch.float16 else x


class Attention(Fusible):
    """The projections before attention, row by row."""

    FUSED: ClassVar[dict[str, tuple[str, ...]]] = {"to_qkv": ("to_q", "to_k", "to_v")}

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.norm_q, self.norm_k = RMSNorm(dim // heads, EPS), RMSNorm(dim // heads, EPS)

    def project(self, x: torch.Tensor, rotary: torch.Tensor) -> torch.Tensor:
        """``[T, D]`` to queries, keys and values, ``[T, 3, heads, head_dim]``."""
        query, key, value = self.joined("to_qkv", x).view(len(x), 3, self.heads, -1).unbind(1)
        return torch.stack((rotate(self.norm_q(query), rotary), rotate(self.norm_k(key), rotary), value), dim=1)


class JointAttention(Attention):
    """The projections around attention, of image rows and of text rows."""

    FUSED: ClassVar = Attention.FUSED | {"to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj")}

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__(dim, heads)
        self.add_q_proj, self.add_k_proj, self.add_v_proj = (nn.Linear(dim, dim) for _ in range(3))
        self.norm_added_q, self.norm_added_k = RMSNorm(dim // heads, EPS), RMSNorm(dim // heads, EPS)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])
        self.to_add_out = nn.Linear(dim, dim)

    def project_text(self, x: torch.Tensor) -> torch.Tensor:
        """As ``project``, for text."""
        query, key, value = self.joined("to_added_qkv", x).view(len(x), 3, self.heads, -1).unbind(1)
        return torch.stack((self.norm_added_q(query), self.norm_added_k(key), value), dim=1)


class FeedForward(nn.Module):
    """The feed-forward of a stream, row by row."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        inner = nn.Sequential(OrderedDict(proj=nn.Linear(dim, 4 * dim), gelu=nn.GELU("tanh")))
        self.net = nn.Sequential(inner, nn.Identity(), nn.Linear(4 * dim, dim))

    def forward(self, x: torch.Tensor, update: torch.Tensor, parts: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Rows ``[T, D]`` after attention and this; ``update`` is attention's, ``parts`` its gate, then all of ours."""
        gate_attention, shift, scale, gate = parts
        x = torch.addcmul(x, gate_attention, update)
        return torch.addcmul(x, gate, self.net(modulated(x, shift, scale)))


class Perceptron(nn.Module):
    """A small network of two layers."""

    def __init__(self, channels: int, dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(channels, dim)
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.linear_2(F.silu(self.linear_1(x)))
        return out
