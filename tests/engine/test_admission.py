"""The door: what is held, in seconds; who is let in."""

from __future__ import annotations

import asyncio
import math
import os
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepbatch.config import AdmissionConfig, BatchingConfig, EngineConfig, ModelConfig
from stepbatch.engine.admission import CORRECTION, FEW, Admission
from stepbatch.engine.client import AsyncEngine
from stepbatch.engine.cost import UNKNOWN, Costs, LinearCost, StepCost
from stepbatch.engine.forecast import lengths
from stepbatch.errors import DeadlineExceeded, Overloaded
from stepbatch.request import GenerationRequest
from stepbatch.testing import FakeRunner

COSTS = Costs(known=True, step=StepCost(host=1.0), decode=LinearCost(each=0.5))
FAKE = ModelConfig(backend="fake", fake_step_ms=20)
INFO = FakeRunner(FAKE).info


def door(
    costs: Costs = COSTS, model: ModelConfig = FAKE, clock: Callable[[], float] = time.monotonic, **bounds: Any
) -> Admission:
    config = EngineConfig(
        model=model,
        batching=BatchingConfig(dynamic_batch_max_size=1, scheduling_policy="fcfs"),
        admission=AdmissionConfig(**bounds),
    )
    admission = Admission(config, clock)
    admission.serve(FakeRunner(model).info, costs)
    return admission


def ask(steps: int = 4, n: int = 1, **fields: Any) -> GenerationRequest:
    return GenerationRequest(prompt="x", num_inference_steps=steps, n=n, **fields).resolve(INFO)


def test_the_backlog_is_what_is_left_of_everything() -> None:
    admission = door()
    admission.admit("a", ask(4), 0.0)
    admission.admit("b", ask(6, n=2), 0.0)
    assert admission.backlog == pytest.approx(4.5 + 2 * 6.5)
    assert admission.waiting == 3
    admission.begin([("a", 0), ("b", 1), ("unknown", 0)])
    admission.advance(("a", 0), 3)
    admission.advance(("b", 1), 6)
    assert admission.backlog == pytest.approx(1.5 + 6.5 + 0.5)
    assert admission.waiting == 1
    admission.restart()
    assert admission.backlog == pytest.approx(4.5 + 2 * 6.5)
    assert admission.waiting == 3
    admission.learn(Costs(known=True, step=StepCost(host=2.0)))
    assert admission.backlog == pytest.approx(2 * 16)
    admission.end([("a", 0), ("b", 0)])
    assert admission.backlog == pytest.approx(2 * 6)
    for _ in range(2):  # as when a request is cancelled in the very unit of work that ends it
        admission.end([("b", 1)])
    assert admission.backlog == 0
    assert admission.waiting == 0


events = st.lists(st.tuples(st.sampled_from(["admit", "begin", "advance", "end", "restart"]), st.integers(0, 5)))


@given(events)
def test_whatever_happens_the_backlog_is_never_less_than_nothing(events: list[tuple[str, int]]) -> None:
    admission, steps, known = door(), dict.fromkeys(range(6), 0), set[int]()
    for event, number in events:
        id = (str(number), 0)
        if event == "admit" and number not in known:
            admission.admit(str(number), ask(5), 0.0)
            known.add(number)
            steps[number] = 0
        elif event == "begin":
            admission.begin([id])
        elif event == "advance" and steps[number] < 5:
            steps[number] += 1
            admission.advance(id, steps[number])
        elif event == "end":
            admission.end([id])
            known.discard(number)
        elif event == "restart":
            admission.restart()
            steps = dict.fromkeys(range(6), 0)
        assert admission.backlog >= -1e-9
        assert 0 <= admission.waiting <= len(known)
        assert admission.backlog == pytest.approx(0) or known


def test_seconds_are_bounded() -> None:
    admission = door(max_queue_seconds=10)
    for name in "abc":  # the last comes when 9 s wait
        admission.admit(name, ask(4), 0.0)
    with pytest.raises(Overloaded, match="14 s waits or runs, and 10 s may") as refused:
        admission.admit("d", ask(1), 0.0)
    assert refused.value.retry_after == 5  # until a tenth of the queue is free
    assert admission.refused == {"queue_seconds": 1, "queue_requests": 0, "deadline": 0}
    admission.end([("a", 0)])
    admission.admit("d", ask(1), 0.0)


def test_an_idle_machine_takes_what_is_longer_than_the_queue() -> None:
    assert door(max_queue_seconds=0).admit("a", ask(1000), 0.0)


@pytest.mark.parametrize("costs", [COSTS, UNKNOWN], ids=["known", "unknown"])
def test_requests_are_bounded_whatever_they_take(costs: Costs) -> None:
    admission = door(costs, max_queue_requests=2, max_queue_seconds=math.inf)
    predicted = [admission.admit(name, ask(), 0.0) for name in "ab"]
    assert all(predicted) == costs.known
    with pytest.raises(Overloaded) as refused:
        admission.check()
    assert refused.value.retry_after == 1
    assert admission.refused["queue_requests"] == 1
    admission.begin([("a", 0)])
    admission.check()


def test_who_is_refused_for_other_reasons_is_told_by_the_queue_too() -> None:
    admission = door(clock=lambda: 0.0)
    assert admission.later() == 1
    for i in range(10):
        admission.admit(str(i), ask(20), 0.0)
    assert admission.later() == math.ceil(0.1 * admission.backlog)
    assert admission.later() > math.ceil(0.1 * admission.backlog)  # one after the other


@pytest.mark.parametrize(("waits", "retry"), [(601.0, 61), (10_000.0, 120)])
def test_when_to_come_again_is_from_1_to_120_seconds(waits: float, retry: int) -> None:
    admission = door()
    admission.backlog = waits
    with pytest.raises(Overloaded) as refused:
        admission.check()
    assert refused.value.retry_after == retry


def test_those_who_are_refused_come_again_one_after_the_other() -> None:
    now = [50.0]
    admission = door(max_queue_seconds=10, clock=lambda: now[0])
    for name in "abc":
        admission.admit(name, ask(4), 0.0)  # 4.5 s each

    def told() -> int | None:
        with pytest.raises(Overloaded) as refused:
            admission.check()
        return refused.value.retry_after

    assert [told() for _ in range(4)] == [5, 9, 14, 18]
    now[0] += 10  # in which the machine would have worked on two of them, and a bit
    assert told() == 13
    many = [told() or 0 for _ in range(1000)]
    assert min(many) == 5
    assert 110 < max(many) <= 120
    assert max(many.count(second) for second in set(many)) < 50
    now[0] += 1000
    assert told() == 5


def test_unless_told_otherwise_pictures_wait_for_ten_minutes_and_videos_for_ever() -> None:
    for model, refuses in ((FAKE, True), (ModelConfig(backend="fake", fake_videos=True), False)):
        admission = door(model=model)
        admission.backlog = 601.0
        if refuses:
            with pytest.raises(Overloaded):
                admission.check()
        else:
            admission.check()


def test_what_can_not_be_met_is_refused() -> None:
    admission = door()
    with pytest.raises(DeadlineExceeded, match=r"takes about 4.5 s even alone, and its timeout is 2 s") as alone:
        admission.admit("a", ask(4, timeout=2.0), 0.0)
    assert (alone.value.param, alone.value.retry_after, alone.value.should_retry) == ("timeout", None, False)
    admission.admit("b", ask(20), 0.0)
    with pytest.raises(Overloaded) as loaded:
        admission.admit("c", ask(4, timeout=10.0), 0.0)
    assert (loaded.value.param, loaded.value.retry_after, loaded.value.should_retry) == ("timeout", 15, True)
    assert admission.admit("d", ask(4, timeout=30.0), 0.0)
    assert admission.refused["deadline"] == 2
    assert admission.waiting == 2


def test_who_may_just_be_in_time_is_told_a_time() -> None:
    admission = door(Costs(known=True, step=StepCost(host=1.0)))
    admission.admit("a", ask(9), 0.0)
    prediction = admission.admit("b", ask(1, timeout=9.5), 0.0)  # 9.1 s at the latest, says the forecast, to begin at 9
    assert prediction is not None
    assert prediction.total < 11
    admission = door(Costs(known=True, step=StepCost(host=0.5)))
    admission.admit("a", ask(19), 0.0)
    prediction = admission.admit("b", ask(2, timeout=10.0), 0.0)  # dropped at 9.1 s in the forecast, before it begins
    assert prediction is not None
    assert (prediction.queue, prediction.total) == (pytest.approx(9.5), pytest.approx(10.5))


def test_steps_are_no_wider_than_there_is_memory_for() -> None:
    costs = Costs(known=True, step=StepCost(streamed=1.0, per_token=1e-6))  # as wide as may be takes no longer
    admission = Admission(EngineConfig(model=FAKE, batching=BatchingConfig(dynamic_batch_max_size=8)))
    admission.serve(INFO, costs)
    for name in "abcdefgh":
        admission.admit(name, ask(4), 0.0)
    assert admission.backlog == pytest.approx(8 * 4 / 8, rel=0.01)
    last = admission.admit("i", ask(4), 0.0)
    assert last is not None
    assert last.total == pytest.approx(8, rel=0.01)  # the second of two rounds
    admission.limit(2 * sum(lengths(ask(4), INFO)))
    assert admission.backlog == pytest.approx(9 * 4 / 2, rel=0.01)
    last = admission.admit("j", ask(4), 0.0)
    assert last is not None
    assert last.total == pytest.approx(20, rel=0.01)


def test_what_was_learned_outlives_a_process_that_knows_nothing() -> None:
    admission = door()
    admission.admit("a", ask(4), 0.0)
    admission.restart()
    admission.serve(INFO, UNKNOWN)
    assert admission.costs == COSTS
    assert admission.backlog == pytest.approx(4.5)
    admission.serve(INFO, Costs(known=True, step=StepCost(host=2.0)))
    assert admission.backlog == pytest.approx(8)


def test_predictions_go_by_how_the_last_turned_out() -> None:
    admission = door()

    def told(number: int) -> float:
        prediction = admission.admit(str(number), ask(4), 0.0)
        assert prediction
        admission.end([(str(number), 0)])
        admission.done(prediction, 1.5 * 4.5)
        return prediction.total

    totals = [told(number) for number in range(3 * FEW)]
    assert totals[:FEW] == pytest.approx([4.5] * FEW)
    assert totals[FEW:] == pytest.approx([1.5 * 4.5] * 2 * FEW)
    for _ in range(100):
        prediction = admission.admit("x", ask(4), 0.0)
        admission.end([("x", 0)])
        admission.done(prediction, 1000.0)
    prediction = admission.admit("x", ask(4), 0.0)
    assert prediction
    assert prediction.total == pytest.approx(CORRECTION * 4.5)


@pytest.mark.anyio
async def test_the_backlog_of_an_engine_follows_it_and_survives_its_death() -> None:
    engine = AsyncEngine(EngineConfig(model=FAKE, batching=BatchingConfig(dynamic_batch_max_size=1)))
    await engine.start()
    try:
        costs = Costs(known=True, step=StepCost(host=0.02))
        engine.admission.learn(costs)
        handles = [engine.submit(GenerationRequest(prompt="x", num_inference_steps=25)) for _ in range(4)]
        whole = engine.admission.backlog
        assert whole == pytest.approx(4 * 25 * 0.02, rel=0.2)
        totals = [handle.predicted.total for handle in handles if handle.predicted]
        assert len(totals) == 4
        assert totals == sorted(totals)
        await handles[0].outputs()
        assert engine.admission.backlog < 0.9 * whole
        assert engine.pid
        os.kill(engine.pid, signal.SIGKILL)
        while engine.ready:
            await asyncio.sleep(0.01)
        assert engine.admission.backlog > 0.6 * whole  # nothing is lost
        for handle in handles:
            assert len(await handle.outputs()) == 1
        assert engine.admission.backlog == 0
        assert engine.restarts == 1
    finally:
        await engine.stop()
