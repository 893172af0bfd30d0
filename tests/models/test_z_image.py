from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import ZImageImg2ImgPipeline, ZImageInpaintPipeline, ZImagePipeline
from tests.models import tiny
from tests.models.parity import BFLOAT16, TOLERANCE, Case, Parity, disc, fields, generator, picture, pil
from tests.recording import make_engine, run

from stepbatch import EngineConfig, GenerationRequest
from stepbatch.config import BatchingConfig, ModelConfig
from stepbatch.engine.runner import TorchRunner
from stepbatch.errors import InvalidValue
from stepbatch.models.native import load_model

LONG, LONGER = " ".join(f"w{i}" for i in range(40)), " ".join(f"w{i}" for i in range(75))

REQUESTS = [
    GenerationRequest(prompt="w1 w2", width=64, height=64, num_inference_steps=3, guidance_scale=0.0, seed=1),
    GenerationRequest(prompt="w3", width=96, height=64, num_inference_steps=5, guidance_scale=2.5, seed=2**40),
    GenerationRequest(
        prompt=LONG, negative_prompt="w9 w8", width=72, height=88, num_inference_steps=4, guidance_scale=4.0, seed=7
    ),
    GenerationRequest(
        prompt="w5 w6", negative_prompt=LONGER, width=64, height=128, num_inference_steps=1, guidance_scale=0.5, seed=3
    ),
    GenerationRequest(prompt=LONGER, width=40, height=160, num_inference_steps=6, guidance_scale=1.0, seed=3, n=2),
]


def arguments(request: GenerationRequest) -> dict[str, object]:
    names = ("prompt", "negative_prompt", "width", "height", "num_inference_steps", "guidance_scale")
    return {name: getattr(request, name) for name in names}


def theirs(pipeline: ZImagePipeline, request: GenerationRequest) -> list[torch.Tensor]:
    """Diffusers' final latents of each output, as rows of tokens."""
    assert request.seed is not None
    rows = []
    for index in range(request.n):
        generator = torch.Generator("cpu").manual_seed(request.seed + index)
        latents = pipeline(**arguments(request), generator=generator, output_type="latent").images[0]
        c, h, w = latents.shape
        rows.append(latents.view(c, h // 2, 2, w // 2, 2).permute(1, 3, 2, 4, 0).reshape(-1, 4 * c))
    return rows


@pytest.fixture(scope="module")
def pipeline(z_image_path: Path) -> ZImagePipeline:
    loaded = ZImagePipeline.from_pretrained(z_image_path)
    loaded.set_progress_bar_config(disable=True)
    return loaded


@pytest.fixture(scope="module")
def expected(pipeline: ZImagePipeline) -> list[list[torch.Tensor]]:
    return [theirs(pipeline, request) for request in REQUESTS]


def from_images(pipeline: ZImagePipeline) -> list[Case]:
    """Image-to-image and inpainting, of several sizes, strengths and steps, beside text-to-image."""
    img2img = ZImageImg2ImgPipeline.from_pipe(pipeline)
    inpaint = ZImageInpaintPipeline.from_pipe(pipeline)
    for made in (img2img, inpaint):
        made.set_progress_bar_config(disable=True)
    names = ("prompt", "negative_prompt", "num_inference_steps", "guidance_scale", "strength", "width", "height")

    def draw(request: GenerationRequest) -> torch.Tensor:
        given = fields(request, *names) | {"image": pil(request.images[0]), "generator": generator(request)}
        if request.mask is None:
            latents = img2img(**given, output_type="latent").images[0]
        else:
            latents = inpaint(**given, mask_image=pil(request.mask), output_type="latent").images[0]
        c, h, w = latents.shape
        return latents.view(c, h // 2, 2, w // 2, 2).permute(1, 3, 2, 4, 0).reshape(-1, 4 * c)

    def case(variant: str, **given: object) -> Case:
        request = GenerationRequest(guidance_scale=given.pop("guidance_scale", 0.0), **given)  # type: ignore[arg-type]
        return Case(f"Z-Image, {variant}", request, lambda: draw(request))

    def prompt_only(request: GenerationRequest, steps: str) -> Case:
        return Case(f"Z-Image, {steps}", request, lambda: theirs(pipeline, request)[0])

    seen, wide = picture(64, 64), picture(96, 64, 1)
    return [
        case("image-to-image", prompt="w1", images=(seen,), strength=0.6, num_inference_steps=5, seed=3, **SQUARE),
        case("image-to-image", prompt="w2 w3", images=(wide,), strength=0.25, num_inference_steps=4, seed=4, **WIDE),
        case(
            "inpainting", prompt="w4", images=(seen,), mask=disc(64, 64),
            strength=1.0, num_inference_steps=3, seed=5, **SQUARE,
        ),
        case(
            "inpainting", prompt=LONG, negative_prompt="w1", guidance_scale=2.0, images=(wide,), mask=disc(96, 64),
            strength=0.7, num_inference_steps=4, seed=6, **WIDE,
        ),
        prompt_only(REQUESTS[0], "text-to-image"),
        prompt_only(REQUESTS[2], "text-to-image, guided"),
    ]  # fmt: skip


SQUARE, WIDE = {"width": 64, "height": 64}, {"width": 96, "height": 64}


@pytest.fixture(scope="module")
def parity(z_image_runner: TorchRunner, pipeline: ZImagePipeline) -> Parity:
    return Parity(z_image_runner, from_images(pipeline))


def test_image_to_image_and_inpainting_alone(parity: Parity) -> None:
    assert parity.alone() < TOLERANCE


@pytest.mark.parametrize(("width", "reverse"), [(16, False), (3, True)])
def test_image_to_image_and_inpainting_in_company(parity: Parity, width: int, reverse: bool) -> None:
    assert parity.in_company(width, reverse) < TOLERANCE


def test_company_in_bfloat16(parity: Parity, z_image_path: Path) -> None:
    assert parity.in_bfloat16(z_image_path) < BFLOAT16


def difference(ours: list[list[torch.Tensor]], expected: list[list[torch.Tensor]]) -> float:
    pairs = [(a, b) for x, y in zip(ours, expected, strict=True) for a, b in zip(x, y, strict=True)]
    return max((a - b).abs().max().item() for a, b in pairs)


def test_alone_it_draws_what_diffusers_draws(z_image_runner: TorchRunner, expected: list[list[torch.Tensor]]) -> None:
    engine = make_engine(z_image_runner)
    assert difference([run(engine, [request])[0] for request in REQUESTS], expected) < TOLERANCE


@pytest.mark.parametrize("width", [2, 4, 8])
def test_batched_it_draws_what_diffusers_draws(
    z_image_runner: TorchRunner, expected: list[list[torch.Tensor]], width: int
) -> None:
    """Sizes, steps, guidance and prompt lengths mix, and a narrow limit makes jobs join and leave in mid-flight."""
    config = EngineConfig(batching=BatchingConfig(dynamic_batch_max_size=width))
    assert difference(run(make_engine(z_image_runner, config), REQUESTS), expected) < TOLERANCE


def test_pixels_are_those_of_diffusers(z_image_runner: TorchRunner, pipeline: ZImagePipeline) -> None:
    request = REQUESTS[1]
    output = make_engine(z_image_runner).generate([request])[0][0]
    ours = np.frombuffer(output.pixels, np.uint8).reshape(output.height, output.width, 3).astype(int)
    generator = torch.Generator("cpu").manual_seed(2**40)
    image = np.asarray(pipeline(**arguments(request), generator=generator).images[0])
    assert ours.shape == image.shape
    assert np.abs(ours - image).max() <= 1


@pytest.mark.parametrize(("shift", "dynamic"), [(6.0, False), (1.0, True)])
def test_other_noise_schedules(tmp_path: Path, shift: float, dynamic: bool) -> None:
    path = tiny.z_image(tmp_path, shift=shift, dynamic=dynamic)
    engine = make_engine(TorchRunner(load_model(EngineConfig(model=ModelConfig(model_path=str(path))))))
    assert engine.runner.info.defaults.num_inference_steps == 50
    assert engine.runner.info.defaults.guidance_scale == 5.0
    loaded = ZImagePipeline.from_pretrained(path)
    loaded.set_progress_bar_config(disable=True)
    assert difference(run(engine, REQUESTS[:2]), [theirs(loaded, r) for r in REQUESTS[:2]]) < TOLERANCE


def test_flow_shift_is_the_noise_schedules_shift(z_image_runner: TorchRunner, pipeline: ZImagePipeline) -> None:
    request = GenerationRequest(
        prompt="w1", width=64, height=64, num_inference_steps=4, guidance_scale=0.0, seed=1, flow_shift=5.0
    )
    pipeline.scheduler.set_shift(5.0)
    try:
        expected = theirs(pipeline, request)
    finally:
        pipeline.scheduler.set_shift(3.0)
    assert difference(run(make_engine(z_image_runner), [request]), [expected]) < TOLERANCE


def test_a_half_precision_checkpoint_runs_in_full_precision(tmp_path: Path) -> None:
    path = tiny.z_image(tmp_path, dtype=torch.float16)
    model = load_model(EngineConfig(model=ModelConfig(model_path=str(path))))
    assert model.info.dtype == "float32"
    loaded = ZImagePipeline.from_pretrained(path, dtype=torch.float32)
    loaded.set_progress_bar_config(disable=True)
    ours = run(make_engine(TorchRunner(model)), REQUESTS[1:3])
    assert difference(ours, [theirs(loaded, r) for r in REQUESTS[1:3]]) < TOLERANCE


def test_bfloat16_is_close(z_image_path: Path, expected: list[list[torch.Tensor]]) -> None:
    model = load_model(EngineConfig(model=ModelConfig(model_path=str(z_image_path), dtype="bfloat16")))
    ours = run(make_engine(TorchRunner(model)), REQUESTS[:1])[0][0]
    assert ours.dtype == torch.float32
    assert (ours - expected[0][0]).pow(2).mean().sqrt() < 0.1 * expected[0][0].pow(2).mean().sqrt()


def test_an_over_long_prompt_is_refused_by_name(z_image_runner: TorchRunner) -> None:
    info = z_image_runner.info
    for name in ("prompt", "negative_prompt"):
        fields = {"prompt": "w1", "guidance_scale": 1.0, "max_sequence_length": 64, name: LONGER}
        with pytest.raises(InvalidValue, match="77 tokens and at most 64") as caught:
            z_image_runner.check(GenerationRequest(**fields).resolve(info))  # type: ignore[arg-type]
        assert caught.value.param == name


def test_turbo_is_told_by_its_noise_schedule(z_image_runner: TorchRunner) -> None:
    assert z_image_runner.info.defaults.num_inference_steps == 9
    assert z_image_runner.info.defaults.guidance_scale == 0.0
