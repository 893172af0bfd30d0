import msgspec
import pytest

from stepbatch.config import EngineConfig, ModelConfig
from stepbatch.engine.clock import DeviceClock, Moment
from stepbatch.engine.cost import UNKNOWN, Costs, LinearCost, StepCost
from stepbatch.engine.engine import Engine
from stepbatch.engine.messages import FromEngine, Learned, Submit, Unit
from stepbatch.engine.meter import DOUBT, FIRST_SECONDS, LEAST_SECONDS, Encoded, Meter
from stepbatch.request import GenerationRequest, Job
from stepbatch.testing import FakeRunner

RUNNER = FakeRunner(ModelConfig(backend="fake"))
KNOWN = Costs(known=True, step=StepCost(base=3.0, per_token=0.01), decode=LinearCost(each=5.0))


class Clock(DeviceClock):
    """Is where it is put."""

    now = 0.0

    def mark(self) -> Moment:
        return self.now

    def passed(self, moment: Moment) -> bool:
        assert isinstance(moment, float)
        return moment <= self.now


def job(side: int = 64, steps: int = 4, name: str = "a") -> Job:
    request = GenerationRequest(prompt="x", width=side, height=side, num_inference_steps=steps).resolve(RUNNER.info)
    return Job(name, 0, request, RUNNER.lengths(request), 0.0)


def work(meter: Meter, clock: Clock, kind: str, jobs: list[Job], seconds: float) -> None:
    meter.begin()
    clock.now += seconds
    meter.done(kind, jobs, seconds)


def test_while_nothing_is_known_a_unit_may_take_long() -> None:
    clock = Clock()
    meter = Meter(clock, UNKNOWN, whole_calls=False)
    assert meter.expected("denoise", [job()]) == FIRST_SECONDS
    work(meter, clock, "denoise", [job()], 2.0)
    assert meter.expected("denoise", [job()]) == 2.0
    work(meter, clock, "denoise", [job()], 1.0)
    assert meter.expected("denoise", [job()]) == 2.0
    assert meter.expected("denoise", [job(side=256)]) == FIRST_SECONDS


def test_what_is_only_predicted_may_take_several_times_as_long() -> None:
    meter = Meter(Clock(), KNOWN, whole_calls=False)
    assert meter.expected("denoise", [job()]) == pytest.approx(DOUBT * 3.32)
    assert meter.expected("encode", [job()]) == LEAST_SECONDS
    assert meter.expected("decode", [job(), job(name="b")]) == DOUBT * 10.0


def test_a_prediction_counts_where_it_is_longer_than_what_was_seen() -> None:
    clock = Clock()
    meter = Meter(clock, KNOWN, whole_calls=False)
    work(meter, clock, "denoise", [job()], 1.0)
    assert meter.expected("denoise", [job()]) == pytest.approx(3.32)


def test_a_whole_call_is_all_of_its_steps() -> None:
    clock = Clock()
    meter = Meter(clock, KNOWN, whole_calls=True)
    assert meter.expected("denoise", [job()]) == pytest.approx(DOUBT * (4 * 3.32 + 5.0))
    for _ in range(50):
        work(meter, clock, "denoise", [job()], 4 * 6.64 + 5.0)
        meter.news()
    assert meter.expected("denoise", [job()]) == pytest.approx(4 * 6.64 + 5.0, rel=0.05)


def test_units_that_the_device_is_still_at_are_not_news() -> None:
    clock = Clock()
    meter = Meter(clock, KNOWN, whole_calls=False)
    for _ in range(50):
        work(meter, clock, "denoise", [job()], 9.0)
    meter.idle()
    clock.now -= 1000
    assert meter.news() is None
    clock.now += 1000
    found = meter.news()
    assert found is not None
    assert found.step.seconds(32, 512) == pytest.approx(9.0, rel=0.05)


def test_a_decoding_in_parts_counts_once() -> None:
    clock = Clock()
    meter = Meter(clock, KNOWN, whole_calls=False)
    found = None
    for _ in range(30):
        jobs = [job()]
        for _ in range(2):
            meter.begin()
            clock.now += 4.0
            meter.paused(jobs, 4.0)
        work(meter, clock, "decode", jobs, 4.0)
        found = meter.news() or found
    assert found is not None
    assert found.decode.of(64 * 64) == pytest.approx(12.0, rel=0.05)


def test_what_is_decoded_beside_steps_says_nothing_of_what_decoding_takes() -> None:
    clock, jobs = Clock(), [job()]
    meter = Meter(clock, msgspec.structs.replace(KNOWN, beside=True), whole_calls=False)
    for _ in range(40):
        work(meter, clock, "decode", jobs, 0.001)
        work(meter, clock, "denoise", jobs, 8.0)
    found = meter.news()
    assert found is not None
    assert found.beside
    assert found.decode == KNOWN.decode


def test_what_the_engine_does_after_a_unit_is_part_of_it_and_idling_is_not() -> None:
    clock = Clock()
    meter = Meter(clock, KNOWN, whole_calls=False)
    for _ in range(25):
        for _ in range(2):
            work(meter, clock, "denoise", [job()], 8.0)
            clock.now += 1.0  # until the next begins, or there is none
        meter.idle()
        clock.now += 500.0
    found = meter.news()
    assert found is not None
    assert found.step.seconds(32, 512) == pytest.approx(9.0, rel=0.05)


def test_what_was_in_a_cache_does_not_make_encoding_cheap() -> None:
    clock, one = Clock(), job()
    meter = Meter(clock, msgspec.structs.replace(KNOWN, prompt=LinearCost(each=0.5)), whole_calls=False)
    for number in range(40):
        meter.begin()
        new = number % 4 == 0
        clock.now += 0.7 if new else 0.001
        meter.done("encode", [one], 0.0, Encoded(1 if new else 0, []))
    found = meter.news()
    assert found is not None
    assert found.prompt.of(1) == pytest.approx(0.7)


def test_the_engine_tells_what_it_learned_and_goes_by_it() -> None:
    said: list[FromEngine] = []
    engine = Engine(FakeRunner(ModelConfig(backend="fake", fake_step_ms=20)), EngineConfig(), said.append, costs=KNOWN)
    engine.submit(Submit("a", GenerationRequest(prompt="a", num_inference_steps=60, seed=0), [0], 0.0))
    while not engine.idle:
        engine.step()
    told = [message.costs for message in said if isinstance(message, Learned)]
    assert told
    assert told[-1] == engine.scheduler.costs
    assert 0.019 < told[-1].step.seconds(32, 512) < 0.1  # sleeping takes as long as it says, or longer


def test_a_unit_that_failed_says_nothing_of_how_long_its_like_take() -> None:
    said: list[FromEngine] = []
    engine = Engine(FakeRunner(ModelConfig(backend="fake", fake_step_ms=0)), EngineConfig(), said.append)
    engine.submit(Submit("a", GenerationRequest(prompt="[raise-denoise]", seed=0), [0], 0.0))
    while not engine.idle:
        engine.step()
    engine.submit(Submit("b", GenerationRequest(prompt="b", seed=0), [0], 0.0))
    engine.step()
    first = [unit.seconds for unit in said if isinstance(unit, Unit) and unit.kind == "denoise"]
    assert first == [FIRST_SECONDS, FIRST_SECONDS]
