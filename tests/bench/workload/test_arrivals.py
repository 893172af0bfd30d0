"""When requests are sent: in order, the same every time, at the rate and as bursty as asked for."""

from __future__ import annotations

import itertools
import math
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stepbatch.bench.options import DatasetOptions, LoadOptions, RequestOptions
from stepbatch.bench.workload.arrivals import schedule
from stepbatch.bench.workload.work import WorkItem, build

RATES = st.floats(1e-6, 1e6)
BURSTINESS = st.floats(1e-3, 1e3)
SEEDS = st.integers(0, 2**63 - 1)


def items(count: int) -> list[WorkItem]:
    return [WorkItem(prompt="a fox")] * count


@given(st.integers(0, 60), RATES, BURSTINESS, SEEDS)
def test_times_are_in_order_and_the_same_every_time(count: int, rate: float, burstiness: float, seed: int) -> None:
    load = LoadOptions(request_rate=rate, burstiness=burstiness)
    times = schedule(items(count), load, seed)
    assert times is not None and len(times) == count
    assert times[:1] == [0.0] * min(count, 1)
    assert times == sorted(times)
    assert all(math.isfinite(time) and time >= 0 for time in times)
    assert times == schedule(items(count), load, seed)


@settings(max_examples=25)
@given(RATES, st.floats(0.1, 100), SEEDS)
def test_gaps_have_the_mean_and_the_spread_asked_for(rate: float, burstiness: float, seed: int) -> None:
    times = schedule(items(4001), LoadOptions(request_rate=rate, burstiness=burstiness), seed)
    assert times is not None
    gaps = [(later - earlier) * rate for earlier, later in itertools.pairwise(times)]
    spread = 1 / math.sqrt(burstiness)
    assert statistics.fmean(gaps) == pytest.approx(1)
    assert statistics.pstdev(gaps) == pytest.approx(spread, rel=0.35)


@given(st.integers(2, 30), RATES, st.floats(0.1, 100), SEEDS)
def test_few_requests_come_at_the_rate_asked_for_too(count: int, rate: float, burstiness: float, seed: int) -> None:
    times = schedule(items(count), LoadOptions(request_rate=rate, burstiness=burstiness), seed)
    assert times is not None
    assert times[-1] == pytest.approx((count - 1) / rate)


def test_gaps_too_small_for_a_float_are_times_all_the_same() -> None:
    for seed in range(500):  # a gap of this shape is often 0, and sometimes one whose inverse is infinite
        assert schedule(items(2), LoadOptions(request_rate=4, burstiness=1e-3), seed) in ([0.0, 0.25], [0.0, 0.0])


def test_seeds_differ() -> None:
    load = LoadOptions(request_rate=2)
    assert schedule(items(5), load, 0) != schedule(items(5), load, 1)


def test_times_are_the_same_on_every_machine() -> None:
    assert schedule(items(4), LoadOptions(request_rate=2), 0) == pytest.approx([0.0, 0.5789473682, 0.7641511360, 1.5])


def test_a_very_steady_load_comes_in_even_steps() -> None:
    times = schedule(items(5), LoadOptions(request_rate=4, burstiness=1e9), 0)
    assert times == pytest.approx([0, 0.25, 0.5, 0.75, 1], abs=1e-3)


def test_without_a_rate_each_is_sent_as_soon_as_it_may_be() -> None:
    assert schedule(items(3), LoadOptions(), 0) is None
    assert schedule([], LoadOptions(), 0) is None


def test_a_trace_says_when_unless_a_rate_does() -> None:
    trace = [WorkItem(prompt="a fox", timestamp=time) for time in (0.0, 0.5, 7.0)]
    assert schedule(trace, LoadOptions(), 3) == [0.0, 0.5, 7.0]
    load = LoadOptions(request_rate=5)
    assert schedule(trace, load, 3) == schedule(items(3), load, 3)


def test_no_profile_goes_with_longer_gaps() -> None:
    config = '[{"num_inference_steps": 1}, {"num_inference_steps": 2}]'
    for seed in range(3):
        work = build(
            DatasetOptions(dataset="random", num_prompts=2000, seed=seed), RequestOptions(random_request_config=config)
        )
        times = schedule(work, LoadOptions(request_rate=1), seed)
        assert times is not None
        gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
        long = [gap for gap, item in zip(gaps, work[1:], strict=True) if item.num_inference_steps == 2]
        assert statistics.fmean(long) == pytest.approx(1, abs=0.2)
        long = [gap for gap, item in zip(gaps, work[:-1], strict=True) if item.num_inference_steps == 2]
        assert statistics.fmean(long) == pytest.approx(1, abs=0.2)
