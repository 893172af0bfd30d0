"""A call for several requests draws what calls for each draw, and what diffusers draws; nothing is lost or made up."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    UNet2DModel,
)
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from tests.models.parity import disc, pil
from tests.models.pipelines import LONG, SHORT, ask, checkpoint, difference, draw, images, load
from transformers import CLIPConfig, CLIPImageProcessorPil

from stepbatch.errors import CheckpointError, ContentRejected, GenerationFailed, InvalidModelOutput, InvalidValue
from stepbatch.image import InputImage
from stepbatch.models.pipeline import Pipeline
from stepbatch.request import GenerationRequest

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # noise schedules of diffusers
    pytest.mark.filterwarnings("ignore:The configuration file of the vae:FutureWarning"),  # upscaling wants another
]
TOLERANCE = 1e-4  # of pixels from 0 to 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pipelines")


@pytest.fixture(scope="module")
def stable(folder: Path) -> Pipeline:
    return load(checkpoint("stable-diffusion", folder))


@pytest.fixture(scope="module")
def sd3(folder: Path) -> Pipeline:
    return load(checkpoint("stable-diffusion-3", folder))


def company(pipeline: Pipeline, **fields: Any) -> list[GenerationRequest]:
    """Requests that share a call, with prompts of very different length, and a seed and an image of each."""
    requests = []
    for seed, prompt in enumerate((SHORT, LONG, "w")):
        own: dict[str, Any] = {"prompt": prompt, "seed": seed} | fields
        if "images" in fields:
            own["images"] = images(48, 80 + 16 * seed, seed)
        if "mask" in fields:
            own["mask"] = disc(48, 80 + 16 * seed)
        if "negative_prompt" in fields:
            own["negative_prompt"] = [LONG, "", "blurry"][seed]
        requests.append(ask(pipeline, **own))
    return requests


CASES = [  # that are not in tests/pipelines/test_same.py
    ("stable-diffusion", {}),
    ("stable-diffusion", {"guidance_scale": 1.0}),
    ("stable-diffusion", {"images": (), "mask": None}),
    ("stable-diffusion-3", {"negative_prompt": "", "flow_shift": 5.0}),
    ("ltx", {"width": 96, "images": ()}),
]


@pytest.mark.parametrize(
    ("kind", "fields"), CASES, ids=lambda value: value if isinstance(value, str) else "-".join(value)
)
def test_company_changes_nothing(folder: Path, kind: str, fields: dict[str, Any]) -> None:
    pipeline = load(checkpoint(kind, folder))
    requests = company(pipeline, **fields)
    assert len({pipeline.signature(request) for request in requests}) == 1
    assert all(pipeline.shares(request) for request in requests)
    together = draw(pipeline, *requests)
    alone = [draw(pipeline, request)[0] for request in requests]
    assert difference(together, alone) < TOLERANCE
    again = draw(pipeline, *requests)  # a noise schedule keeps nothing of the call before
    assert difference(together, again) == 0
    assert min(difference([a], [b]) for a, b in zip(alone, alone[1:] + alone[:1], strict=True)) > 0.05


def theirs(path: Path, request: GenerationRequest, **more: Any) -> torch.Tensor:
    """What diffusers draws when it is asked as its documentation says."""
    made: Any = DiffusionPipeline.from_pretrained(path)
    if request.mask is not None:
        made = AutoPipelineForInpainting.from_pipe(made)
    elif request.strength is not None:
        made = AutoPipelineForImage2Image.from_pipe(made)
    made.set_progress_bar_config(disable=True)
    given: dict[str, Any] = {"generator": torch.Generator("cpu").manual_seed(request.seed or 0), "output_type": "np"}
    if request.negative_prompt is not None:
        given["negative_prompt"] = request.negative_prompt
    if request.images:
        given["image"] = pil(request.images[0]).resize(request.size, resample=1)  # Lanczos
    if request.mask is not None:
        given["mask_image"] = pil(request.mask).resize(request.size, resample=1)
    steps = request.num_inference_steps
    output = made(prompt=request.prompt, num_inference_steps=steps, **given, **more, return_dict=False)[0][0]
    frames = torch.from_numpy(output).float()
    return frames if frames.ndim == 4 else frames.unsqueeze(0)


SIZE = {"width": 64, "height": 64}


@pytest.mark.parametrize(("kind", "fields", "more"), [
    ("stable-diffusion", {"images": images(), "mask": disc(48, 80)}, SIZE),
    ("stable-diffusion-3", {"images": images(), "strength": 0.7}, {**SIZE, "strength": 0.7}),
])  # fmt: skip
def test_as_diffusers_draws_it(folder: Path, kind: str, fields: dict[str, Any], more: dict[str, Any]) -> None:
    path = checkpoint(kind, folder)
    pipeline = load(path)
    request = ask(pipeline, seed=7, **fields)
    [ours] = draw(pipeline, request)
    assert difference([ours], [theirs(path, request, **more)]) < TOLERANCE


def test_a_noise_schedule_is_shifted_for_one_call(folder: Path, sd3: Pipeline) -> None:
    plain, same, other = (draw(sd3, ask(sd3, flow_shift=shift))[0] for shift in (None, 3.0, 7.0))
    assert difference([plain], [same]) == 0
    assert difference([plain], [other]) > 0.01
    assert difference([plain], draw(sd3, ask(sd3))) == 0


def test_progress_is_told_as_the_pipeline_takes_its_steps(stable: Pipeline) -> None:
    for fields, expected in (
        ({}, [(1, 4), (2, 4), (3, 4), (4, 4)]),  # this noise schedule takes one twice
        ({"images": images(), "strength": 0.5, "num_inference_steps": 4}, [(1, 3), (2, 3), (3, 3)]),
    ):
        assert progress(stable, **fields) == expected


def progress(pipeline: Pipeline, **fields: Any) -> list[tuple[int, int]]:
    """What a call tells of its steps."""
    told: list[tuple[int, int]] = []
    draw(pipeline, ask(pipeline, **fields), tick=lambda *now: told.append(now))
    return told


def test_pipelines_that_only_know_the_old_callback_tell_progress_too(folder: Path) -> None:
    pipeline = load(checkpoint("pixart-sigma", folder))
    assert progress(pipeline) == [(1, 3), (2, 3), (3, 3)]


def test_a_call_that_is_broken_off_leaves_no_trace(stable: Pipeline) -> None:
    def stop(step: int, steps: int) -> None:
        if step == 2:
            raise GenerationFailed("enough")

    before = draw(stable, ask(stable))
    with pytest.raises(GenerationFailed, match="enough"):
        draw(stable, ask(stable, prompt=LONG), tick=stop)
    assert difference(before, draw(stable, ask(stable))) == 0


@pytest.mark.parametrize("field", ["prompt", "negative_prompt"])
def test_texts_that_would_be_cut_off_are_refused(stable: Pipeline, sd3: Pipeline, field: str) -> None:
    """By the tokenizer that keeps most: here CLIP's, there T5's."""
    stable.check(ask(stable, **{field: " a" * 75}))
    with pytest.raises(InvalidValue, match=f"^{field} has 78 tokens and at most 77 are allowed") as caught:
        stable.check(ask(stable, **{field: " a" * 76}))
    assert caught.value.param == field
    sd3.check(ask(sd3, **{field: " a" * 150}))
    with pytest.raises(InvalidValue, match=f"^{field} has 151 tokens and at most 150 are allowed"):
        sd3.check(ask(sd3, max_sequence_length=150, **{field: " a" * 150}))


def test_what_the_pipelines_own_checks_refuse_names_the_field(sd3: Pipeline) -> None:
    with pytest.raises(InvalidValue, match="512") as caught:
        draw(sd3, ask(sd3, max_sequence_length=600))
    assert caught.value.param == "max_sequence_length"


def test_strength_must_leave_a_step(stable: Pipeline, sd3: Pipeline) -> None:
    few = {"images": images(), "strength": 0.3, "num_inference_steps": 2}
    with pytest.raises(InvalidValue, match=r"0\.3 of 2 steps is none") as caught:
        stable.check(ask(stable, **few))
    assert caught.value.param == "strength"
    assert draw(sd3, ask(sd3, **few))


def test_noise_that_is_no_requests_own_keeps_company_away(folder: Path, tmp_path: Path) -> None:
    """Else a picture would depend on it; each is drawn from its seed all the same."""
    path = Path(shutil.copytree(checkpoint("stable-diffusion-3", folder), tmp_path / "stochastic"))
    config = json.loads((path / "scheduler/scheduler_config.json").read_text())
    (path / "scheduler/scheduler_config.json").write_text(json.dumps(config | {"stochastic_sampling": True}))
    pipeline = load(path)
    requests = company(pipeline)
    assert pipeline.shares(requests[0])
    state = torch.get_rng_state()
    with pytest.raises(GenerationFailed, match="noise of its own"):
        draw(pipeline, *requests)
    assert not pipeline.shares(requests[0])
    assert difference(draw(pipeline, requests[0]), draw(pipeline, requests[0])) == 0
    assert torch.equal(state, torch.get_rng_state())


def test_values_that_are_not_finite_are_told(folder: Path) -> None:
    pipeline = load(checkpoint("stable-diffusion", folder))
    own = pipeline._calls["text"].pipeline
    own.vae.decoder.conv_out.bias.data[0] = torch.nan
    [outcome] = pipeline.draw([ask(pipeline)], [0], lambda *_: None)
    assert isinstance(outcome, InvalidModelOutput)


def test_another_size_than_was_asked_for_is_told(stable: Pipeline) -> None:
    pipeline = stable._calls["text"].pipeline
    vae = pipeline.vae
    decode = vae.decode
    vae.decode = lambda *args, **more: (decode(*args, **more)[0][..., :56],)
    try:
        [outcome] = stable.draw([ask(stable)], [0], lambda *_: None)
    finally:
        del vae.decode
    assert isinstance(outcome, GenerationFailed)
    assert "1x64x56x3" in outcome.message


def test_what_a_safety_checker_blackens_is_told(folder: Path, tmp_path: Path) -> None:
    made: Any = DiffusionPipeline.from_pretrained(checkpoint("stable-diffusion", folder))
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 32, "patch_size": 16, "projection_dim": 8}  # fmt: skip
    checker = StableDiffusionSafetyChecker(CLIPConfig(vision_config=vision, projection_dim=8))
    checker.concept_embeds_weights.data.fill_(-1.0)  # everything is too near to everything
    size = {"shortest_edge": 32}
    made.register_modules(
        safety_checker=checker,
        feature_extractor=CLIPImageProcessorPil(size=size, crop_size={"height": 32, "width": 32}),
    )
    made.save_pretrained(tmp_path)
    pipeline = load(tmp_path)
    outcomes = pipeline.draw([ask(pipeline), ask(pipeline)], [0, 1], lambda *_: None)
    assert [type(outcome) for outcome in outcomes] == [ContentRejected] * 2


def test_a_pipeline_without_prompts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    unet = UNet2DModel(
        sample_size=16, block_out_channels=(8, 8), down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2, norm_num_groups=4, layers_per_block=1,
    )  # fmt: skip
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path)
    pipeline = load(tmp_path)
    assert "prompts have no effect" in caplog.text
    assert (pipeline.info.min_side, pipeline.info.max_side, pipeline.info.uses) == (16, 16, ())
    requests = [ask(pipeline, width=16, height=16, seed=seed) for seed in (1, 2)]
    together = draw(pipeline, *requests)
    assert difference(together, [draw(pipeline, request)[0] for request in requests]) < TOLERANCE
    with pytest.raises(InvalidValue, match="width must be"):
        ask(pipeline)


def test_a_class_that_diffusers_does_not_have(folder: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(checkpoint("stable-diffusion", folder), tmp_path / "copy"))
    index = json.loads((path / "model_index.json").read_text())
    for name, expected in (("NoSuchPipeline", "has no NoSuchPipeline"), ("UNet2DModel", "can't run a UNet2DModel")):
        (path / "model_index.json").write_text(json.dumps(index | {"_class_name": name}))
        with pytest.raises(CheckpointError, match=expected):
            load(path)


@pytest.mark.parametrize("part", [["pipeline", "MyPipeline"], ["my_code", "MyUNet"]])
def test_no_code_of_a_checkpoint_is_run(folder: Path, tmp_path: Path, part: list[str]) -> None:
    path = Path(shutil.copytree(checkpoint("stable-diffusion", folder), tmp_path / "copy"))
    (path / "pipeline.py").write_text("raise SystemExit('it was run')")
    (path / "unet" / "my_code.py").write_text("raise SystemExit('it was run')")
    index = json.loads((path / "model_index.json").read_text())
    name = "_class_name" if part[0] == "pipeline" else "unet"
    (path / "model_index.json").write_text(json.dumps(index | {name: part}))
    with pytest.raises(CheckpointError):
        load(path)


def test_a_pipeline_that_wants_what_no_request_brings(tmp_path: Path, folder: Path) -> None:
    path = Path(shutil.copytree(checkpoint("stable-diffusion", folder), tmp_path / "copy"))
    index = json.loads((path / "model_index.json").read_text())
    (path / "model_index.json").write_text(
        json.dumps(index | {"_class_name": "StableDiffusionUpscalePipeline", "low_res_scheduler": index["scheduler"]})
    )
    shutil.copytree(path / "scheduler", path / "low_res_scheduler")
    with pytest.raises(CheckpointError, match="StableDiffusionUpscalePipeline can't be served"):
        load(path)


@pytest.mark.parametrize("name", ["Qwen-Image-2512", "Z-Image-Turbo", "FLUX.1-dev"])
def test_random_weights_from_configs_alone(name: str) -> None:
    pipeline = Pipeline(*_dummy(name))
    assert pipeline.info.defaults.width == 256
    requests = company(pipeline, negative_prompt="", num_inference_steps=2)
    together = draw(pipeline, *requests)
    assert difference(together, [draw(pipeline, request)[0] for request in requests]) < TOLERANCE
    assert min(drawn.std() for drawn in together) > 0.01


def test_random_weights_of_any_checkpoints_configs(folder: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(checkpoint("stable-diffusion", folder), tmp_path / "configs"))
    for file in path.rglob("*.safetensors"):
        file.unlink()
    pipeline = load(path, load_format="dummy")
    assert draw(pipeline, ask(pipeline))[0].std() > 0.01
    with pytest.raises(CheckpointError, match="no small UNet2DConditionModel"):
        load(path, load_format="dummy", dummy_size="small")


def _dummy(name: str) -> Any:
    from stepbatch.config import EngineConfig, ModelConfig
    from stepbatch.models.dummy import CONFIGS

    config = EngineConfig(model=ModelConfig(model_path=name, load_format="dummy", dummy_size="small"))
    return config, CONFIGS / name


def test_templates_count_as_they_are_cut() -> None:
    """A prompt of exactly the limit is whole in what the text encoder gives; one word more is refused."""
    for name in ("Qwen-Image-2512", "Z-Image-Turbo"):
        pipeline = Pipeline(*_dummy(name))
        limit = 40
        words = 1
        while _accepts(pipeline, "a " * words, limit):
            words += 1
        own = pipeline._calls["text"].pipeline
        whole, more = (own.encode_prompt(["a " * n], max_sequence_length=limit)[0][0] for n in (words - 1, words))
        assert len(whole) == limit
        assert len(more) == limit  # cut off
        torch.testing.assert_close(whole, own.encode_prompt(["a " * (words - 1)], max_sequence_length=500)[0][0])


def _accepts(pipeline: Pipeline, prompt: str, limit: int) -> bool:
    try:
        pipeline.check(ask(pipeline, prompt=prompt, max_sequence_length=limit))
    except InvalidValue:
        return False
    return True


def test_mask_of_a_picture_as_large_as_the_output(stable: Pipeline) -> None:
    """What the mask keeps stays near the image."""
    image = images(64, 64)
    nothing = InputImage(64, 64, bytes(64 * 64))
    [kept] = draw(stable, ask(stable, images=image, mask=nothing))
    [drawn] = draw(stable, ask(stable, images=image, mask=InputImage(64, 64, b"\xff" * 64 * 64)))
    assert difference([kept], [drawn]) > 0.05


def test_the_rate_of_a_video_matters_only_to_pipelines_that_are_told(folder: Path) -> None:
    for kind, matters in (("wan", False), ("ltx", True)):
        pipeline = load(checkpoint(kind, folder))
        slow, fast = (pipeline.signature(ask(pipeline, fps=fps)) for fps in (8, 16))
        assert (slow != fast) is matters, kind


@pytest.mark.parametrize(
    ("kind", "good", "bad", "bounds"),
    [("stable-diffusion", 999, 1000, "from 1 to 999"), ("ltx", 2, 1, "from 2 to 1000")],
)
def test_steps_that_its_noise_schedule_has_not_are_refused(
    folder: Path, kind: str, good: int, bad: int, bounds: str
) -> None:
    pipeline = load(checkpoint(kind, folder))
    assert pipeline.check(ask(pipeline, num_inference_steps=good)) is None
    with pytest.raises(InvalidValue, match=bounds) as caught:
        pipeline.check(ask(pipeline, num_inference_steps=bad))
    assert caught.value.param == "num_inference_steps"
