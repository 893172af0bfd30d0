"""Predictions against the scheduler itself, run step by step to the end on a clock that goes by the same costs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import cache
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepbatch.config import BatchingConfig, ModelConfig
from stepbatch.engine.cost import Costs, LinearCost, StepCost
from stepbatch.engine.forecast import Held, Prediction, left, lengths, predict
from stepbatch.engine.scheduler import Scheduler
from stepbatch.engine.width import paces
from stepbatch.request import GenerationRequest, Job, JobState
from stepbatch.testing import FakeRunner

INFO = FakeRunner(ModelConfig()).info
COSTS = Costs(
    known=True,
    step=StepCost(host=0.01, per_token=1e-4, per_square=1e-8),
    prompt=LinearCost(each=0.004),
    decode=LinearCost(each=0.005, per_unit=1e-7),
)
DECAY = 0.1  # of the policy that goes by it
SERIAL = Costs(known=True, step=StepCost(per_token=1e-3))  # nothing is shared, so no step is wide


@cache
def asked(**fields: Any) -> tuple[GenerationRequest, tuple[int, ...]]:
    """A request and the lengths of its sequences; thousands differ in nothing else than when they came."""
    request = GenerationRequest(prompt="x", **fields).resolve(INFO)
    return request, lengths(request, INFO)


def job(name: str, steps: int = 4, size: int = 64, arrival: float = 0.0, n: int = 1, **fields: Any) -> Job:
    request, rows = asked(width=size, height=size, num_inference_steps=steps, n=n, **fields)
    return Job(name, 0, request, rows, arrival)


def held(jobs: Sequence[Job], costs: Costs, limits: BatchingConfig) -> list[Held]:
    pace = paces(costs.step, limits)
    return [Held(job, left=left(job, False, costs, pace(job.tokens, job.squares))) for job in jobs]


def truth(jobs: Sequence[Job], wanted: str, costs: Costs, limits: BatchingConfig, running: bool = False) -> Prediction:
    """When this job begins and is done if every single step is gone through; on a clock that is 0 now.

    With ``running``, the others are encoded already.
    """
    scheduler, now, begun = Scheduler(limits, costs, DECAY), 0.0, -1.0
    for one in jobs:
        scheduler.add(one, now)
        if running and one.request_id != wanted:
            one.state = JobState.RUNNING
    while True:
        plan = scheduler.schedule(now)
        assert plan
        now += sum(costs.decode.of(one.request.pixels) for one in plan.decode)
        if wanted in [one.request_id for one in scheduler.finish(plan.decode)]:
            return Prediction(begun, now)
        if wanted in [one.request_id for one in plan.encode]:
            begun = now
        now += sum(costs.encode_of(one) for one in plan.encode)
        for one in plan.encode:
            one.to(JobState.RUNNING)
        if plan.denoise:
            now += costs.step.seconds(sum(o.tokens for o in plan.denoise), sum(o.squares for o in plan.denoise))
            scheduler.advance(plan.denoise, now)


def test_alone_it_is_the_sum_of_its_parts() -> None:
    one = job("a", steps=7, guidance_scale=2.0)
    step = COSTS.step.seconds(one.tokens, one.squares)
    expected = 0.004 + 7 * step + COSTS.decode.of(64 * 64)  # the empty negative prompt is encoded once and for all
    prediction = predict([one], [], COSTS, BatchingConfig(), now=0.0)
    assert prediction.queue == 0
    assert prediction.total == pytest.approx(expected)


def test_several_outputs_are_one_prediction_and_one_encoding() -> None:
    request = job("a", n=3).request
    jobs = [Job("a", index, request, lengths(request, INFO), 0.0) for index in range(3)]
    together = predict(jobs, [], SERIAL, BatchingConfig(dynamic_batch_max_size=1), now=0.0)
    alone = predict(jobs[:1], [], SERIAL, BatchingConfig(dynamic_batch_max_size=1), now=0.0)
    assert together.total == pytest.approx(3 * alone.total)
    assert together.queue == pytest.approx(2 * alone.total)


sizes = st.tuples(st.integers(1, 20), st.sampled_from([32, 64, 128, 256]))


@given(st.lists(sizes, max_size=20), sizes, st.sampled_from(["fcfs", "deadline"]), st.sampled_from([None, 1, 3]))
def test_few_are_followed_exactly(
    others: list[tuple[int, int]], own: tuple[int, int], policy: Literal["fcfs", "deadline"], widest: int | None
) -> None:
    limits = BatchingConfig(scheduling_policy=policy, dynamic_batch_max_size=widest)

    def jobs() -> list[Job]:
        return [job(str(i), *of, arrival=-1.0 + i / 100) for i, of in enumerate(others)]

    wanted = job("wanted", *own)
    real = truth([*jobs(), job("wanted", *own)], "wanted", COSTS, limits, running=True)
    told = predict([wanted], [Held(job, begun=True) for job in jobs()], COSTS, limits, now=0.0)
    assert told.queue == pytest.approx(real.queue)
    assert told.total == pytest.approx(real.total)
    assert wanted.state is JobState.WAITING  # it is looked at only


@pytest.mark.parametrize("costs", [COSTS, SERIAL], ids=["shared", "serial"])
@pytest.mark.parametrize("count", [40, 200])
@pytest.mark.parametrize("policy", ["boost", "srpt"])
def test_many_are_told_nearly(count: int, costs: Costs, policy: Literal["boost", "srpt"]) -> None:
    def jobs() -> list[Job]:
        return [job(str(i), (8, 28, 50)[i * 7 % 3], (64, 128)[i % 2], arrival=-2 + i / count) for i in range(count)]

    limits = BatchingConfig(scheduling_policy=policy)
    real = truth([*jobs(), job("wanted", 28)], "wanted", costs, limits)
    told = predict([job("wanted", 28)], held(jobs(), costs, limits), costs, limits, 0.0, DECAY)
    assert told.total == pytest.approx(real.total, rel=0.1)


def test_what_has_begun_takes_only_what_is_left() -> None:
    limits = BatchingConfig(dynamic_batch_max_size=1)
    begun = Held(job("a", steps=10, arrival=-1.0), begun=True)
    begun.job.step = 8
    done = Held(job("b", steps=3, arrival=-2.0), begun=True)
    done.job.step = 3  # but for its decoding
    step = COSTS.step.seconds(begun.job.tokens, begun.job.squares)
    decode = COSTS.decode.of(64 * 64)
    told = predict([job("c")], [done, begun], COSTS, limits, now=0.0)
    assert told.queue == pytest.approx(2 * step + 2 * decode)
    pace = paces(COSTS.step, limits)(begun.job.tokens, begun.job.squares)
    assert left(begun.job, True, COSTS, pace) == pytest.approx(2 * step + decode)


@pytest.mark.parametrize("count", [10, 300])
def test_the_policy_counts(count: int) -> None:
    deadline = BatchingConfig(scheduling_policy="deadline", dynamic_batch_max_size=1)
    others = held([job(str(i), steps=50, arrival=-1.0) for i in range(count)], SERIAL, deadline)
    first, last = (
        predict([job("x", priority=priority)], others, SERIAL, deadline, now=0.0).total for priority in (1, 0)
    )
    assert first < 0.1 * last


@pytest.mark.parametrize("count", [20, 300])
def test_with_fair_shares_nobody_is_behind_all_of_anothers(count: int) -> None:
    limits = BatchingConfig(fair_shares=True, dynamic_batch_max_size=1)
    others = held([job(str(i), arrival=-1.0, user="flood") for i in range(count)], SERIAL, limits)
    other, same = (predict([job("x", user=user)], others, SERIAL, limits, now=0.0).total for user in ("one", "flood"))
    assert other < 0.2 * same


def test_what_would_be_dropped_on_the_way_never_is_done() -> None:
    limits = BatchingConfig(scheduling_policy="fcfs", dynamic_batch_max_size=1)
    others = held([job(str(i), steps=50, arrival=-1.0) for i in range(5)], SERIAL, limits)
    assert predict([job("x", timeout=1.0)], others, SERIAL, limits, now=0.0).total == float("inf")
    assert predict([job("x", timeout=1000.0)], others, SERIAL, limits, now=0.0).total < 1000


def test_a_whole_call_under_way_is_waited_for() -> None:
    limits = BatchingConfig(dynamic_batch_max_size=8)

    def call(name: str, steps: int) -> Job:
        one = job(name, steps=steps)
        one.signature = steps
        return one

    running = [Held(call("a", 20), begun=True), Held(call("b", 20), begun=True)]
    for one in running:
        one.job.step = 5
    told = predict([call("c", 4)], running, SERIAL, limits, now=0.0)
    tokens = running[0].job.tokens
    assert told.queue == pytest.approx(15 * 2 * tokens * 1e-3)
    assert told.total == pytest.approx(told.queue + 4 * tokens * 1e-3)


@pytest.mark.parametrize("policy", ["boost", "fcfs", "srpt", "deadline"])
def test_a_long_queue_takes_no_long_look(policy: Literal["boost", "fcfs", "srpt", "deadline"]) -> None:
    limits = BatchingConfig(scheduling_policy=policy)
    jobs = [job(str(i), 1 + i % 50, arrival=-1.0 + i / 10_000) for i in range(10_000)]
    others = held(jobs, COSTS, limits)
    began = time.process_time()
    predict([job("x")], others, COSTS, limits, 0.0, DECAY)
    assert time.process_time() - began < 0.2
