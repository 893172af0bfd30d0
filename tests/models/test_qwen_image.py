import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
    QwenImageImg2ImgPipeline,
    QwenImageInpaintPipeline,
    QwenImagePipeline,
)
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus
from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus import calculate_dimensions
from tests.models import tiny_qwen
from tests.models.parity import BFLOAT16, TOLERANCE, Case, Parity, disc, fields, generator, picture, pil
from tests.recording import make_engine, run

from stepbatch import EngineConfig, GenerationRequest
from stepbatch.config import ModelConfig
from stepbatch.engine.runner import TorchRunner
from stepbatch.errors import CheckpointError, InvalidValue
from stepbatch.models.native import load_model
from stepbatch.sizes import of_area

PLUS, ZERO = "Qwen-Image-Edit-Plus", "Qwen-Image-Edit-Plus, zero_cond_t"
CHECKPOINTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "Qwen-Image": (QwenImagePipeline, {}),
    "Qwen-Image-Edit": (QwenImageEditPipeline, {}),
    PLUS: (QwenImageEditPlusPipeline, {}),
    ZERO: (QwenImageEditPlusPipeline, {"zero_cond_t": True}),
}
ARGUMENTS = ("prompt", "negative_prompt", "num_inference_steps", "true_cfg_scale", "strength", "width", "height")
SQUARE, WIDE, HIGH = {"width": 64, "height": 64}, {"width": 96, "height": 64}, {"width": 48, "height": 80}
LONG = " ".join(f"w{i}" for i in range(60))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("qwen")
    return {
        name: tiny_qwen.qwen_image(folder / f"tiny-{i}", pipeline, **config)
        for i, (name, (pipeline, config)) in enumerate(CHECKPOINTS.items())
    }


@pytest.fixture(scope="module")
def runners(checkpoints: dict[str, Path]) -> dict[str, TorchRunner]:
    return {name: load(path) for name, path in checkpoints.items()}


def load(path: Path, **settings: Any) -> TorchRunner:
    return TorchRunner(load_model(EngineConfig(model=ModelConfig(model_path=str(path), **settings))))


def make_case(variant: str, draw: Callable[[GenerationRequest], torch.Tensor], **given: Any) -> Case:
    request = GenerationRequest(**given)
    return Case(variant, request, lambda: draw(request))


def text_cases(path: Path) -> list[Case]:
    pipelines = {None: QwenImagePipeline.from_pretrained(path)}
    pipelines["image"] = QwenImageImg2ImgPipeline.from_pipe(pipelines[None])
    pipelines["mask"] = QwenImageInpaintPipeline.from_pipe(pipelines[None])
    for pipeline in pipelines.values():
        pipeline.set_progress_bar_config(disable=True)

    def draw(request: GenerationRequest) -> torch.Tensor:
        given = fields(request, *ARGUMENTS) | {"generator": generator(request), "output_type": "latent"}
        kind = None
        if request.images:
            kind, given["image"] = "image", pil(request.images[0])
        if request.mask is not None:
            kind, given["mask_image"] = "mask", pil(request.mask)
        return pipelines[kind](**given).images[0]

    def case(variant: str, **given: Any) -> Case:
        return make_case(f"Qwen-Image, {variant}", draw, **given)

    seen, wide = picture(64, 64), picture(120, 70, 1)
    true_cfg, from_image, inpainting = "true CFG", "image-to-image", "inpainting"
    return [
        case("text-to-image", prompt="w1 w2", num_inference_steps=3, seed=1, **SQUARE),
        case("text-to-image", prompt=LONG, num_inference_steps=5, seed=2**40, **HIGH),
        case(true_cfg, prompt="w3, w4", negative_prompt=LONG, true_cfg_scale=3, num_inference_steps=4, seed=2, **WIDE),
        case(true_cfg, prompt=LONG, negative_prompt="", true_cfg_scale=1.5, num_inference_steps=2, seed=3, **HIGH),
        case(from_image, prompt="w5", images=(seen,), strength=0.6, num_inference_steps=5, seed=4, **SQUARE),
        case(
            from_image, prompt="w6", negative_prompt="w7 w8", true_cfg_scale=4.0, images=(wide,), strength=0.25,
            num_inference_steps=4, seed=5, **WIDE,
        ),
        case(
            inpainting, prompt="w9", images=(seen,), mask=disc(64, 64), strength=1.0, num_inference_steps=3, seed=6,
            **SQUARE,
        ),
        case(
            inpainting, prompt=LONG, negative_prompt="w1", true_cfg_scale=2.0, images=(wide,), mask=disc(120, 70),
            strength=0.7, num_inference_steps=4, seed=7, **WIDE,
        ),
    ]  # fmt: skip


def edit_cases(name: str, path: Path) -> list[Case]:
    cls = CHECKPOINTS[name][0]
    pipeline = tiny_qwen.diffusers_editor(cls, path)
    pipeline.set_progress_bar_config(disable=True)
    several = cls is QwenImageEditPlusPipeline

    def draw(request: GenerationRequest) -> torch.Tensor:
        images = [pil(image) for image in request.images]
        given = fields(request, *ARGUMENTS) | {"generator": generator(request), "output_type": "latent"}
        return pipeline(image=images if several else images[0], **given).images[0]

    def case(variant: str, **given: Any) -> Case:
        return make_case(f"{name}, {variant}", draw, **given)

    seen, wide, high = picture(64, 64), picture(120, 70, 1), picture(30, 60, 2)
    two = "edit with two references"
    cases = [
        case("edit", prompt="w1 w2", images=(seen,), num_inference_steps=3, seed=1, **WIDE),
        case("edit", prompt=LONG, images=(wide,), num_inference_steps=2, seed=2),
        case(
            "edit, true CFG", prompt="w3", negative_prompt=LONG, true_cfg_scale=3.0, images=(high,),
            num_inference_steps=4, seed=3, **HIGH,
        ),
    ]  # fmt: skip
    if several:
        cases += [
            case(two, prompt="w4, w5", images=(high, wide), num_inference_steps=3, seed=4),
            case(
                two, prompt="w6", negative_prompt="", true_cfg_scale=2.0, images=(seen, high), num_inference_steps=4,
                seed=5, **SQUARE,
            ),
        ]  # fmt: skip
    return cases if name != ZERO else cases[2:]


@pytest.fixture(scope="module")
def small_areas() -> Iterator[None]:
    """Let diffusers bring images to the areas in the small checkpoints' ``stepbatch.json``."""
    areas = {1024 * 1024: tiny_qwen.REFERENCE_AREA, 384 * 384: tiny_qwen.PROMPT_AREA["QwenImageEditPlusPipeline"]}

    def small(area: int, ratio: float) -> tuple[int, int]:
        return calculate_dimensions(areas[area], ratio)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline_qwenimage_edit, "calculate_dimensions", lambda *given: (*small(*given), None))
        patch.setattr(pipeline_qwenimage_edit_plus, "calculate_dimensions", small)
        yield


@pytest.fixture(scope="module", params=CHECKPOINTS)
def parity(
    request: pytest.FixtureRequest, checkpoints: dict[str, Path], runners: dict[str, TorchRunner], small_areas: None
) -> Parity:
    name = request.param
    cases = text_cases(checkpoints[name]) if name == "Qwen-Image" else edit_cases(name, checkpoints[name])
    return Parity(runners[name], cases)


def test_alone_it_draws_what_diffusers_draws(parity: Parity) -> None:
    assert parity.alone() < TOLERANCE


@pytest.mark.parametrize(("width", "reverse"), [(16, False), (3, True)])
def test_in_company_it_draws_what_diffusers_draws(parity: Parity, width: int, reverse: bool) -> None:
    assert parity.in_company(width, reverse) < TOLERANCE


def test_in_bfloat16_company_moves_a_picture_little(parity: Parity) -> None:
    assert parity.in_bfloat16(Path(parity.runner.info.path)) < BFLOAT16


def test_without_fused_projections_too(parity: Parity) -> None:
    engine = make_engine(load(Path(parity.runner.info.path), fuse_projections=False))
    ours = run(engine, [parity.cases[-1].request])[0][0]
    assert (ours - parity.expected[-1]).abs().max() < TOLERANCE


@pytest.mark.parametrize("name", ["Qwen-Image", PLUS])
def test_pixels_are_those_of_diffusers(
    name: str, checkpoints: dict[str, Path], runners: dict[str, TorchRunner], small_areas: None
) -> None:
    seen, path = picture(70, 50, 3), checkpoints[name]
    request = GenerationRequest(prompt="w1 w2", num_inference_steps=2, seed=1, **WIDE)
    given = fields(request, *ARGUMENTS) | {"generator": generator(request)}
    if name == "Qwen-Image":
        pipeline = QwenImagePipeline.from_pretrained(path)
    else:
        pipeline = tiny_qwen.diffusers_editor(QwenImageEditPlusPipeline, path)
        request, given["image"] = replace(request, images=(seen,)), [pil(seen)]
    pipeline.set_progress_bar_config(disable=True)
    output = make_engine(runners[name]).generate([request])[0][0]
    ours = np.frombuffer(output.pixels, np.uint8).reshape(output.height, output.width, 3).astype(int)
    theirs = np.asarray(pipeline(**given).images[0])
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= 1


def test_images_can_have_the_positions_of_training(checkpoints: dict[str, Path], small_areas: None) -> None:
    path, images = checkpoints[PLUS], (picture(120, 70, 1), picture(30, 60, 2))
    request = GenerationRequest(prompt="w1 w2", images=images, num_inference_steps=3, seed=1, **WIDE)
    given = fields(request, *ARGUMENTS) | {"image": [pil(image) for image in images], "output_type": "latent"}
    drawn = {}
    for name in ("diffusers", "trained"):
        pipeline = tiny_qwen.diffusers_editor(QwenImageEditPlusPipeline, path, trained=name == "trained")
        pipeline.set_progress_bar_config(disable=True)
        expected = pipeline(generator=generator(request), **given).images[0]
        drawn[name] = run(make_engine(load(path, image_positions=name)), [request])[0][0]
        assert (drawn[name] - expected).abs().max() < TOLERANCE
    assert (drawn["trained"] - drawn["diffusers"]).abs().max() > 100 * TOLERANCE


def test_a_single_step_is_refused_where_the_schedule_has_none(runners: dict[str, TorchRunner]) -> None:
    info = runners["Qwen-Image"].info
    with pytest.raises(InvalidValue, match="more than 1") as caught:
        runners["Qwen-Image"].check(GenerationRequest(prompt="w1", num_inference_steps=1, **SQUARE).resolve(info))
    assert caught.value.param == "num_inference_steps"


def test_n_outputs_have_the_seeds_in_a_row(runners: dict[str, TorchRunner]) -> None:
    request = GenerationRequest(prompt="w1", images=(picture(64, 64),), num_inference_steps=2, seed=1, n=2, **SQUARE)
    engine = make_engine(runners[ZERO])
    both = run(engine, [request])[0]
    single = [run(engine, [replace(request, seed=seed, n=1)])[0][0] for seed in (1, 2)]
    assert max((a - b).abs().max() for a, b in zip(both, single, strict=True)) < 1e-5


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_tokens_are_the_rows_of_its_sequences(name: str, runners: dict[str, TorchRunner]) -> None:
    runner = runners[name]
    images = () if name == "Qwen-Image" else (picture(70, 50), picture(30, 60))[: runner.info.max_images]
    given = GenerationRequest(prompt="w1 w2", negative_prompt="w3", true_cfg_scale=2.0, images=images, **WIDE)
    request = given.resolve(runner.info)
    model = runner.model
    sizes = model.image_sizes(request)
    posteriors = [model.encode_image(image, *size) for image, size in zip(images, sizes, strict=True)]
    prompts, start = model.prompts(request), model.start(request, 0, posteriors)
    rows = [len(embedding.rows) for embedding in model.encode(prompts)]
    assert rows == [prompt.length for prompt in prompts]
    pictures = len(start.latents) + sum(len(reference.rows) for reference in start.references)
    assert sum(runner.lengths(request)) == sum(rows) + 2 * pictures


def test_an_edits_embedding_depends_on_its_image(runners: dict[str, TorchRunner]) -> None:
    runner = runners["Qwen-Image-Edit"]
    given = [GenerationRequest(prompt="w1", images=(picture(64, 64, seed),)) for seed in (0, 1)]
    one, other = (runner.model.prompts(request.resolve(runner.info))[0] for request in given)
    assert one.ids == other.ids
    assert one.key != other.key
    first, second, again = (embedding.rows for embedding in runner.model.encode([one, other, one]))
    assert (first - second).abs().max() > 1e-2
    assert (first - again).abs().max() < 1e-5


def test_a_prompts_images_take_no_part_in_its_limit(runners: dict[str, TorchRunner]) -> None:
    runner = runners[PLUS]
    images = (picture(64, 64), picture(64, 64, 1))
    prompt = runner.model.prompts(GenerationRequest(prompt="w1 w2", images=images).resolve(runner.info))[0]
    patches = 2 * (32 // 4 // 2) ** 2
    assert prompt.length == runner.model.prompt_tokens(prompt) + patches
    words, ending, picture_tokens = 2, 5, 5  # <|im_end|>, \n, ... and Picture, 1, :, <|vision_start|>, <|vision_end|>
    assert runner.model.prompt_tokens(prompt) == words + ending + len(images) * picture_tokens


@pytest.mark.parametrize("name", ["Qwen-Image", "Qwen-Image-Edit"])
def test_an_over_long_prompt_is_refused_by_name(name: str, runners: dict[str, TorchRunner]) -> None:
    runner = runners[name]
    images = () if name == "Qwen-Image" else (picture(64, 64),)
    for field in ("prompt", "negative_prompt"):
        given = {"prompt": "w1", "max_sequence_length": 60, "images": images, field: LONG}
        with pytest.raises(InvalidValue, match=r"6\d tokens and at most 60") as caught:
            runner.check(GenerationRequest(**given).resolve(runner.info))
        assert caught.value.param == field
    with pytest.raises(InvalidValue, match="from 1 to 1024"):
        GenerationRequest(prompt="w1", max_sequence_length=1025, images=images).resolve(runner.info)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_guidance_scale_is_refused_with_the_right_name(name: str, runners: dict[str, TorchRunner]) -> None:
    with pytest.raises(InvalidValue, match="true_cfg_scale") as caught:
        GenerationRequest(prompt="w1", guidance_scale=4.0).resolve(runners[name].info)
    assert caught.value.param == "guidance_scale"


def test_an_edit_refuses_images_it_cannot_look_at(runners: dict[str, TorchRunner]) -> None:
    runner = runners["Qwen-Image-Edit"]
    thin = GenerationRequest(prompt="w1", images=(picture(1, 9000),), **SQUARE).resolve(runner.info)
    with pytest.raises(InvalidValue, match="200 times") as caught:
        runner.check(thin)
    assert caught.value.param == "images"
    for field in ("prompt", "negative_prompt"):
        given = {"prompt": "w1", "images": (picture(64, 64),), field: "a <|image_pad|>"}
        with pytest.raises(InvalidValue, match="stands for an image") as caught:
            runner.check(GenerationRequest(**given).resolve(runner.info))
        assert caught.value.param == field
    with pytest.raises(InvalidValue, match="at most 1 image "):
        GenerationRequest(prompt="w1", images=(picture(64, 64),) * 2).resolve(runner.info)
    with pytest.raises(InvalidValue, match="needs an image"):
        GenerationRequest(prompt="w1").resolve(runner.info)


@pytest.mark.parametrize(
    "config",
    [{"guidance_embeds": True}, {"use_additional_t_cond": True}, {"use_layer3d_rope": True}, {"patch_size": 1}],
    ids=lambda config: next(iter(config)),
)
def test_other_transformers_are_refused(checkpoints: dict[str, Path], tmp_path: Path, config: dict[str, Any]) -> None:
    copy = Path(shutil.copytree(checkpoints["Qwen-Image"], tmp_path / "copy"))
    file = copy / "transformer" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    with pytest.raises(CheckpointError, match=next(iter(config))) as caught:
        load(copy)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["qwen-image-edit-2509", "Qwen-Image-Edit-2511"])
def test_checkpoints_known_by_name(checkpoints: dict[str, Path], tmp_path: Path, name: str) -> None:
    info = load(Path(shutil.copytree(checkpoints[PLUS], tmp_path / name))).info
    assert (info.defaults.num_inference_steps, info.defaults.true_cfg_scale) == (40, 4.0)


def test_a_checkpoint_of_another_task_is_the_same_model(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    copy = Path(shutil.copytree(checkpoints["Qwen-Image"], tmp_path / "copy"))
    index = json.loads((copy / "model_index.json").read_text()) | {"_class_name": "QwenImageInpaintPipeline"}
    (copy / "model_index.json").write_text(json.dumps(index))
    assert load(copy).info.defaults.num_inference_steps == 50


def test_a_processor_that_is_broken_is_named(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    copy = Path(shutil.copytree(checkpoints[PLUS], tmp_path / "copy"))
    (copy / "processor" / "preprocessor_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"preprocessor_config\.json can't be read") as caught:
        load(copy)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("area", [1024 * 1024, 384 * 384])
def test_areas_become_the_sizes_that_diffusers_computes(area: int) -> None:
    for width, height in ((1, 1), (640, 480), (480, 640), (1920, 1080), (1000, 3000), (777, 1234), (4000, 200)):
        assert of_area(width, height, area, 32) == calculate_dimensions(area, width / height)
