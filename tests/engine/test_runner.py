import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.models import tiny_wan
from tests.models.parity import disc, picture
from tests.recording import RecordingRunner, make_engine, run

from stepbatch.config import BatchingConfig, EngineConfig, MemoryConfig, ModelConfig
from stepbatch.engine import runner as runner_module
from stepbatch.engine.engine import Engine
from stepbatch.engine.messages import Failure, FromEngine, Output, Submit
from stepbatch.engine.meter import Encoded
from stepbatch.engine.runner import TorchRunner
from stepbatch.image import InputImage
from stepbatch.models.base import Embedding, Prompt
from stepbatch.models.latents import Posterior
from stepbatch.models.native import load_model
from stepbatch.request import GenerationRequest, Job

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
from_images = st.builds(
    lambda request, masked, strength: replace(
        request, images=(picture(64, 48),), mask=disc(64, 48) if masked else None, strength=strength
    ),
    requests.filter(lambda request: request.num_inference_steps > 1),
    st.booleans(),
    st.sampled_from([0.5, 0.8, 1.0]),
)
requests = requests | from_images


@pytest.fixture(scope="module")
def wan_runner(tmp_path_factory: pytest.TempPathFactory) -> TorchRunner:
    path = tiny_wan.wan(tmp_path_factory.mktemp("wan") / "two", networks=2)
    return TorchRunner(load_model(EngineConfig(model=ModelConfig(model_path=str(path)))))


@dataclass(frozen=True)
class Visit:
    """A request that joins before a step and may be cancelled before a later one."""

    request: GenerationRequest
    join: int
    cancel: int | None


def visits_of(requests: st.SearchStrategy[GenerationRequest]) -> st.SearchStrategy[list[Visit]]:
    leaves = st.one_of(st.none(), st.none(), st.integers(0, 8))
    return st.lists(st.builds(Visit, requests, st.integers(0, 5), leaves), min_size=1, max_size=6)


videos = st.builds(
    GenerationRequest,
    prompt=st.sampled_from(["w1", "w2 w3"]),
    num_frames=st.sampled_from([1, 5]),
    width=st.sampled_from([32, 48]),
    height=st.just(32),
    num_inference_steps=st.integers(1, 5),
    guidance_scale=st.sampled_from([1.0, 4.0]),
    flow_shift=st.sampled_from([None, 1.0]),
    max_sequence_length=st.sampled_from([8, 16]),
    seed=st.integers(0, 1),
)
limits = st.builds(
    BatchingConfig, dynamic_batch_max_size=st.integers(1, 8), max_batch_tokens=st.sampled_from([100, 400, 10_000])
)
alone: dict[GenerationRequest, list[torch.Tensor]] = {}


@settings(max_examples=12)
@given(visits=visits_of(requests), limits=limits)
def test_batched_equals_alone(z_image_runner: TorchRunner, visits: list[Visit], limits: BatchingConfig) -> None:
    """Whatever the company, the limits, the joins and the cancels, a job's latents are those it has by itself."""
    assert worst_difference(z_image_runner, visits, limits) < TOLERANCE


@settings(max_examples=5)
@given(visits=visits_of(videos), limits=limits)
def test_batched_equals_alone_with_two_transformers(
    wan_runner: TorchRunner, visits: list[Visit], limits: BatchingConfig
) -> None:
    """Likewise where jobs change from one to the other, and their solvers look back."""
    assert worst_difference(wan_runner, visits, limits) < TOLERANCE


def worst_difference(own: TorchRunner, visits: list[Visit], limits: BatchingConfig) -> float:
    """Of any latent of the requests that stayed, from what they have alone."""
    runner = RecordingRunner(own.model)
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
    worst = torch.zeros(())
    for i, visit in enumerate(visits):
        request = visit.request
        if visit.cancel is not None:
            continue
        if request not in alone:
            alone[request] = run(make_engine(own), [replace(request)])[0]
        for index, expected in enumerate(alone[request]):
            worst = torch.maximum(worst, (runner.final[str(i), index] - expected).abs().max())  # NaN stays NaN
    return float(worst)


def test_a_step_takes_a_forward_pass_of_each_transformer_that_is_needed(
    wan_runner: TorchRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = wan_runner.model
    passes: list[tuple[int, int]] = []  # transformer, jobs
    denoise = model.denoise

    def counting(layout: Any, latents: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        passes.append((layout.network, len(time)))
        return denoise(layout, latents, time)

    monkeypatch.setattr(model, "denoise", counting)
    late = GenerationRequest(
        prompt="w1", width=32, height=32, num_frames=1, guidance_scale=1.0, num_inference_steps=4, seed=1
    )
    never, early = replace(late, num_inference_steps=2), replace(late, flow_shift=1.0)
    networks = [model.schedule(request.resolve(wan_runner.info)).networks for request in (late, never, early)]
    assert networks == [(0, 0, 0, 1), (0, 0), (0, 0, 1, 1)]
    make_engine(wan_runner).generate([late, never, early])
    assert passes == [(0, 3), (0, 3), (0, 1), (1, 1), (1, 2)]


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
    encoded = encodes(z_image_runner, monkeypatch)
    request = GenerationRequest(prompt="w7 w8", width=64, height=64, num_inference_steps=2, guidance_scale=0.0, seed=9)
    three = run(make_engine(z_image_runner), [replace(request, n=3)])[0]
    assert encoded == [1]
    last = run(make_engine(z_image_runner), [replace(request, seed=11)])[0][0]
    assert (three[2] - last).abs().max() < TOLERANCE


def encodes(runner: TorchRunner, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many prompts each call of the text encoder gets from now on."""
    counts: list[int] = []
    encode = runner.model.encode

    def counting(prompts: Sequence[Prompt]) -> list[Embedding]:
        counts.append(len(prompts))
        return encode(prompts)

    monkeypatch.setattr(runner.model, "encode", counting)
    return counts


def test_waiting_prompts_are_encoded_together_and_once(
    z_image_runner: TorchRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = encodes(z_image_runner, monkeypatch)
    requests = [
        GenerationRequest(prompt=f"w{i}", width=64, height=64, num_inference_steps=2, guidance_scale=scale, seed=1)
        for i, scale in enumerate((0.0, 2.0, 3.0, 0.0))
    ]
    engine = make_engine(z_image_runner)
    engine.generate([*requests[:3], requests[0], requests[3]])
    assert counts == [4, 1]  # three prompts and the empty negative one; the fifth request doesn't fit that step
    engine.generate(requests)
    assert counts == [4, 1]


def test_what_was_encoded_anew_is_told(z_image_runner: TorchRunner) -> None:
    runner = TorchRunner(z_image_runner.model)

    def jobs(*prompts: str) -> list[Job]:
        requests = [
            GenerationRequest(prompt=prompt, width=64, height=64, guidance_scale=2.0).resolve(runner.info)
            for prompt in prompts
        ]
        return [Job(str(i), 0, request, runner.lengths(request), 0.0) for i, request in enumerate(requests)]

    assert runner.encode(jobs("w1", "w2")) == Encoded(3, [])  # and the empty negative one
    assert runner.encode(jobs("w2", "w3")) == Encoded(1, [])
    assert runner.encode(jobs("w1")) == Encoded(0, [])


def test_without_room_nothing_is_kept_of_prompts(z_image_runner: TorchRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = encodes(z_image_runner, monkeypatch)
    runner = TorchRunner(z_image_runner.model, MemoryConfig(embedding_cache_mb=0.0))
    request = GenerationRequest(prompt="w1", width=64, height=64, num_inference_steps=1, guidance_scale=0.0)
    for _ in range(2):
        Engine(runner, EngineConfig()).generate([request])
    assert counts == [1, 1]


def test_an_image_passes_the_vae_once_for_all_outputs(
    z_image_runner: TorchRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    encode = z_image_runner.model.encode_image

    def counting(image: InputImage, width: int, height: int) -> Posterior:
        sizes.append((width, height))
        return encode(image, width, height)

    monkeypatch.setattr(z_image_runner.model, "encode_image", counting)
    image = picture(64, 64)
    request = GenerationRequest(prompt="w1", images=(image,), strength=0.5, num_inference_steps=2, n=3, seed=1)
    engine = make_engine(z_image_runner)
    outputs = engine.generate([request, replace(request, width=96, height=64)])
    assert sizes == [(64, 64), (96, 64)]
    assert len({output.pixels for output in outputs[0]}) == 3


def test_a_step_that_fails_at_its_end_can_be_tried_again(
    z_image_runner: TorchRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    image, mask = picture(64, 64), disc(64, 64)
    request = GenerationRequest(prompt="w1", images=(image,), mask=mask, strength=1.0, num_inference_steps=3, seed=1)
    requests = [request, replace(request, seed=2)]
    expected = run(make_engine(z_image_runner), requests)
    blend, faults = runner_module._blend, iter([True])

    def failing(*args: Any) -> None:
        if next(faults, False):
            raise torch.OutOfMemoryError("as if")
        blend(*args)

    monkeypatch.setattr(runner_module, "_blend", failing)
    again = run(make_engine(z_image_runner), requests)
    assert max((a[0] - b[0]).abs().max() for a, b in zip(again, expected, strict=True)) < TOLERANCE


def test_a_step_that_fails_in_its_middle_can_be_tried_again(
    wan_runner: TorchRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = GenerationRequest(prompt="w1", width=32, height=32, num_frames=5, num_inference_steps=5, seed=1)
    requests = [first, replace(first, flow_shift=1.0, seed=2), replace(first, num_inference_steps=7, seed=3)]
    expected = run(make_engine(wan_runner), requests)
    step, calls = runner_module.solver_step, iter(range(1000))

    def failing(*args: Any) -> Any:
        if next(calls) in (1, 7, 13):
            raise torch.OutOfMemoryError("as if")
        return step(*args)

    monkeypatch.setattr(runner_module, "solver_step", failing)
    again = run(make_engine(wan_runner), requests)
    assert next(calls) > 5 + 5 + 7 + 3
    assert max((a[0] - b[0]).abs().max() for a, b in zip(again, expected, strict=True)) < TOLERANCE


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
