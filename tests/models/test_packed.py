import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from stepbatch.models.packed import Segments, attention, chunk_rows, in_chunks, rotate

lengths = st.lists(st.sampled_from([1, 3, 3, 8]), min_size=1, max_size=6)


@given(lengths)
def test_attention_stays_inside_each_sequence(of: list[int]) -> None:
    q, k, v = torch.randn(3, sum(of), 2, 4).unbind(0)
    packed = attention(q, k, v, Segments.of(of))
    alone = [
        F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in parts)).transpose(0, 1).flatten(1)
        for parts in zip(q.split(of), k.split(of), v.split(of), strict=True)
    ]
    torch.testing.assert_close(packed, torch.cat(alone))


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=5))
def test_queries_and_keys_may_differ_in_length(pairs: list[tuple[int, int]]) -> None:
    queries, keys = [q for q, _ in pairs], [k for _, k in pairs]
    q, k, v = torch.randn(sum(queries), 2, 4), torch.randn(sum(keys), 2, 4), torch.randn(sum(keys), 2, 4)
    packed = attention(q, k, v, Segments.of(queries, keys))
    alone = [
        F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in parts)).transpose(0, 1).flatten(1)
        for parts in zip(q.split(queries), k.split(keys), v.split(keys), strict=True)
    ]
    torch.testing.assert_close(packed, torch.cat(alone))


def test_equal_neighbours_make_one_run() -> None:
    assert [run.count for run in Segments.of([4, 4, 4, 6, 6, 4]).runs] == [3, 2, 1]


def test_a_sequence_with_nan_leaves_its_neighbours_alone() -> None:
    q = torch.randn(9, 2, 4)
    q[3:6] = torch.nan
    out = attention(q, q, q, Segments.of([3, 3, 3]))
    assert out[3:6].isnan().all()
    assert out[:3].isfinite().all()
    assert out[6:].isfinite().all()


@given(st.integers(1, 40), st.integers(1, 12))
def test_chunks_cover_each_row_once(rows: int, size: int) -> None:
    seen: list[slice] = []

    def work(part: slice) -> torch.Tensor:
        seen.append(part)
        return torch.arange(rows)[part]

    assert in_chunks(work, rows, size).tolist() == list(range(rows))
    assert all(0 < part.stop - part.start <= size for part in seen)


def test_only_a_cpu_works_in_chunks() -> None:
    assert chunk_rows(10_240, torch.device("cpu")) <= 1024 * torch.get_num_threads()
    assert chunk_rows(10_240, torch.device("cuda")) > 10**9


def test_rotation_keeps_lengths_and_depends_on_distance() -> None:
    x = torch.randn(2, 1, 8)
    angles = torch.arange(6.0)[:, None] * torch.tensor([1.0, 0.5, 0.2, 0.1])
    turns = torch.polar(torch.ones_like(angles), angles).unsqueeze(1)
    torch.testing.assert_close(rotate(x, turns[:2]).norm(), x.norm())
    near = (rotate(x[:1], turns[1:2]) * rotate(x[1:], turns[3:4])).sum()
    far = (rotate(x[:1], turns[3:4]) * rotate(x[1:], turns[5:6])).sum()
    assert near.item() == pytest.approx(far.item(), abs=1e-5)
