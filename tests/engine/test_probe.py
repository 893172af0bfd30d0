import time
from collections.abc import Callable, Sequence

import pytest

from stepbatch.config import ModelConfig
from stepbatch.engine.clock import DeviceClock
from stepbatch.engine.cost import UNKNOWN, StepCost
from stepbatch.engine.measured import Measured, StepPoint
from stepbatch.engine.meter import Encoded, encoded_anew
from stepbatch.engine.probe import probe
from stepbatch.engine.runner import TorchRunner
from stepbatch.engine.width import best_width
from stepbatch.errors import InvalidValue, RequestError
from stepbatch.request import GenerationRequest, Job
from stepbatch.testing import FakeRunner, WholeCallRunner

MACHINE = StepCost(base=0.002, per_token=2e-5)
SIZES = ((32, 32), (64, 64), (128, 128))


class PretendClock(DeviceClock):
    """Of a device whose work takes what it is said to take, however busy this machine is."""

    now = 0.0

    def mark(self) -> float:
        return self.now

    def spend(self, seconds: float) -> None:
        self.now += seconds


class Machine(FakeRunner):
    """Steps take what ``MACHINE`` says, encoding 2 ms a job, decoding 3 ms and 0.1 µs a pixel."""

    def __init__(self, config: ModelConfig | None = None) -> None:
        super().__init__(config or ModelConfig(backend="fake"))
        self.clock = self.pretended = PretendClock()
        self.held: set[tuple[str, int]] = set()
        self.last_tokens = 0  # of a step

    def encode(self, jobs: Sequence[Job]) -> Encoded:
        self.held |= {job.id for job in jobs}
        self.pretended.spend(0.002 * len(jobs))
        return encoded_anew(jobs)

    def denoise(self, jobs: Sequence[Job], tick: Callable[[int, int], None]) -> None:
        assert {job.id for job in jobs} <= self.held
        self.last_tokens = sum(job.tokens for job in jobs)
        self.pretended.spend(MACHINE.seconds(sum(job.tokens for job in jobs), 0))

    def decode(self, jobs: Sequence[Job], seconds: float = 0.0) -> list[bytes | RequestError | None]:
        self.pretended.spend(sum(0.003 + 1e-7 * job.request.pixels for job in jobs))
        return [b""] * len(jobs)

    def forget(self, job: Job) -> None:
        self.held.discard(job.id)


@pytest.fixture(scope="module")
def measured() -> Measured:
    runner = Machine()
    found = probe(runner, 20.0)
    assert not runner.held
    return found


def test_steps_are_measured_alone_and_in_company(measured: Measured) -> None:
    assert {(p.width, p.height) for p in measured.points} == {(16, 16), (32, 32), (64, 64), (128, 128)}
    assert {p.jobs for p in measured.points} == {1, 2, 4, 8, 16, 32, 64}
    for point in measured.points:
        assert point.tokens == point.jobs * 2 * (point.width * point.height // 256)
    assert measured.mixed


def test_the_curve_is_that_of_the_machine(measured: Measured) -> None:
    costs = measured.costs()
    assert costs.known
    for tokens in (8, 32, 100, 128):
        assert costs.step.seconds(tokens, tokens * tokens) == pytest.approx(MACHINE.seconds(tokens, 0), rel=0.05)
    assert costs.prompt.of(1) == pytest.approx(0.002)  # the empty negative prompt is known already
    assert costs.decode.of(128 * 128) == pytest.approx(0.0046, rel=0.05)
    assert costs.image.of(64 * 64) > 0


class BehindClock(PretendClock):
    runs_behind = True


@pytest.mark.parametrize("at_once", [True, False])
def test_a_decoding_beside_a_step_is_held_against_one_before_it(at_once: bool) -> None:
    class Streams(Machine):
        """May do a decoding and a step in the time of the longer of the two."""

        left = 0.0  # of the decoding

        def __init__(self) -> None:
            super().__init__()
            self.clock = self.pretended = BehindClock()

        def decode(self, jobs: Sequence[Job], seconds: float = 0.0) -> list[bytes | RequestError | None]:
            if not self.left:
                return super().decode(jobs, seconds)
            self.pretended.spend(self.left)
            self.left = 0.0
            return [b""]

        def decode_beside(self, jobs: Sequence[Job]) -> list[bytes | RequestError | None]:
            self.left = 0.004
            return [None]

        def denoise(self, jobs: Sequence[Job], tick: Callable[[int, int], None]) -> None:
            super().denoise(jobs, tick)
            if at_once:
                self.left = max(0.0, self.left - MACHINE.seconds(sum(job.tokens for job in jobs), 0))

    found = probe(Streams(), 20.0)
    assert (found.beside < 0.9) is at_once
    assert found.costs().beside is at_once
    assert probe(Machine(), 5.0).beside == 1.0


def test_the_host_and_the_way_of_weights_are_measured_by_themselves() -> None:
    class Launching(Machine):
        """Weights are on their way for 50 ms at each step, and launching takes the host a little."""

        def __init__(self) -> None:
            super().__init__()
            self.clock = self.pretended = BehindClock()

        def denoise(self, jobs: Sequence[Job], tick: Callable[[int, int], None]) -> None:
            time.sleep(0.0001)
            spent = MACHINE.seconds(100 * sum(job.tokens for job in jobs), 0)
            self.pretended.spend(max(0.05, spent))

        def streamed_seconds(self) -> float:
            return 0.05

    found = probe(Launching(), 20.0)
    assert found.streamed == 0.05
    assert 0.0001 <= found.host < 0.05
    step = found.costs().step
    assert step.streamed == 0.05
    assert step.seconds(2, 2) == pytest.approx(0.05, rel=0.05)
    assert step.seconds(64, 64 * 64) == pytest.approx(MACHINE.seconds(6400, 0), rel=0.05)
    assert probe(Machine(), 5.0).host == 0.0


def test_steps_are_tried_as_wide_as_seems_to_pay() -> None:
    class Bent(Machine):
        """Beyond eight jobs of the usual size nothing is gained."""

        def denoise(self, jobs: Sequence[Job], tick: Callable[[int, int], None]) -> None:
            tokens = sum(job.tokens for job in jobs)
            self.pretended.spend(0.03 + MACHINE.per_token * 20 * (tokens + max(0, tokens - 8 * 32)))

    found = probe(Bent(), 20.0)
    widest = {p.jobs: p.seconds for p in found.points if (p.width, p.height) == (64, 64)}
    assert {1, 2, 4, 8, 16} <= set(widest) < {1, 2, 4, 8, 16, 32, 64}
    step = found.costs().step
    for jobs, seconds in widest.items():
        assert step.seconds(jobs * 32, jobs * 2 * 16 * 16) == pytest.approx(seconds, rel=0.2)
    assert best_width(step, 32, 512) <= 16


def test_no_wider_step_is_tried_than_there_is_memory_for() -> None:
    class Peak(Machine):
        def memory_budget(self) -> float:
            return 20 * 32 * 1000.0

    runner = Peak()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("stepbatch.engine.probe._Peak.bytes", lambda peak: 1000 * runner.last_tokens)
        found = probe(runner, 20.0)
    assert max(p.tokens for p in found.points) == 16 * 32


def test_the_time_that_there_is_is_kept_to() -> None:
    runner = FakeRunner(ModelConfig(backend="fake", fake_step_ms=50))
    began = time.monotonic()
    found = probe(runner, 0.5)
    assert time.monotonic() - began < 1.0
    assert found.seconds < 1.0
    assert found.points


def test_sizes_can_be_chosen() -> None:
    found = probe(Machine(), 5.0, SIZES)
    assert {(p.width, p.height) for p in found.points} == set(SIZES)


def test_a_size_that_the_model_refuses_says_nothing() -> None:
    found = probe(Machine(), 5.0, [(17, 17), (64, 64)])
    assert {(p.width, p.height) for p in found.points} == {(64, 64)}
    assert probe(Machine(), 5.0, [(17, 17)]).costs() == UNKNOWN


class Small(Machine):
    """Has no room for more than four jobs, and fails on its largest pictures."""

    def denoise(self, jobs: Sequence[Job], tick: Callable[[int, int], None]) -> None:
        if len(jobs) > 4:
            raise MemoryError
        if any(job.request.width == 128 for job in jobs):
            raise ValueError("asked to")
        super().denoise(jobs, tick)


def test_what_can_not_be_done_does_not_stop_the_start() -> None:
    runner = Small()
    found = probe(runner, 5.0)
    assert {p.jobs for p in found.points} == {1, 2, 4}
    assert {p.width for p in found.points} == {16, 32, 64}
    assert not runner.held


def test_a_step_that_something_else_slowed_down_is_tried_again() -> None:
    class Disturbed(Machine):
        count = 0

        def denoise(self, jobs: Sequence[Job], tick: Callable[[int, int], None]) -> None:
            super().denoise(jobs, tick)
            self.count += 1
            if 6 <= self.count <= 10:  # nearly all of the second size's
                self.pretended.spend(0.05)

    costs = probe(Disturbed(), 20.0).costs()
    assert costs.step.seconds(8, 32) == pytest.approx(MACHINE.seconds(8, 0), rel=0.05)


def test_a_stall_that_leaves_no_time_to_try_again_spoils_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stalled(Machine):
        count = 0

        def denoise(self, jobs: Sequence[Job], tick: Callable[[int, int], None]) -> None:
            super().denoise(jobs, tick)
            self.count += 1
            if self.count == 6:  # the first size took four; so it is the second's second, after which there is no third
                self.pretended.spend(0.6)

    runner = Stalled()
    with monkeypatch.context() as patch:
        patch.setattr(time, "monotonic", lambda: runner.pretended.now)
        costs = probe(runner, 0.5).costs()
    assert runner.count == 6
    assert costs.known
    assert costs.step.seconds(128, 128 * 128) == pytest.approx(MACHINE.seconds(128, 0), rel=0.1)


def test_whole_calls_are_taken_apart() -> None:
    class Calls(WholeCallRunner):
        """A step takes 4 ms, and what is around them 10 ms a job."""

        def __init__(self) -> None:
            super().__init__(ModelConfig(backend="fake"))
            self.clock = self.pretended = PretendClock()

        def denoise(self, jobs: Sequence[Job], tick: Callable[[int, int], None]) -> None:
            self.pretended.spend(0.010 * len(jobs) + 0.004 * jobs[0].steps)

    costs = probe(Calls(), 20.0).costs()
    assert costs.step.seconds(32, 512) == pytest.approx(0.004, rel=0.05)
    assert costs.decode.of(64 * 64) == pytest.approx(0.010, rel=0.05)


def test_a_model_that_only_edits_gets_an_image() -> None:
    runner = Machine()
    runner.info = type(runner.info)(**{**_fields(runner), "tasks": ("editing",)})
    found = probe(runner, 5.0, [(64, 64)])
    assert found.points
    assert found.points[0].tokens == 2 * 2 * 16  # what is edited stands beside what is drawn


def _fields(runner: FakeRunner) -> dict[str, object]:
    return {name: getattr(runner.info, name) for name in runner.info.__struct_fields__}


def test_steps_of_one_size_say_nothing_of_others() -> None:
    points = [StepPoint(width=64, height=64, jobs=1, tokens=32, squares=512, seconds=0.04) for _ in range(3)]
    assert Measured(points=points).costs() == UNKNOWN
    points.append(StepPoint(width=64, height=64, jobs=2, tokens=64, squares=1024, seconds=0.04))
    assert Measured(points=points).costs().known


def test_a_native_model_is_measured(z_image_runner: TorchRunner) -> None:
    found = probe(z_image_runner, 3.0)
    assert found.costs().known
    assert found.costs().decode.of(4096) > 0
    assert not z_image_runner._states


def test_requests_of_a_probe_are_ones_that_could_come() -> None:
    class Strict(Machine):
        def check(self, request: GenerationRequest) -> None:
            if request.width == 16:
                raise InvalidValue("too small", "width")

    assert 16 not in {p.width for p in probe(Strict(), 5.0).points}
