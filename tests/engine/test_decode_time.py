"""Long decodings: how the engine, on a clock that only its work moves, shares time with steps; and who foretells it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepbatch import testing
from stepbatch.bench.simulate.replica import Replica
from stepbatch.config import BatchingConfig, EngineConfig, ModelConfig
from stepbatch.engine import clock as clock_module
from stepbatch.engine import engine as engine_module
from stepbatch.engine.cost import UNKNOWN, Costs, LinearCost, StepCost
from stepbatch.engine.decode_time import SLICE_SECONDS, PredictedDecoding, decode_room
from stepbatch.engine.engine import Engine, Tick
from stepbatch.engine.forecast import Held, predict
from stepbatch.engine.messages import FromEngine, Output, Submit
from stepbatch.engine.meter import Meter
from stepbatch.engine.plan import Plan
from stepbatch.request import GenerationRequest, Job
from stepbatch.testing import FakeRunner

FCFS = BatchingConfig(scheduling_policy="fcfs", max_encodes_per_step=64)


class Clock:
    """Stands in for the module ``time``: nothing takes any but sleeping."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    perf_counter = monotonic

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class Timed(FakeRunner):
    """Remembers when its steps ended."""

    def __init__(self, clock: Clock, costs: Costs) -> None:
        super().__init__(ModelConfig())
        self.step_seconds, self.decode_seconds = costs.step.host, costs.decode.each
        self.ends: list[float] = []
        self._time = clock

    def denoise(self, jobs: Sequence[Job], tick: Tick) -> None:
        super().denoise(jobs, tick)
        self.ends.append(self._time.now)


def costs(step: float, decode: float) -> Costs:
    return Costs(known=True, step=StepCost(host=step), decode=LinearCost(each=decode))


def job(name: str, steps: int, arrival: float = 0.0, signature: str | None = None) -> Job:
    runner = FakeRunner(ModelConfig())
    request = GenerationRequest(prompt="x", num_inference_steps=steps).resolve(runner.info)
    return Job(name, 0, request, runner.lengths(request), arrival, signature=signature)


def engine_run(
    come: Sequence[tuple[float, int]], of: Costs, limits: BatchingConfig = FCFS
) -> tuple[dict[str, float], list[float]]:
    """When the real engine is done with requests that come at these times with so many steps; and when steps ended."""
    clock, ends, waiting = Clock(), dict[str, float](), list(enumerate(come))

    def take(message: FromEngine) -> None:
        if isinstance(message, Output):
            ends[message.request_id] = clock.now

    def poll() -> None:
        while waiting and waiting[0][1][0] <= clock.now:
            number, (arrival, steps) = waiting.pop(0)
            request = GenerationRequest(prompt="x", num_inference_steps=steps)
            engine.submit(Submit(str(number), request, [0], arrival))

    with pytest.MonkeyPatch.context() as patch:
        for module in (engine_module, testing, clock_module):
            patch.setattr(module, "time", clock)
        patch.setattr(Meter, "news", lambda meter: None)  # it would learn what is known already
        runner = Timed(clock, of)
        engine = Engine(runner, EngineConfig(batching=limits), emit=take, poll=poll, costs=of)
        while waiting or not engine.idle:
            poll()
            if engine.idle:
                clock.now = waiting[0][1][0]
            else:
                engine.step()
    return ends, runner.ends


def replica_run(come: Sequence[tuple[float, int]], of: Costs, limits: BatchingConfig, leaps: bool) -> dict[str, float]:
    """The same of the simulated engine."""
    ends = dict[str, float]()
    replica = Replica(limits, of, 1.0, lambda job, now: ends.update({job.request_id: now}), leaps)
    for number, (arrival, steps) in enumerate(come):
        while replica.wake < arrival:
            replica.step()
        replica.take([job(str(number), steps, arrival)], arrival)
    while replica.wake < math.inf:
        replica.step()
    assert abs(replica.busy - sum(of.decode.each for _ in come)) < 1e9
    return ends


GAPS = st.sampled_from([0.0, 0.0101234, 0.1370121, 1.3101432])  # nobody comes in the very moment when a step ends


@given(
    gaps_steps=st.lists(st.tuples(GAPS, st.integers(1, 30)), min_size=1, max_size=8),
    step=st.sampled_from([0.02, 0.2]),
    decode=st.sampled_from([0.003, 0.03, 0.47, 1.93]),
    limits=st.sampled_from([FCFS, replace(FCFS, max_decodes_per_step=3)]),
)
def test_the_simulated_engine_does_what_the_engine_does(
    gaps_steps: list[tuple[float, int]], step: float, decode: float, limits: BatchingConfig
) -> None:
    of, now, come = costs(step, decode), 0.0, []
    for gap, steps in gaps_steps:
        now += gap
        come.append((now, steps))
    real, _ = engine_run(come, of, limits)
    for leaps in (True, False):
        assert replica_run(come, of, limits, leaps) == pytest.approx(real)


@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=8),
    st.sampled_from([0.02, 0.2]),
    st.sampled_from([0.003, 0.03, 0.47, 1.93]),
)
def test_what_is_foretold_is_when_the_engine_is_done(steps: list[int], step: float, decode: float) -> None:
    of = costs(step, decode)
    real, _ = engine_run([(0.0, count) for count in steps], of)
    *others, wanted = [job(str(number), count) for number, count in enumerate(steps)]
    told = predict([wanted], [Held(other) for other in others], of, FCFS, now=0.0)
    assert told.total == pytest.approx(real[wanted.request_id])


def test_a_long_decoding_in_company_stalls_nobody() -> None:
    of = costs(step=0.2, decode=2.0)
    come = [(0.0, 1), (0.0, 40)]
    real, ends = engine_run(come, of)
    assert real["0"] == pytest.approx(0.2 + 2.0 + 4 * 0.2)  # five slices of two steps, with a step between each two
    assert max(late - early for early, late in pairwise(ends)) == pytest.approx(0.6)
    for leaps in (True, False):
        assert replica_run(come, of, FCFS, leaps) == pytest.approx(real)
    for wanted, other in ((0, 1), (1, 0)):
        jobs = [job(str(number), steps) for number, (_, steps) in enumerate(come)]
        told = predict([jobs[wanted]], [Held(jobs[other])], of, FCFS, now=0.0)
        assert told.total == pytest.approx(real[str(wanted)])


def test_many_long_decodings_are_foretold_to_their_end() -> None:
    of = costs(step=0.01, decode=5.0)
    come = [(0.0, 1)] * 16 + [(0.0, 1000)]
    jobs = [job(str(number), steps) for number, (_, steps) in enumerate(come)]
    told = predict([jobs[-1]], [Held(job) for job in jobs[:-1]], of, FCFS, now=0.0)
    assert told.total == pytest.approx(engine_run(come, of)[0]["16"])


def test_how_long_decoding_may_take() -> None:
    long, short, step = [job("a", 1)], [job("b", 1)] * 2, [job("c", 9)]
    assert decode_room(Plan(), costs(0.2, 2.0)) == math.inf
    assert decode_room(Plan(short, [], step), costs(0.1, 0.1)) == math.inf  # both take as long as two steps
    assert decode_room(Plan(short), costs(0.2, 0.05)) == math.inf
    assert decode_room(Plan(long, [], step), costs(0.2, 2.0)) == 0.4
    assert decode_room(Plan(long, [], step), costs(0.02, 2.0)) == SLICE_SECONDS
    assert decode_room(Plan(long), costs(0.2, 2.0)) == SLICE_SECONDS
    assert decode_room(Plan(long, [], step), UNKNOWN, last_step=0.3) == 0.6
    assert decode_room(Plan(long), UNKNOWN, last_step=0.3) == SLICE_SECONDS
    assert decode_room(Plan([job("call", 1, signature="s")], [], step), costs(0.2, 2.0)) == math.inf


@given(st.floats(0.11, 50.0), st.floats(0.1, 5.0), st.integers(1, 20))
def test_slices_at_once_are_as_many_one_by_one(decode: float, step: float, most: int) -> None:
    of, plan = costs(step, decode), Plan([job("a", 1)], [], [job("b", 9)])
    one_by_one, at_once = PredictedDecoding(), PredictedDecoding()
    leap = at_once.go_on(plan, of, most)
    slices = [one_by_one.go_on(plan, of) for _ in range(leap.steps)]
    assert sum(one.seconds for one in slices) == pytest.approx(leap.seconds)
    assert [bool(one.done) for one in slices] == [False] * (leap.steps - 1) + [bool(leap.done)]
    while not leap.done:
        last, leap = leap.seconds, at_once.go_on(plan, of)
        assert leap.seconds <= max(2 * step, SLICE_SECONDS) + 1e-6
        assert last > 0
