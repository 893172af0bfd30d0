import math
import time
from collections import Counter, deque
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepbatch.config import BatchingConfig, EngineConfig, ModelConfig
from stepbatch.engine.cost import UNKNOWN, Costs, LinearCost, StepCost
from stepbatch.engine.engine import Engine, Tick
from stepbatch.engine.local import load_engine
from stepbatch.engine.messages import Cancelled, Failure, FromEngine, Output, Progress, Stats, Submit, Unit
from stepbatch.engine.meter import FIRST_SECONDS
from stepbatch.errors import DeviceLost, GenerationFailed, InvalidModelOutput, InvalidValue, OutOfMemory, RequestError
from stepbatch.request import GenerationRequest, Job
from stepbatch.testing import FakeRunner, WholeCallRunner

JOB_TOKENS = 32  # of what ``Recorded.submit`` asks for: two sequences of 64x64


class Recorded:
    """An engine with a fake runner, and everything that it says."""

    def __init__(
        self, batching: BatchingConfig | None = None, runner: FakeRunner | None = None, costs: Costs = UNKNOWN
    ) -> None:
        self.runner = runner or FakeRunner(ModelConfig(backend="fake", fake_step_ms=0))
        self.messages: list[FromEngine] = []
        config = EngineConfig(batching=batching or BatchingConfig())
        self.engine = Engine(self.runner, config, emit=self.messages.append, costs=costs)

    def submit(self, name: str, prompt: str = "x", n: int = 1, steps: int = 2, alone: bool = False) -> None:
        request = GenerationRequest(prompt=prompt, n=n, num_inference_steps=steps, seed=7)
        self.engine.submit(Submit(name, request, list(range(n)), time.monotonic(), alone))

    def finish(self) -> None:
        while not self.engine.idle:
            time.sleep(self.engine.step())

    def endings(self) -> dict[tuple[str, int], Output | Failure | Cancelled]:
        """The ending of each job; fails if one has two."""
        found = [message for message in self.messages if isinstance(message, Output | Failure | Cancelled)]
        endings = {(message.request_id, message.index): message for message in found}
        assert len(endings) == len(found)
        return endings

    def units(self, kind: str = "") -> list[Unit]:
        return [message for message in self.messages if isinstance(message, Unit) and message.kind.startswith(kind)]


def failure(ending: object) -> str:
    assert isinstance(ending, Failure)
    return ending.code


def correct(ending: object, prompt: str = "x", seed: int = 7) -> bool:
    assert isinstance(ending, Output)
    assert ending.seed == seed
    return ending.pixels == FakeRunner.pixels(prompt, seed, ending.width, ending.height)


def test_a_model_that_raises_at_the_door_fails_that_request() -> None:
    one = Recorded()
    one.submit("bad", "[raise-check]")
    one.submit("good")
    one.finish()
    endings = one.endings()
    assert failure(endings["bad", 0]) == GenerationFailed.code
    assert correct(endings["good", 0])


def test_each_output_has_its_own_seed() -> None:
    one = Recorded()
    one.submit("a", n=3)
    one.finish()
    assert all(correct(one.endings()["a", index], seed=7 + index) for index in range(3))


def test_requests_of_different_lengths_share_steps() -> None:
    one = Recorded()
    one.submit("long", steps=5)
    one.submit("short", steps=2)
    one.finish()
    assert [len(step) for step in one.runner.steps] == [2, 2, 1, 1, 1]


def test_a_newcomer_joins_a_batch_under_way() -> None:
    one = Recorded()
    one.submit("first", steps=3)
    one.engine.step()
    one.submit("second", steps=3)
    one.finish()
    assert [len(step) for step in one.runner.steps] == [1, 2, 2, 1]


@pytest.mark.parametrize(
    ("word", "code"),
    [
        ("[raise-encode]", "generation_failed"),
        ("[raise-denoise]", "generation_failed"),
        ("[raise-decode]", "generation_failed"),
        ("[nan]", "invalid_model_output"),
        ("[long]", "invalid_value"),
    ],
)
def test_a_bad_request_fails_alone(word: str, code: str) -> None:
    one = Recorded(BatchingConfig(max_encodes_per_step=8, max_decodes_per_step=8))
    for name in ("before", "bad", "after"):
        one.submit(name, prompt=word if name == "bad" else "x")
    one.finish()
    endings = one.endings()
    assert failure(endings["bad", 0]) == code
    assert correct(endings["before", 0])
    assert correct(endings["after", 0])
    assert all(isinstance(message, Output) for key, message in endings.items() if key[0] != "bad")


def test_what_the_model_raised_is_logged_and_not_told(caplog: pytest.LogCaptureFixture) -> None:
    one = Recorded()
    one.submit("bad", prompt="[raise-denoise]")
    one.finish()
    ending = one.endings()["bad", 0]
    assert isinstance(ending, Failure)
    assert "asked to" not in ending.message
    assert "asked to by" in caplog.text


def test_a_cancelled_request_leaves_before_the_next_unit() -> None:
    one = Recorded()
    one.submit("goes", n=2, steps=9)
    one.submit("stays", steps=4)
    one.engine.step()
    one.engine.cancel("goes")
    seen = len(one.messages)
    one.finish()
    later = [message for message in one.messages[seen:] if isinstance(message, Unit | Progress)]
    assert later
    assert not any(job[0] == "goes" for message in later for job in message.jobs)
    assert isinstance(one.endings()["goes", 1], Cancelled)
    assert correct(one.endings()["stays", 0])


def test_cancelling_what_is_not_there_says_nothing() -> None:
    one = Recorded()
    one.engine.cancel("nobody")
    assert one.messages == []


@pytest.mark.parametrize("kind", ["encode", "denoise", "decode"])
def test_a_poll_after_any_unit_may_cancel_its_members(kind: str) -> None:
    one = Recorded()
    one.submit("goes", steps=1)
    one.submit("stays", steps=1)

    def poll() -> None:
        if one.units()[-1].kind == kind:
            one.engine.cancel("goes")

    one.engine.poll = poll
    one.finish()
    assert isinstance(one.endings()["goes", 0], Cancelled)
    assert correct(one.endings()["stays", 0])


class PollingRunner(FakeRunner):
    """Cancels a job in the middle of the unit of work that then fails because of it."""

    engine: Engine

    def denoise(self, jobs: Sequence[Job], tick: Tick) -> None:
        self.engine.cancel("bad")
        super().denoise(jobs, tick)

    def decode(self, jobs: Sequence[Job], seconds: float = math.inf) -> list[bytes | RequestError | None]:
        self.engine.cancel("nan")
        return super().decode(jobs, seconds)


def test_a_job_cancelled_in_a_unit_that_fails_has_one_ending() -> None:
    runner = PollingRunner(ModelConfig(backend="fake", fake_step_ms=0))
    one = Recorded(runner=runner)
    runner.engine = one.engine
    one.submit("bad", prompt="[raise-denoise]")
    one.submit("nan", prompt="[nan]")
    one.submit("good")
    one.finish()
    assert isinstance(one.endings()["bad", 0], Cancelled)
    assert isinstance(one.endings()["nan", 0], Cancelled)
    assert correct(one.endings()["good", 0])


class BesideRunner(FakeRunner):
    """Decodes beside steps, three of them."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.looks: Counter[tuple[str, int]] = Counter()
        self.waited: list[tuple[str, int]] = []

    def decode_beside(self, jobs: Sequence[Job]) -> list[bytes | RequestError | None]:
        self.looks.update(job.id for job in jobs)
        return [super(BesideRunner, self).decode([job])[0] if self.looks[job.id] > 3 else None for job in jobs]

    def decode(self, jobs: Sequence[Job], seconds: float = math.inf) -> list[bytes | RequestError | None]:
        self.waited.extend(job.id for job in jobs)
        return super().decode(jobs, seconds)


def test_outputs_are_decoded_beside_steps_and_waited_for_where_there_are_none() -> None:
    runner = BesideRunner(ModelConfig(backend="fake", fake_step_ms=0))
    costs = Costs(known=True, step=StepCost(base=0.1), decode=LinearCost(each=0.05), beside=True)
    one = Recorded(runner=runner, costs=costs)
    one.submit("short", n=2, steps=2)
    one.submit("nan", prompt="[nan]", steps=3)
    one.submit("cancelled", steps=3)
    one.submit("long", steps=9)
    while runner.looks["cancelled", 0] == 0:
        one.engine.step()
    one.engine.cancel("cancelled")
    one.finish()
    endings = one.endings()
    assert correct(endings["short", 0])
    assert correct(endings["short", 1], seed=8)
    assert correct(endings["long", 0])
    assert failure(endings["nan", 0]) == InvalidModelOutput.code
    assert isinstance(endings["cancelled", 0], Cancelled)
    assert runner.waited == [("long", 0)], "nothing else has to wait"
    assert runner.looks["short", 0] == 4
    steps = [len(unit.jobs) for unit in one.units("denoise")]
    assert len(steps) == 9, "no step waits for a decoding"


def test_a_job_that_must_be_alone_is() -> None:
    one = Recorded()
    for name in ("a", "b", "c"):
        one.submit(name, alone=name == "b")
    one.finish()
    assert all(unit.jobs == [("b", 0)] for unit in one.units() if ("b", 0) in unit.jobs)
    assert all(correct(ending) for ending in one.endings().values())


def test_a_unit_says_how_long_it_takes_by_what_is_known_of_its_size() -> None:
    one = Recorded(runner=FakeRunner(ModelConfig(backend="fake", fake_step_ms=2)))
    one.submit("small", steps=2)
    one.finish()
    first, second = (unit.seconds for unit in one.units("denoise"))
    assert first == FIRST_SECONDS
    assert 0.002 <= second < 5
    one.submit("large", n=8, steps=1)
    one.finish()
    assert one.units("denoise")[-1].seconds == FIRST_SECONDS


def test_statistics_count_what_runs_and_what_waits() -> None:
    one = Recorded(BatchingConfig(dynamic_batch_max_size=2))
    one.submit("a", n=5, steps=3)
    one.engine.step()
    stats = one.messages[-1]
    assert isinstance(stats, Stats)
    assert (stats.running, stats.waiting, stats.steps, stats.jobs_in_step, stats.tokens_in_step) == (2, 3, 1, 2, 64)
    one.finish()
    one.engine.heartbeat()
    stats = one.messages[-1]
    assert isinstance(stats, Stats)
    assert (stats.running, stats.waiting, stats.jobs_in_step) == (0, 0, 0)
    assert stats.steps == len(one.runner.steps)


def test_progress_counts_every_step_once() -> None:
    one = Recorded()
    one.submit("a", steps=3)
    one.finish()
    assert [message.jobs for message in one.messages if isinstance(message, Progress)] == [
        [("a", 0, step, 3)] for step in (1, 2, 3)
    ]


def test_generate_gives_what_each_request_gives_alone() -> None:
    requests = [
        GenerationRequest(prompt=f"p{i}", seed=i, n=1 + i % 3, num_inference_steps=1 + i, width=32, height=16 * (1 + i))
        for i in range(5)
    ]
    together = Recorded().engine.generate(requests)
    alone = [Recorded().engine.generate([request])[0] for request in requests]
    for request, here, there in zip(requests, together, alone, strict=True):
        assert [(o.index, o.seed, o.pixels) for o in here] == [(o.index, o.seed, o.pixels) for o in there]
        assert [o.pixels for o in here] == [FakeRunner.pixels(request.prompt, o.seed, o.width, o.height) for o in here]
    assert Recorded().engine.generate([]) == []


@pytest.mark.parametrize(
    ("word", "error"),
    [
        ("[long]", InvalidValue),
        ("[raise-encode]", GenerationFailed),
        ("[raise-decode]", GenerationFailed),
        ("[nan]", InvalidModelOutput),
    ],
)
@pytest.mark.parametrize("company", [0, 3])
def test_generate_raises_and_leaves_nothing_behind(word: str, error: type[RequestError], company: int) -> None:
    one = Recorded()
    with pytest.raises(error):
        one.engine.generate([GenerationRequest(prompt=prompt) for prompt in ["x"] * company + [word]])
    assert one.engine.idle
    assert len(one.engine.generate([GenerationRequest(prompt="x")])) == 1


class FullRunner(FakeRunner):
    """Decoding a job with ``[full]`` in its prompt is out of memory."""

    freed = 0

    def decode(self, jobs: Sequence[Job], seconds: float = math.inf) -> list[bytes | RequestError | None]:
        if any("[full]" in job.request.prompt for job in jobs):
            raise MemoryError("asked to by [full]")
        return super().decode(jobs, seconds)

    def free_memory(self) -> None:
        self.freed += 1


def limited(tokens: int) -> FakeRunner:
    return FullRunner(ModelConfig(backend="fake", fake_step_ms=0, fake_memory_tokens=tokens))


def test_a_step_that_is_out_of_memory_is_taken_in_halves_and_the_next_are_narrower(
    caplog: pytest.LogCaptureFixture,
) -> None:
    one = Recorded(BatchingConfig(max_encodes_per_step=8), runner=limited(3 * JOB_TOKENS))
    one.submit("a", n=8, steps=3)
    one.engine.step()
    tried = [len(unit.jobs) for unit in one.units("denoise")]
    assert tried == [8, 4, 4, 2, 2, 2, 2]
    assert "a step of 256 tokens was too much" in caplog.text
    one.finish()
    assert all(correct(one.endings()["a", index], seed=7 + index) for index in range(8))
    assert {len(unit.jobs) for unit in one.units("denoise")[len(tried) :]} <= {1, 2, 3}
    assert one.engine.scheduler.most_tokens == 3 * JOB_TOKENS
    assert isinstance(one.runner, FullRunner) and one.runner.freed == 3


def test_a_job_that_is_out_of_memory_by_itself_fails_alone() -> None:
    one = Recorded(runner=limited(JOB_TOKENS))
    one.submit("small")
    request = GenerationRequest(prompt="x", width=128, height=128, num_inference_steps=2)
    one.engine.submit(Submit("large", request, [0], time.monotonic()))
    one.submit("also small")
    one.finish()
    assert failure(one.endings()["large", 0]) == OutOfMemory.code
    assert correct(one.endings()["small", 0])
    assert correct(one.endings()["also small", 0])


@pytest.mark.parametrize("seconds", [0.0, 0.15])
def test_a_decoding_that_is_out_of_memory_fails_alone(seconds: float) -> None:
    one = Recorded(BatchingConfig(max_encodes_per_step=8, max_decodes_per_step=8), runner=limited(1000))
    one.runner.decode_seconds = seconds
    for name in ("a", "[full]", "b"):
        one.submit(name, prompt=name)
    one.finish()
    assert failure(one.endings()["[full]", 0]) == OutOfMemory.code
    assert correct(one.endings()["a", 0], "a")
    assert correct(one.endings()["b", 0], "b")
    assert one.engine.scheduler.most_tokens == math.inf  # which says nothing of steps


def test_a_whole_call_that_is_out_of_memory_is_made_in_halves() -> None:
    config = ModelConfig(backend="fake", fake_step_ms=0, fake_memory_tokens=2 * JOB_TOKENS)
    one = Recorded(runner=WholeCallRunner(config))
    one.submit("a", n=4)
    one.finish()
    assert isinstance(one.runner, WholeCallRunner)
    assert [len(call) for call in one.runner.calls] == [4, 2, 2]
    assert all(correct(one.endings()["a", index], seed=7 + index) for index in range(4))


def test_no_step_is_planned_over_the_memory_that_there_is() -> None:
    class BudgetRunner(FakeRunner):
        def memory_budget(self) -> float:
            return 1000.0

    costs = Costs(
        known=True, step=StepCost(host=1.0, per_token=1e-6), step_memory=LinearCost(each=310.0, per_unit=10.0)
    )
    runner = BudgetRunner(ModelConfig(backend="fake", fake_step_ms=0))
    one = Recorded(runner=runner, costs=costs)
    one.submit("a", n=8)
    one.finish()
    assert max(len(step) for step in runner.steps) == 2  # there are 950 bytes, and so much for 64 tokens


def test_an_engine_that_has_lost_the_device_ends() -> None:
    one = Recorded()
    one.submit("a", prompt="[lost]")
    one.submit("b")
    with pytest.raises(DeviceLost):
        one.finish()
    assert one.endings() == {}


LONG_DECODE = Costs(known=True, step=StepCost(host=0.01), decode=LinearCost(each=0.5))


@pytest.mark.parametrize("costs", [UNKNOWN, LONG_DECODE], ids=["unknown", "known"])
def test_others_take_their_steps_while_a_long_decoding_goes_on(costs: Costs) -> None:
    one = Recorded(costs=costs)
    one.submit("first", steps=1)
    one.submit("others", steps=40)
    one.engine.step()
    one.runner.decode_seconds = 0.5
    stalls = []
    while ("first", 0) not in one.endings():
        began, steps = time.monotonic(), len(one.runner.steps)
        one.engine.step()
        stalls.append(time.monotonic() - began)
        assert len(one.runner.steps) == steps + 1
    assert max(stalls) < 0.3
    assert 4 <= len(stalls) <= 6
    ending = one.endings()["first", 0]
    assert isinstance(ending, Output) and 0.5 <= ending.times.decode < 0.8
    assert correct(ending)


def test_short_decodings_are_done_in_one_go() -> None:
    one = Recorded(costs=Costs(known=True, step=StepCost(host=0.2), decode=LinearCost(each=0.01)))
    one.submit("a", n=4, steps=1)
    one.submit("b", steps=9)
    for _ in range(2):
        one.engine.step()
    assert [len(unit.jobs) for unit in one.units("decode")] == [4]


def test_a_decoding_that_is_cancelled_between_two_slices_is_freed() -> None:
    one = Recorded()
    one.submit("goes", steps=1)
    one.engine.step()
    one.runner.decode_seconds = 0.5
    one.engine.step()
    assert one.runner._left
    one.engine.cancel("goes")
    assert not one.runner._left
    assert one.engine.idle
    assert isinstance(one.endings()["goes", 0], Cancelled)


def test_a_slice_is_said_to_take_what_all_of_the_decoding_may() -> None:
    one = Recorded()
    one.runner.decode_seconds = 0.25
    one.submit("first", steps=1)
    one.finish()
    said = [unit.seconds for unit in one.units("decode")]
    assert len(said) == 3 and set(said) == {FIRST_SECONDS}
    one.submit("second", steps=1)
    one.finish()
    assert all(0.25 <= unit.seconds < 1 for unit in one.units("decode")[3:])


WORDS = ["", "", "", "[raise-encode]", "[raise-denoise]", "[raise-decode]", "[nan]", "[long]", "[full]"]
operations = st.one_of(
    st.tuples(st.just("submit"), st.sampled_from(WORDS), st.integers(1, 3), st.integers(1, 3), st.booleans()),
    st.tuples(st.just("cancel"), st.integers(0, 10)),
    st.just(("step",)),
    st.just(("go on",)),  # ends a poll
)
batchings = st.builds(
    BatchingConfig,
    dynamic_batch_max_size=st.integers(1, 4),
    max_batch_tokens=st.integers(16, 128),
    max_encodes_per_step=st.integers(1, 3),
    max_decodes_per_step=st.integers(1, 3),
)


class SlicedRunner(FullRunner):
    """Now and then puts off a decoding, and has no room for a step."""

    def __init__(self, put_off: Sequence[bool], memory: Sequence[int]) -> None:
        super().__init__(ModelConfig(backend="fake", fake_step_ms=0))
        self.put_off, self.memory = deque(put_off), deque(memory)

    def denoise(self, jobs: Sequence[Job], tick: Tick) -> None:
        self.memory_tokens = self.memory.popleft() if self.memory else math.inf
        super().denoise(jobs, tick)

    def decode(self, jobs: Sequence[Job], seconds: float = math.inf) -> list[bytes | RequestError | None]:
        pictures = super().decode(jobs, seconds)
        return [None if seconds < math.inf and self.put_off and self.put_off.popleft() else one for one in pictures]


runners = st.builds(SlicedRunner, st.lists(st.booleans(), max_size=20), st.lists(st.integers(1, 128), max_size=20))


@given(batchings, runners, st.lists(operations, max_size=40))
def test_every_accepted_job_ends_exactly_once(
    batching: BatchingConfig, runner: FakeRunner, sequence: list[tuple[object, ...]]
) -> None:
    one = Recorded(batching, runner)
    todo = deque(sequence)
    submitted: Counter[str] = Counter()
    prompts: dict[str, str] = {}

    def operate(what: object, *values: object) -> None:
        if what == "submit":
            word, n, steps, alone = values
            name = f"request-{len(submitted)}"
            submitted[name], prompts[name] = int(str(n)), f"{name} {word}"
            one.submit(name, prompts[name], int(str(n)), int(str(steps)), bool(alone))
        elif what == "cancel":
            one.engine.cancel(f"request-{values[0]}")

    def poll() -> None:  # whatever comes next in the sequence comes between two units of work
        while todo and todo[0][0] in ("submit", "cancel"):
            operate(*todo.popleft())
        if todo and todo[0][0] == "go on":
            todo.popleft()

    one.engine.poll = poll
    while todo:
        operation = todo.popleft()
        if operation[0] == "step":
            one.engine.step()
        else:
            operate(*operation)
    one.finish()
    endings = one.endings()
    assert set(endings) == {(name, index) for name, n in submitted.items() for index in range(n)}
    for (name, index), ending in endings.items():
        bad = "[" in prompts[name]
        full = isinstance(ending, Failure) and ending.code == OutOfMemory.code
        assert isinstance(ending, Cancelled) or full or isinstance(ending, Failure) == bad
        if isinstance(ending, Output):
            assert correct(ending, prompts[name], 7 + index)
    assert len(one.engine.scheduler) == 0
    assert one.engine.scheduler.waiting == 0
    assert not one.engine._pixels


def whole_calls(delay_ms: float = 0.0, size: int = 8) -> tuple[Recorded, WholeCallRunner]:
    runner = WholeCallRunner(ModelConfig(backend="fake", fake_step_ms=0))
    batching = BatchingConfig(dynamic_batch_delay_ms=delay_ms, dynamic_batch_max_size=size, max_encodes_per_step=1)
    return Recorded(batching, runner), runner


def test_whole_calls_share_by_signature_and_end_before_the_next_begins() -> None:
    one, runner = whole_calls()
    for name, steps in (("a", 3), ("b", 5), ("c", 3), ("d", 3)):
        one.submit(name, steps=steps)
    one.submit("e", prompt="[single]", steps=3)
    one.finish()
    assert runner.calls == [[("a", 0), ("c", 0), ("d", 0)], [("b", 0)], [("e", 0)]]
    assert all(correct(ending) for name, ending in one.endings().items() if name != ("e", 0))
    second_call = [
        i for i, message in enumerate(one.messages) if isinstance(message, Unit) and ("b", 0) in message.jobs
    ]
    assert sum(isinstance(message, Output) for message in one.messages[: second_call[0]]) == 3


def test_a_whole_call_tells_each_step_and_stays_announced() -> None:
    one, _ = whole_calls()
    one.submit("a", steps=3)
    one.submit("b", steps=3)
    one.finish()
    told = [message.jobs for message in one.messages if isinstance(message, Progress)]
    assert told == [[("a", 0, step, 3), ("b", 0, step, 3)] for step in (1, 2, 3)]
    for place in (i for i, message in enumerate(one.messages) if isinstance(message, Progress)):
        stats, unit = one.messages[place + 1 : place + 3]
        assert isinstance(stats, Stats) and (stats.running, stats.waiting, stats.jobs_in_step) == (2, 0, 0)
        assert isinstance(unit, Unit) and unit.kind == "denoise"


def test_a_call_takes_messages_in_and_stops_when_nobody_waits_for_it() -> None:
    one, runner = whole_calls()
    gone: list[str] = []

    def poll() -> None:
        if len(runner.steps) == 2 and not gone:
            gone.append("a")
            one.engine.cancel("a")
            one.submit("late", steps=9)
        if len(runner.steps) == 4 and len(gone) == 1:
            gone.append("b")
            one.engine.cancel("b")

    one.engine.poll = poll
    one.submit("a", steps=9)
    one.submit("b", steps=9)
    one.finish()
    assert runner.calls == [[("a", 0), ("b", 0)], [("late", 0)]]
    assert len(runner.steps) == 4 + 9  # the call stopped at the step after which the last was gone
    endings = one.endings()
    assert isinstance(endings["a", 0], Cancelled)
    assert isinstance(endings["b", 0], Cancelled)
    assert correct(endings["late", 0])


def test_a_call_that_fails_is_tried_again_job_by_job() -> None:
    one, runner = whole_calls()
    for name, prompt in (("a", "x"), ("bad", "[raise-denoise]"), ("c", "x")):
        one.submit(name, prompt=prompt)
    one.finish()
    assert runner.calls == [[("a", 0), ("bad", 0), ("c", 0)], [("a", 0)], [("bad", 0)], [("c", 0)]]
    endings = one.endings()
    assert isinstance(endings["bad", 0], Failure)
    assert correct(endings["a", 0])
    assert correct(endings["c", 0])


def test_a_step_says_how_long_a_batch_still_waits_for_company() -> None:
    one, _ = whole_calls(delay_ms=60_000, size=2)
    one.submit("a")
    assert 59 < one.engine.step() <= 60
    one.submit("b")
    assert one.engine.step() == 0
    assert one.engine.step() == 0
    assert one.engine.idle
    assert one.engine.step() == float("inf")


def test_a_long_call_is_not_held_to_what_a_short_one_took() -> None:
    one, _ = whole_calls()
    for name, steps in (("short", 1), ("long", 50), ("short again", 1)):
        one.submit(name, steps=steps)
        one.finish()
    first = {name: next(u.seconds for u in one.units("denoise") if (name, 0) in u.jobs) for name, _ in [*_named(one)]}
    assert first["short"] == first["long"] == FIRST_SECONDS
    assert first["short again"] < FIRST_SECONDS


def _named(one: Recorded) -> set[tuple[str, int]]:
    return {job for unit in one.units("denoise") for job in unit.jobs}


def test_where_all_requests_are_known_none_waits_for_company() -> None:
    batching = BatchingConfig(dynamic_batch_delay_ms=60_000)
    config = EngineConfig(model=ModelConfig(backend="fake", fake_step_ms=0), batching=batching)
    assert config.undelayed().batching == BatchingConfig()
    assert config.undelayed().model == config.model
    assert load_engine(config).scheduler.limits.dynamic_batch_delay_ms == 0


def test_how_long_units_take_is_not_remembered_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stepbatch.engine.meter.MOST_SIZES", 4)
    one, _ = whole_calls()
    for steps in range(1, 10):
        one.submit(f"steps {steps}", steps=steps)
        one.finish()
        assert len(one.engine._meter._longest) <= 4
