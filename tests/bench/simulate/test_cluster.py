"""The clock: theory where there is one, every request's one ending, and leaps that change nothing."""

from __future__ import annotations

import math
import random
from itertools import accumulate
from statistics import fmean
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.bench.simulate.simulated import SERIAL, curve, kind, run

from stepbatch.bench.simulate.cluster import Course
from stepbatch.config import BatchingConfig
from stepbatch.engine import decode_time

NAMES = ("boost", "fcfs", "srpt", "deadline")
POLICIES = st.sampled_from(NAMES)
EIGHTHS = st.integers(0, 24).map(lambda value: value / 8)
GAPS = st.just(0.0) | EIGHTHS
SLACKS = st.none() | EIGHTHS  # of deadlines, over what a request takes alone


def poisson(rate: float, count: int, seed: int) -> list[float]:
    chance = random.Random(seed)
    return list(accumulate(chance.expovariate(rate) for _ in range(count)))


def latencies(course: Course) -> list[float]:
    return [ended - came for came, ended in zip(course.came, course.ended, strict=True)]


@pytest.mark.parametrize("load", [0.5, 0.7])
def test_a_single_server_of_equal_jobs_does_what_theory_says(load: float) -> None:
    of = curve(base=0.0, per_token=1 / 16)  # a step takes a second
    course = run([kind(of, steps=1)] * 6000, poisson(load, 6000, seed=7), of, SERIAL)
    waits = 1 + load / (2 * (1 - load))  # Pollaczek and Khinchine's of an M/D/1 queue
    assert fmean(latencies(course)) == pytest.approx(waits, rel=0.05)
    assert course.busy / course.duration == pytest.approx(load, rel=0.04)
    assert course.widths == {1: 6000}


def test_a_request_alone_takes_what_its_units_take() -> None:
    of = curve(base=0.25, per_token=1 / 256, encode=0.5, decode=0.125)
    course = run([kind(of, steps=8)], [3.0], of)
    assert latencies(course) == [0.5 + 8 * (0.25 + 16 / 256) + 0.125]
    assert course.duration == course.ended[0] and course.busy == latencies(course)[0]


def test_jobs_of_a_request_share_steps_and_its_prompt() -> None:
    of = curve(base=0.25, per_token=1 / 256, encode=0.5, decode=0.125)
    course = run([kind(of, steps=8, n=3)], [0.0], of, BatchingConfig(dynamic_batch_max_size=4, max_batch_tokens=10**9))
    assert course.ended == pytest.approx([0.5 + 8 * (0.25 + 3 * 16 / 256) + 3 * 0.125])
    assert course.widths == {3: 8}


def test_what_comes_during_a_leap_joins_at_the_end_of_that_step() -> None:
    of = curve(base=0.0, per_token=1 / 16)
    both = BatchingConfig(dynamic_batch_max_size=2, max_batch_tokens=10**9)
    course = run([kind(of, steps=4), kind(of, steps=1)], [0.0, 1.5], of, both)
    assert course.ended == [6.0 - 1.0, 4.0]  # alone for two seconds, together for a step of two, alone again
    assert course.widths == {1: 3, 2: 1}


def test_as_many_are_there_as_there_are_places() -> None:
    of = curve(base=0.0, per_token=1 / 16)
    course = run([kind(of, steps=2)] * 6, None, of, SERIAL, concurrency=2)
    assert course.came == [0.0, 0.0, 2.0, 4.0, 6.0, 8.0]
    assert course.ended == [2.0, 4.0, 6.0, 8.0, 10.0, 12.0]


def test_what_finds_too_much_work_is_refused() -> None:
    of = curve(base=0.0, per_token=1 / 16)  # of pace 1: a token's work is its seconds
    course = run([kind(of, steps=4)] * 5, [0.0, 0.5, 1.0, 1.5, 20.0], of, SERIAL, max_queue_seconds=5.0)
    assert course.refused == 2
    assert [math.isnan(ended) for ended in course.ended] == [False, False, True, True, False]
    assert course.ended[:2] == [4.0, 8.0]


def test_what_cannot_be_on_time_is_dropped_before_it_begins() -> None:
    of = curve(base=0.0, per_token=1 / 16)
    patient, hasty = kind(of, steps=10), kind(of, steps=2, timeout=5.0)
    course = run([patient, hasty, patient], [0.0, 1.0, 2.0], of, SERIAL)
    assert course.dropped == 1 and math.isnan(course.ended[1])
    assert course.ended[2] == 20.0


def test_who_becomes_late_in_company_goes_last_in_a_leap_too() -> None:
    of = curve(base=0.0, per_token=1 / 16)  # a step takes a second alone, and two with two jobs
    both = BatchingConfig(scheduling_policy="deadline", dynamic_batch_max_size=2, max_batch_tokens=10**9)
    kinds = [kind(of, steps=steps, timeout=timeout) for steps, timeout in ((4, 6.0), (4, 7.0), (1, 12.0))]
    for leaps in (True, False):
        course = run(kinds, [0.0, 0.0, 0.0], of, both, leaps=leaps)
        assert course.ended == [9.0, 8.0, 8.0]  # after three steps the first can't be on time any more


@pytest.mark.parametrize("policy", NAMES)
@settings(max_examples=60)
@given(
    width=st.sampled_from((None, 1, 3)),
    requests=st.lists(
        st.tuples(GAPS, st.integers(1, 6), st.sampled_from((32, 64)), st.integers(1, 2), SLACKS), max_size=14
    ),
    base=st.sampled_from((0.25, 0.0)),
    replicas=st.integers(1, 2),
    encode=st.sampled_from((0.0, 0.25)),
    decode=st.sampled_from((0.0, 0.125, 1.75)),
)
def test_leaps_change_nothing(
    policy: Literal["boost", "fcfs", "srpt", "deadline"],
    width: int | None,
    requests: list[tuple[float, int, int, int, float | None]],
    base: float,
    replicas: int,
    encode: float,
    decode: float,
) -> None:
    of = curve(base, 1 / 64, encode, decode)
    tokens = None if width is None else 10**9
    limits = BatchingConfig(
        scheduling_policy=policy, ageing=0.25, dynamic_batch_max_size=width, max_batch_tokens=tokens
    )
    kinds = []
    for _, steps, side, n, slack in requests:
        alone = kind(of, steps=steps, side=side).alone(of.costs)
        kinds.append(kind(of, steps=steps, side=side, n=n, timeout=None if slack is None else alone + slack))
    times = list(accumulate(gap for gap, *_ in requests))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode_time, "SLICE_SECONDS", 0.125)  # adds up without rounding
        leapt, stepped = (run(kinds, times, of, limits, leaps=leaps, replicas=replicas) for leaps in (True, False))
    assert str(leapt.ended) == str(stepped.ended)  # as text, where nan is nan
    assert (leapt.dropped, leapt.widths, leapt.busy) == (stepped.dropped, stepped.widths, stepped.busy)


@given(
    policy=POLICIES,
    routing=st.sampled_from(("round-robin", "least-work", "two-choices")),
    replicas=st.integers(1, 4),
    most=st.sampled_from((math.inf, 1.0)),
    timeout=st.sampled_from((None, 1.5)),
    seed=st.integers(0, 1000),
    open_loop=st.booleans(),
)
def test_every_request_ends_once(
    policy: Literal["boost", "fcfs", "srpt", "deadline"],
    routing: str,
    replicas: int,
    most: float,
    timeout: float | None,
    seed: int,
    open_loop: bool,
) -> None:
    of, chance = curve(encode=0.1, decode=0.05), random.Random(seed)
    kinds = [kind(of, steps=chance.randint(1, 9), n=chance.randint(1, 3), timeout=timeout) for _ in range(40)]
    times = poisson(4.0 * replicas, 40, seed) if open_loop else None
    limits = BatchingConfig(scheduling_policy=policy)
    fleet = {"routing": routing, "replicas": replicas, "max_queue_seconds": most if open_loop else math.inf}
    course = run(kinds, times, of, limits, concurrency=0 if open_loop else 7, seed=seed, **fleet)
    finished = [i for i, ended in enumerate(course.ended) if not math.isnan(ended)]
    assert len(finished) + course.refused + course.dropped == 40
    assert all(
        course.ended[i] - course.came[i] >= kinds[i].alone(of.costs) - 1e-9 for i in finished if kinds[i].request.n == 1
    )
    assert course.busy <= replicas * course.duration + 1e-9


def test_a_seed_fixes_everything() -> None:
    of = curve(decode=0.05)
    kinds = [kind(of, steps=1 + i % 7) for i in range(300)]
    times = poisson(6.0, 300, seed=3)
    first, second, other = (run(kinds, times, of, replicas=5, routing="two-choices", seed=seed) for seed in (1, 1, 2))
    assert first.ended == second.ended and first.widths == second.widths
    assert first.ended != other.ended


def test_least_work_beats_two_choices_beats_turns() -> None:
    of = curve(base=0.0, per_token=1 / 16)
    chance = random.Random(5)
    kinds = [kind(of, steps=chance.choice((1, 1, 1, 9))) for _ in range(4000)]
    times = poisson(0.8 * 8 / 3, 4000, seed=5)
    means = [
        fmean(latencies(run(kinds, times, of, SERIAL, replicas=8, routing=routing)))
        for routing in ("least-work", "two-choices", "round-robin")
    ]
    assert means[0] < 0.9 * means[1] and means[1] < 0.95 * means[2]
