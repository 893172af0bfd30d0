"""Whole calls of a pipeline through a real engine: what shares one, who ends when, and whose fault is whose."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.models.pipelines import LONG, SHORT, ask, checkpoint, images

from stepbatch.config import BatchingConfig, EngineConfig, ModelConfig
from stepbatch.engine.backends import load_runner
from stepbatch.engine.engine import Engine
from stepbatch.engine.messages import Cancelled, Failure, FromEngine, Output, Progress, Submit, Unit
from stepbatch.engine.pipeline_runner import PipelineRunner
from stepbatch.engine.runner import TorchRunner
from stepbatch.engine.warmup import _depends
from stepbatch.errors import NotNative
from stepbatch.request import GenerationRequest

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint("stable-diffusion", tmp_path_factory.mktemp("pipelines"))


@pytest.fixture(scope="module")
def runner(path: Path) -> PipelineRunner:
    made = load_runner(EngineConfig(model=ModelConfig(model_path=str(path), backend="diffusers")))
    assert isinstance(made, PipelineRunner)
    return made


class Run:
    """An engine that is given everything at once, and what it said."""

    def __init__(self, runner: PipelineRunner, poll: Callable[[Run], None] = lambda run: None, **limits: Any) -> None:
        self.said: list[FromEngine] = []
        config = EngineConfig(batching=BatchingConfig(**limits))
        self.engine = Engine(runner, config, emit=self.said.append, poll=lambda: poll(self))

    def take(self, **requests: GenerationRequest) -> Run:
        for name, request in requests.items():
            self.engine.submit(Submit(name, request, list(range(request.n)), time.monotonic()))
        while not self.engine.idle:
            time.sleep(self.engine.step())
        return self

    def of(self, kind: type) -> list[Any]:
        return [message for message in self.said if isinstance(message, kind)]

    @property
    def calls(self) -> list[list[str]]:
        """The requests of each call, in order."""
        units = [[id for id, _ in unit.jobs] for unit in self.of(Unit) if unit.kind == "denoise"]
        return [unit for i, unit in enumerate(units) if i == 0 or unit != units[i - 1]]


def small(prompt: str = SHORT, seed: int = 0, **fields: Any) -> GenerationRequest:
    return GenerationRequest(prompt=prompt, seed=seed, width=64, height=64, num_inference_steps=2, **fields)


def test_requests_of_one_signature_share_a_call(runner: PipelineRunner) -> None:
    requests = {
        "a": small(), "b": small(LONG, 1), "c": small(negative_prompt="blurry"), "d": small(guidance_scale=3.0),
        "e": small(images=images(), strength=0.8), "f": small(images=images(seed=1), strength=0.8, seed=2),
    }  # fmt: skip
    run = Run(runner).take(**requests)
    assert run.calls == [["a", "b"], ["c"], ["d"], ["e", "f"]]
    alone = {name: runner_output(runner, request) for name, request in requests.items()}
    for output in run.of(Output):
        assert (output.width, output.height, output.frames) == (64, 64, 1)
        assert near(output.pixels, alone[output.request_id])
    assert {message.request_id for message in run.of(Output)} == set(requests)


def runner_output(runner: PipelineRunner, request: GenerationRequest) -> bytes:
    pixels: bytes = Run(runner).take(alone=request).of(Output)[0].pixels
    return pixels


def near(ours: bytes, theirs: bytes) -> bool:
    """Whether no value differs by more than what rounding does."""
    a, b = (np.frombuffer(pixels, np.uint8).astype(int) for pixels in (ours, theirs))
    return bool(np.abs(a - b).max() <= 1)


def test_outputs_of_a_request_have_seeds_of_their_own(runner: PipelineRunner) -> None:
    run = Run(runner).take(three=small(n=3, seed=5))
    assert run.calls == [["three"] * 3]
    assert [output.seed for output in run.of(Output)] == [5, 6, 7]
    for output in run.of(Output):
        assert near(output.pixels, runner_output(runner, small(seed=output.seed)))


def test_a_call_is_as_wide_as_the_limit(runner: PipelineRunner) -> None:
    run = Run(runner, dynamic_batch_max_size=2).take(**{name: small(seed=ord(name)) for name in "abc"})
    assert run.calls == [["a", "b"], ["c"]]


def test_progress_is_told_within_the_call(runner: PipelineRunner) -> None:
    run = Run(runner).take(a=small())
    assert [message.jobs for message in run.of(Progress)] == [[("a", 0, step, 3)] for step in (1, 2, 3)]


def test_who_leaves_in_mid_call_leaves_the_others_alone(runner: PipelineRunner) -> None:
    def leave(run: Run) -> None:
        if len(run.of(Progress)) == 1 and not run.of(Cancelled):
            run.engine.cancel("b")

    run = Run(runner, poll=leave).take(a=small(), b=small(LONG, 1))
    assert [message.request_id for message in run.of(Cancelled)] == ["b"]
    [output] = run.of(Output)
    assert output.request_id == "a"
    assert near(output.pixels, runner_output(runner, small()))
    assert not runner._drawn


def test_a_call_that_nobody_waits_for_ends_at_the_next_step(runner: PipelineRunner) -> None:
    def leave(run: Run) -> None:
        if run.of(Progress) and not run.of(Cancelled):
            run.engine.cancel("a")

    request = GenerationRequest(prompt=SHORT, width=64, height=64, num_inference_steps=500, seed=0)
    run = Run(runner, poll=leave).take(a=request)
    assert len(run.of(Progress)) == 1
    assert [type(message) for message in run.said if isinstance(message, Output | Failure | Cancelled)] == [Cancelled]
    assert near(runner_output(runner, small()), runner_output(runner, small()))


def test_a_request_that_its_pipeline_chokes_on_fails_by_itself(
    path: Path, runner: PipelineRunner, caplog: pytest.LogCaptureFixture
) -> None:
    encoder = runner.pipeline._calls["text"].pipeline.text_encoder
    tokens = len(runner.pipeline._calls["text"].pipeline.tokenizer(LONG).input_ids)

    def choke(module: Any, arguments: tuple[Any, ...], more: dict[str, Any]) -> None:
        ids = arguments[0] if arguments else more["input_ids"]
        if any((row != ids[0, -1]).sum() > tokens - 5 for row in ids):
            raise RuntimeError("it can't read this")

    handle = encoder.register_forward_pre_hook(choke, with_kwargs=True)
    try:
        run = Run(runner).take(a=small(), bad=small(LONG, 1), c=small("a dog", 2))
    finally:
        handle.remove()
    assert [(failure.request_id, failure.code) for failure in run.of(Failure)] == [("bad", "generation_failed")]
    assert {output.request_id for output in run.of(Output)} == {"a", "c"}
    assert "it can't read this" in caplog.text


def test_what_a_pipeline_refuses_is_the_callers_to_mend(tmp_path: Path) -> None:
    runner = load_runner(
        EngineConfig(model=ModelConfig(model_path=str(checkpoint("stable-diffusion-3", tmp_path)), backend="diffusers"))
    )
    assert isinstance(runner, PipelineRunner)
    run = Run(runner).take(a=small(max_sequence_length=600), b=small(max_sequence_length=100))
    [failure] = run.of(Failure)
    assert (failure.request_id, failure.code, failure.param) == ("a", "invalid_value", "max_sequence_length")
    assert [output.request_id for output in run.of(Output)] == ["b"]


def test_auto_is_native_where_it_can_be(z_image_path: Path, path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def load(where: Path, backend: Any) -> object:
        return load_runner(EngineConfig(model=ModelConfig(model_path=str(where), backend=backend)))

    assert isinstance(load(z_image_path, "auto"), TorchRunner)
    assert isinstance(load(z_image_path, "diffusers"), PipelineRunner)
    assert isinstance(load(path, "auto"), PipelineRunner)
    assert "StableDiffusionPipeline, which has no native model" in caplog.text
    with pytest.raises(NotNative):
        load(path, "native")


def test_auto_runs_the_pipeline_of_a_noise_schedule_without_a_native_form(z_image_path: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(z_image_path, tmp_path / "copy"))
    file = copy / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"stochastic_sampling": True}))
    runner = load_runner(EngineConfig(model=ModelConfig(model_path=str(copy))))
    assert isinstance(runner, PipelineRunner)
    outputs = Run(runner).take(a=small(), b=small(LONG, 1)).of(Output)  # each draws noise at its steps, and not its own
    assert len(outputs) == 2
    for output in outputs:
        request = small() if output.request_id == "a" else small(LONG, 1)
        assert near(output.pixels, runner_output(runner, request))


def test_calls_on_a_gpu_are_kept_under_its_name_in_the_hosts_times(
    runner: PipelineRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"card {device.index}")
    names = []
    for index in (0, 1):
        monkeypatch.setattr(runner.pipeline, "device", torch.device("cuda", index))
        there = PipelineRunner(runner.pipeline)
        assert there.clock.time(lambda: None, 1)[0] < 1.0
        names.append(_depends(there, EngineConfig())["device"])
    assert names == ["card 0", "card 1"]


def test_what_a_call_costs_are_tokens_of_its_pictures(runner: PipelineRunner) -> None:
    assert runner.lengths(ask(runner.pipeline, width=1024, height=768)) == (64 * 48,)
    assert runner.lengths(ask(runner.pipeline, width=8, height=8)) == (1,)
