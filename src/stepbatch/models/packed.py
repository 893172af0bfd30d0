"""Ragged tensors: the tokens of all sequences lie end to end in one ``[T, D]``; nothing is padded.

Everything row-wise (linear layers, norms, modulation, rotary embedding) sees one tall matrix; only attention knows
where one sequence ends.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

import torch
from torch.nn import functional as F

CACHE_BYTES = 1 << 20  # a CPU core's second-level cache
MIN_CHUNK_ROWS = 1024  # below this, reading the weights again costs more than the cache saves


@dataclass(frozen=True)
class Run:
    """Neighbouring sequences of the same lengths, which attend in one dense call."""

    count: int
    queries: slice  # rows of the packed queries
    keys: slice  # rows of the packed keys and values


@dataclass(frozen=True)
class Segments:
    """Where each sequence lies, as runs. Sequences sorted by length make few runs."""

    runs: tuple[Run, ...]

    @classmethod
    def of(cls, query_lengths: Sequence[int], key_lengths: Sequence[int] | None = None) -> Segments:
        """Segments of the sequences in packed order; keys differ from queries where a family cross-attends."""
        pairs = list(zip(query_lengths, query_lengths if key_lengths is None else key_lengths, strict=True))
        runs, query, key = [], 0, 0
        for (query_length, key_length), members in groupby(pairs):
            count = len(list(members))
            after_query, after_key = query + count * query_length, key + count * key_length
            runs.append(Run(count, slice(query, after_query), slice(key, after_key)))
            query, key = after_query, after_key
        return cls(tuple(runs))


def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Segments) -> torch.Tensor:
    """Attention inside each sequence.

    Args:
        query: ``[Tq, heads, head_dim]``.
        key: ``[Tk, heads, head_dim]``.
        value: ``[Tk, heads, head_dim]``.
        segments: Which rows belong together.

    Returns:
        ``[Tq, heads * head_dim]``.
    """
    parts = [
        F.scaled_dot_product_attention(
            _heads_first(query[run.queries], run.count),
            _heads_first(key[run.keys], run.count),
            _heads_first(value[run.keys], run.count),
        )
        .transpose(1, 2)
        .reshape(-1, query.shape[1] * query.shape[2])
        for run in segments.runs
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _heads_first(rows: torch.Tensor, count: int) -> torch.Tensor:
    # [count * L, heads, head_dim] -> [count, heads, L, head_dim]
    heads = rows.view(count, -1, *rows.shape[1:]).transpose(1, 2)
    return heads.contiguous() if heads.device.type == "cpu" else heads  # there a head's rows are best side by side


def rotate(x: torch.Tensor, rotary: torch.Tensor) -> torch.Tensor:
    """Apply rotary position embedding to adjacent pairs of channels.

    Args:
        x: ``[T, heads, head_dim]``.
        rotary: complex64 ``[T, 1, head_dim / 2]``, a row per token.

    Returns:
        ``[T, heads, head_dim]`` in the type of ``x``.
    """
    pairs = torch.view_as_complex(x.float().view(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * rotary).view(x.shape).to(x.dtype)


def gather(table: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """The rows of a small ``[S, ...]`` table for tokens, ``[T, ...]``; ``[1, ...]`` where all of them have the same.

    One row is broadcast for nothing, but whether it is one can't be asked of another device without waiting for it.
    """
    if len(table) == 1:
        return table
    if index.device.type == "cpu" and bool((index == index[0]).all()):
        return table[index[0]].unsqueeze(0)
    return table.index_select(0, index)


def chunk_rows(width: int, device: torch.device) -> int:
    """How many rows row-wise work takes at once, where a row's widest activation has ``width`` numbers.

    On a CPU a taller matrix leaves the cache and every row of it gets slower, so that a wider step would cost more than
    its parts; elsewhere there is one chunk.
    """
    if device.type != "cpu":
        return 1 << 62
    return torch.get_num_threads() * max(MIN_CHUNK_ROWS, CACHE_BYTES // (4 * width))  # the threads share a chunk


def in_chunks(work: Callable[[slice], torch.Tensor], rows: int, size: int) -> torch.Tensor:
    """Call ``work`` on slices of at most ``size`` of the ``rows``, about equally long, and join what it returns."""
    if rows <= size:
        return work(slice(0, rows))
    count = -(-rows // size)
    bounds = [rows * i // count for i in range(count + 1)]
    return torch.cat([work(slice(a, b)) for a, b in pairwise(bounds)])
