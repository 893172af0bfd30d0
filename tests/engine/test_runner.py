import time
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.recording import RecordingRunner, make_engine, run

from stepbatch.config import BatchingConfig, EngineConfig, ModelConfig
from stepbatch.engine.engine import Engine
from stepbatch.engine.messages import Failure, FromEngine, Output, Submit
from stepbatch.engine.runner import TorchRunner, load_runner
from stepbatch.request import GenerationRequest
from stepbatch.testing import FakeRunner

TOLERANCE = 1e-4
WORDS = " ".join(f"w{i}" for i in range(60))

requests = st.builds(
    GenerationRequest,
    prompt=st.sampled_from(["w1", "w2 w3", WORDS]),
    negative_prompt=st.sampled_from([None, "w4", WORDS]),
    width=st.sampled_from([32, 40, 64]),
    height=st.sampled_from([32, 48]),
    num_inference_steps=st.integers(1, 4),
    guidance_scale=st.sampled_from([0.0, 1.0, 3.5]),
    seed=st.integers(0, 3),
    n=st.sampled_from([1, 1, 2]),
)


@dataclass(frozen=True)
class Visit:
    """A request that joins before a step and may be cancelled before a later one."""

    request: GenerationRequest
    join: int
    cancel: int | None


visits = st.lists(
    st.builds(Visit, requests, st.integers(0, 5), st.one_of(st.none(), st.none(), st.integers(0, 8))),
    min_size=1,
    max_size=6,
)
limits = st.builds(
    BatchingConfig, dynamic_batch_max_size=st.integers(1, 8), max_batch_tokens=st.sampled_from([100, 400, 10_000])
)
alone: dict[GenerationRequest, list[torch.Tensor]] = {}


@settings(max_examples=40)
@given(visits=visits, limits=limits)
def test_batched_equals_alone(z_image_runner: TorchRunner, visits: list[Visit], limits: BatchingConfig) -> None:
    """Whatever the company, the limits, the joins and the cancels, a job's latents are those it has by itself."""
    runner = RecordingRunner(z_image_runner.model)
    engine = Engine(runner, EngineConfig(batching=limits))
    now = 0
    while now <= 8 or not engine.idle:
        for i, visit in enumerate(visits):
            if visit.join == now:
                engine.submit(Submit(str(i), visit.request, list(range(visit.request.n)), time.monotonic()))
            if visit.cancel == now:
                engine.cancel(str(i))
        engine.step()
        now += 1
    for i, visit in enumerate(visits):
        request = visit.request
        if visit.cancel is not None:
            continue
        if request not in alone:
            alone[request] = run(make_engine(z_image_runner), [replace(request)])[0]
        for index, expected in enumerate(alone[request]):
            assert (runner.final[str(i), index] - expected).abs().max() < TOLERANCE


def test_nan_in_one_jobs_latents_fails_that_job_alone(z_image_runner: TorchRunner) -> None:
    runner = RecordingRunner(z_image_runner.model)
    messages: list[FromEngine] = []
    engine = Engine(runner, EngineConfig(), messages.append)
    request = GenerationRequest(prompt="w1", width=64, height=64, num_inference_steps=4, guidance_scale=2.0, seed=5)
    for name in "abc":
        engine.submit(Submit(name, request, [0], time.monotonic()))
    engine.step()
    engine.step()
    [sick] = engine.scheduler.get("b")
    with torch.inference_mode():
        runner.latents(sick)[3, 1] = torch.nan
    while not engine.idle:
        engine.step()
    failures = [m for m in messages if isinstance(m, Failure)]
    assert [(m.request_id, m.code) for m in failures] == [("b", "invalid_model_output")]
    assert sorted(m.request_id for m in messages if isinstance(m, Output)) == ["a", "c"]
    expected = run(make_engine(z_image_runner), [request])[0][0]
    assert (runner.final["a", 0] - expected).abs().max() < TOLERANCE
    assert (runner.final["c", 0] - expected).abs().max() < TOLERANCE


def test_the_layout_is_made_anew_only_when_members_change(
    z_image_runner: TorchRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    layout = z_image_runner.model.layout
    monkeypatch.setattr(z_image_runner.model, "layout", lambda sequences: made.append(1) or layout(sequences))
    request = GenerationRequest(prompt="w1", width=64, height=64, num_inference_steps=6, seed=1)
    make_engine(z_image_runner).generate([request, replace(request, num_inference_steps=3)])
    assert len(made) == 2  # both together, then one by itself


def test_outputs_of_a_request_share_an_embedding_and_count_seeds_up(
    z_image_runner: TorchRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded = []
    encode = z_image_runner.model.encode
    monkeypatch.setattr(z_image_runner.model, "encode", lambda prompt: encoded.append(prompt) or encode(prompt))
    request = GenerationRequest(prompt="w7 w8", width=64, height=64, num_inference_steps=2, guidance_scale=0.0, seed=9)
    three = run(make_engine(z_image_runner), [replace(request, n=3)])[0]
    assert encoded == ["w7 w8"]
    last = run(make_engine(z_image_runner), [replace(request, seed=11)])[0][0]
    assert (three[2] - last).abs().max() < TOLERANCE


def test_nothing_is_kept_of_jobs_that_ended(z_image_runner: TorchRunner) -> None:
    runner = RecordingRunner(z_image_runner.model)
    engine = Engine(runner, EngineConfig())
    engine.generate([GenerationRequest(prompt="w1", width=64, height=64, num_inference_steps=2, n=2)])
    engine.submit(Submit("gone", GenerationRequest(prompt="w1", width=64, height=64), [0, 1], time.monotonic()))
    engine.step()
    engine.cancel("gone")
    assert not runner._states


def test_a_request_id_can_be_used_again(z_image_runner: TorchRunner) -> None:
    runner = RecordingRunner(z_image_runner.model)
    engine = Engine(runner, EngineConfig())
    first = GenerationRequest(prompt="w1", width=64, height=64, num_inference_steps=3, guidance_scale=0.0, seed=1)
    for request in (first, replace(first, width=96, seed=2, num_inference_steps=5)):
        engine.submit(Submit("same", request, [0], time.monotonic()))
        while not engine.idle:
            engine.step()
        expected = run(make_engine(z_image_runner), [request])[0][0]
        assert (runner.final["same", 0] - expected).abs().max() < TOLERANCE


def test_the_fake_is_a_runner_like_any_other() -> None:
    assert isinstance(load_runner(EngineConfig(model=ModelConfig(backend="fake"))), FakeRunner)
