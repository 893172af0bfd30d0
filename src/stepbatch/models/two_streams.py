"""What families with two streams have in common: rows of text and rows of images have weights of their own.

They meet in attention only. So all text rows lie in one tensor, and all image rows (a picture's, then its references')
in another. Parameter names are those that diffusers has in these families' transformers.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from stepbatch.models.base import PackedSequence
from stepbatch.models.layers import Fusible, RMSNorm, gelu_
from stepbatch.models.packed import Segments, attention, chunk_rows, gather, in_chunks, rotate

TIME_CHANNELS = 256
EPS = 1e-6


@dataclass(eq=False)
class Order:
    """Where the rows of a batch's sequences are: in the two streams, and joined, each sequence with its text first."""

    text: torch.Tensor  # [Tt] row among T
    image: torch.Tensor  # [Ti]
    text_sequence: torch.Tensor  # [Tt]
    image_sequence: torch.Tensor  # [Ti]
    pictures: torch.Tensor  # [R'] the rows among Ti that are denoised
    sources: torch.Tensor  # [Ti] row of the latents and then the references
    references: torch.Tensor  # fp32 [Q, C], each job's once
    segments: Segments  # of the joint sequences

    @classmethod
    def of(cls, sequences: Sequence[PackedSequence], channels: int, device: torch.device) -> Order:
        """For these, whose pictures and references have so many ``channels``."""
        of_job = {s.job: s.references for s in sequences}
        at = max(s.latents.stop for s in sequences)
        references, rows_of_job = [torch.empty((0, channels), device=device)], {}
        for job, members in of_job.items():
            count = sum(len(reference.rows) for reference in members)
            rows_of_job[job] = torch.arange(at, at + count)
            at += count
            references += [reference.rows for reference in members]
        sources = [(torch.arange(s.latents.start, s.latents.stop), rows_of_job[s.job]) for s in sequences]
        text = torch.tensor([len(s.prompt.rows) for s in sequences])
        image = torch.tensor([len(picture) + len(others) for picture, others in sources])
        text_sequence = torch.arange(len(text)).repeat_interleave(text)
        image_sequence = torch.arange(len(image)).repeat_interleave(image)
        text_rows, image_rows = torch.arange(len(text_sequence)), torch.arange(len(image_sequence))
        image_before = image.cumsum(0) - image
        pictures = [begin + torch.arange(len(own)) for begin, (own, _) in zip(image_before, sources, strict=True)]
        return cls(
            text=(text_rows + image_before[text_sequence]).to(device),
            image=(image_rows + text.cumsum(0)[image_sequence]).to(device),
            text_sequence=text_sequence.to(device),
            image_sequence=image_sequence.to(device),
            pictures=torch.cat(pictures).to(device),
            sources=torch.cat([rows for both in sources for rows in both]).to(device),
            references=torch.cat(references),
            segments=Segments.of((text + image).tolist()),
        )

    def join(self, text: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        """``[Tt, ...]`` and ``[Ti, ...]`` to ``[T, ...]``, sequence after sequence."""
        joint = image.new_empty((len(text) + len(image), *image.shape[1:]))
        return joint.index_copy_(0, self.text, text).index_copy_(0, self.image, image)


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

    def project(self, x: torch.Tensor, rotary: torch.Tensor | None) -> torch.Tensor:
        """``[T, D]`` to queries, keys and values, ``[T, 3, heads, head_dim]``."""
        return self._turned("to_qkv", x, rotary, self.norm_q, self.norm_k)

    def _turned(
        self, layers: str, x: torch.Tensor, rotary: torch.Tensor | None, norm_query: RMSNorm, norm_key: RMSNorm
    ) -> torch.Tensor:
        joined = self.joined(layers, x).view(len(x), 3, self.heads, -1)
        for part, norm in ((0, norm_query), (1, norm_key)):
            normed = norm(joined[:, part])
            joined[:, part] = normed if rotary is None else rotate(normed, rotary)
        return joined


class JointAttention(Attention):
    """The projections around attention, of image rows and of text rows."""

    FUSED: ClassVar = Attention.FUSED | {"to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj")}

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__(dim, heads)
        self.add_q_proj, self.add_k_proj, self.add_v_proj = (nn.Linear(dim, dim) for _ in range(3))
        self.norm_added_q, self.norm_added_k = RMSNorm(dim // heads, EPS), RMSNorm(dim // heads, EPS)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])
        self.to_add_out = nn.Linear(dim, dim)

    def project_text(self, x: torch.Tensor, rotary: torch.Tensor | None) -> torch.Tensor:
        """As ``project``, for text, which has no positions in some families."""
        return self._turned("to_added_qkv", x, rotary, self.norm_added_q, self.norm_added_k)


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
        proj, out = self.net.get_submodule("0.proj"), self.net.get_submodule("2")
        return torch.addcmul(x, gate, out(gelu_(proj(modulated(x, shift, scale)))))


class Perceptron(nn.Module):
    """A small network of two layers."""

    def __init__(self, channels: int, dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(channels, dim)
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.linear_2(F.silu(self.linear_1(x)))
        return out


@dataclass(eq=False)
class Stream:
    """The rows of one stream, and what a block modulates and feeds them forward with."""

    x: torch.Tensor  # [T, D]
    table: torch.Tensor  # [S, 6, D]: shift, scale and gate of attention, then of feed-forward
    index: torch.Tensor  # [T] row of the table
    rotary: torch.Tensor | None  # complex64 [T, 1, head_dim / 2]; none where nothing turns
    feed_forward: FeedForward

    def before(self, project: Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor], size: int) -> torch.Tensor:
        """Queries, keys and values, ``[T, 3, heads, head_dim]``, of ``size`` rows at once."""

        def work(rows: slice) -> torch.Tensor:
            shift, scale = gather(self.table[:, :2], self.index[rows]).unbind(1)
            x = modulated(self.x[rows], shift, scale)
            return project(x, None if self.rotary is None else self.rotary[rows])

        return in_chunks(work, len(self.x), size)

    def after(self, attended: torch.Tensor, joint: torch.Tensor, out: nn.Module, size: int) -> torch.Tensor:
        """``[T, D]``, with what attention made of the joint sequences, in which ``joint`` says where each row is."""

        def work(rows: slice) -> torch.Tensor:
            update = out(attended.index_select(0, joint[rows]))
            parts = gather(self.table[:, 2:], self.index[rows]).unbind(1)
            fed: torch.Tensor = self.feed_forward(self.x[rows], update, parts)
            return fed

        return in_chunks(work, len(self.x), size)


def meet(
    attn: JointAttention, text: Stream, image: Stream, order: Order, is_last: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both streams' rows after a block; after the last nothing looks at text, and its rows are as they came."""
    size = chunk_rows(4 * image.x.shape[1], image.x.device)
    joint = order.join(text.before(attn.project_text, size), image.before(attn.project, size))
    query, key, value = joint.unbind(1)
    attended = attention(query, key, value, order.segments)
    words = text.x if is_last else text.after(attended, order.text, attn.to_add_out, size)
    return words, image.after(attended, order.image, attn.to_out[0], size)
