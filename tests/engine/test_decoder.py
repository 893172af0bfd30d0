import math
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.models import tiny_wan
from tests.models.parity import picture

from stepbatch.config import EngineConfig, ModelConfig
from stepbatch.engine import decode_time
from stepbatch.engine.cost import UNKNOWN, Costs, StepCost
from stepbatch.engine.engine import Engine
from stepbatch.engine.messages import FromEngine, Output, Submit
from stepbatch.engine.runner import TorchRunner
from stepbatch.models.native import load_model
from stepbatch.request import GenerationRequest, Job


@pytest.fixture(scope="module")
def wan_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_wan.wan(tmp_path_factory.mktemp("wan") / "one")


@pytest.fixture(params=["picture", "video"])
def runner(request: pytest.FixtureRequest, z_image_path: Path, wan_path: Path) -> TorchRunner:
    path = z_image_path if request.param == "picture" else wan_path
    return TorchRunner(load_model(EngineConfig(model=ModelConfig(model_path=str(path)))))


def encoded(runner: TorchRunner, name: str, seed: int = 1, steps: int = 2) -> Job:
    """A job that could be decoded: nothing but noise."""
    frames = 5 if runner.info.makes_videos else None
    request = GenerationRequest(
        prompt="w1", width=64, height=48, num_frames=frames, num_inference_steps=steps, seed=seed
    ).resolve(runner.info)
    job = Job(name, 0, request, runner.lengths(request), 0.0)
    runner.encode([job])
    return job


def pixels(runner: TorchRunner, job: Job) -> bytes:
    [found] = runner.decode([job])
    assert isinstance(found, bytes)
    return found


def hooks(runner: TorchRunner) -> int:
    return sum(len(layer._forward_pre_hooks) for layer in runner.model.space.vae.modules())


def test_a_decoding_in_slices_gives_the_same_pixels(runner: TorchRunner) -> None:
    one, other = encoded(runner, "one"), encoded(runner, "other", seed=2)
    running = encoded(runner, "running", seed=3, steps=500)
    expected = pixels(runner, one)
    slices = 1
    while (found := runner.decode([one, other], 0.0))[0] is None:
        assert found == [None, None]
        runner.denoise([running], lambda step, steps: None)
        running.step += 1
        slices += 1
    assert found == [expected, None]
    assert slices > 20
    assert runner.decode([one, other], 60.0) == [expected, pixels(runner, other)]
    assert hooks(runner) == 0


def slow(monkeypatch: pytest.MonkeyPatch, looks: int) -> None:
    """As on a device that is still at it when it is asked, so often."""
    left = iter([False] * looks)
    monkeypatch.setattr(torch.cpu.Event, "query", lambda event: next(left, True))


def test_a_decoding_beside_steps_gives_the_same_pixels(runner: TorchRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = encoded(runner, "one"), encoded(runner, "other", seed=2)
    running = encoded(runner, "running", seed=3, steps=500)
    expected = [pixels(runner, one), pixels(runner, other)]
    slow(monkeypatch, looks=3)
    assert runner.decode_beside([one, other]) == [None, None]
    runner.denoise([running], lambda step, steps: None)
    assert runner.decode_beside([one, other]) == [None, expected[1]]
    assert runner.decode_beside([one]) == [expected[0]]


def test_what_is_decoded_beside_steps_is_waited_for_where_there_are_none(
    runner: TorchRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, made = encoded(runner, "one"), []
    expected = pixels(runner, job)
    slow(monkeypatch, looks=1)
    assert runner.decode_beside([job]) == [None]
    monkeypatch.setattr(runner.model, "decode", lambda *arguments: made.append(arguments))
    assert runner.decode([job], 0.0) == [expected]
    assert not made, "it was begun anew"


def test_nothing_is_kept_of_a_job_that_is_forgotten_while_it_is_decoded_beside_steps(
    runner: TorchRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = encoded(runner, "one")
    slow(monkeypatch, looks=1)
    assert runner.decode_beside([job]) == [None]
    runner.free_memory()  # waits, and loses nothing
    assert set(runner._decoder._beside) == {job.id}
    runner.forget(job)
    assert not runner._decoder._beside


def test_a_paused_decoding_begins_anew_beside_steps(runner: TorchRunner) -> None:
    job = encoded(runner, "one")
    expected = pixels(runner, job)
    for _ in range(5):
        assert runner.decode([job], 0.0) == [None]
    assert runner.decode_beside([job]) == [expected]
    assert runner._decoder._paused is None
    assert hooks(runner) == 0


def test_another_job_takes_the_place_of_one_that_is_paused(runner: TorchRunner) -> None:
    one, other = encoded(runner, "one"), encoded(runner, "other", seed=2)
    expected = pixels(runner, one)
    assert runner.decode([one], 0.0) == [None]
    other_pixels = pixels(runner, other)
    assert other_pixels != expected
    assert runner.decode([one], 60.0) == [expected]


def test_a_job_that_is_forgotten_frees_its_decoding(runner: TorchRunner) -> None:
    job = encoded(runner, "one")
    for _ in range(10):
        assert runner.decode([job], 0.0) == [None]
    assert runner._decoder._paused is not None
    runner.forget(job)
    assert runner._decoder._paused is None
    assert hooks(runner) == 0
    if runner.model.space.is_video:
        assert all(kept is None for kept in runner.model.space.vae._feat_map)


def test_where_there_was_no_room_beside_it_a_decoding_is_done_in_one_go(runner: TorchRunner) -> None:
    job = encoded(runner, "one")
    expected = pixels(runner, job)
    assert runner.decode([job], 0.0) == [None]
    runner.free_memory()
    assert runner._decoder._paused is None
    assert runner.decode([job], 0.0) == [expected]


def test_an_image_may_be_encoded_while_a_decoding_is_paused(runner: TorchRunner) -> None:
    job = encoded(runner, "one")
    expected = pixels(runner, job)
    for _ in range(20):
        assert runner.decode([job], 0.0) == [None]
    with torch.inference_mode():
        runner._images(replace(job.request, images=(picture(64, 48),), strength=0.5))
    assert runner.decode([job], math.inf) == [expected]


def test_a_fault_in_a_slice_is_the_jobs_and_leaves_nothing_behind(
    runner: TorchRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = encoded(runner, "one")
    expected = pixels(runner, job)

    def full(*args: object, **kwargs: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    with monkeypatch.context() as context:
        context.setattr(runner.model.space.vae.decoder.conv_out, "forward", full)
        assert runner.decode([job], 0.0) == [None]
        with pytest.raises(MemoryError):
            runner.decode([job], 60.0)
    assert hooks(runner) == 0
    assert runner._decoder._paused is None
    assert runner.decode([job]) == [expected]


def drawn(runner: TorchRunner, costs: Costs = UNKNOWN) -> tuple[dict[str, bytes], int]:
    """The pictures of four requests that are there at once, and in how many rounds they were made."""
    pictures: dict[str, bytes] = {}

    def take(message: FromEngine) -> None:
        if isinstance(message, Output):
            pictures[message.request_id] = message.pixels

    engine = Engine(TorchRunner(runner.model), EngineConfig(), emit=take, costs=costs)
    for i in range(4):
        request = GenerationRequest(prompt=f"w{i}", width=64, height=64, num_inference_steps=1 + i, seed=i)
        engine.submit(Submit(str(i), request, [0], time.monotonic()))
    rounds = 0
    while not engine.idle:
        engine.step()
        rounds += 1
    return pictures, rounds


def test_the_engine_draws_the_same_in_slices(z_image_runner: TorchRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_time, "SLICE_SECONDS", math.inf)
    expected, rounds = drawn(z_image_runner)
    assert rounds < 10
    monkeypatch.setattr(decode_time, "SLICE_SECONDS", 0.0)
    pictures, rounds = drawn(z_image_runner)
    assert rounds > 20
    assert pictures == expected


def test_the_engine_draws_the_same_beside_steps(z_image_runner: TorchRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, _ = drawn(z_image_runner)
    slow(monkeypatch, looks=4)
    pictures, _ = drawn(z_image_runner, Costs(known=True, step=StepCost(base=0.01), beside=True))
    assert pictures == expected
