import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from diffusers import FluxImg2ImgPipeline, FluxInpaintPipeline, FluxKontextPipeline, FluxPipeline
from diffusers.pipelines.flux import pipeline_flux_kontext
from diffusers.utils import logging
from tests.models import tiny_flux
from tests.models.parity import BFLOAT16, TOLERANCE, Case, Parity, disc, fields, generator, picture, pil
from tests.recording import make_engine, run

from stepbatch import EngineConfig, GenerationRequest
from stepbatch.config import ModelConfig
from stepbatch.engine.runner import TorchRunner
from stepbatch.errors import CheckpointError, InvalidValue
from stepbatch.models.flux import FluxKontext, preferred_shapes
from stepbatch.models.native import load_model

NAMES = (
    "prompt", "negative_prompt", "width", "height", "num_inference_steps", "guidance_scale", "true_cfg_scale",
    "max_sequence_length", "strength",
)  # fmt: skip
LONG, LONGER = " ".join(f"w{i}" for i in range(30)), " ".join(f"w{i % 96}" for i in range(120))
SQUARE, WIDE = {"width": 64, "height": 64}, {"width": 96, "height": 64}
Draw = Callable[[GenerationRequest], Any]


class Family(NamedTuple):
    """A checkpoint, ours and theirs."""

    path: Path
    runner: TorchRunner
    pipeline: Any
    draw: Draw  # the latents or, with ``output_type``, the picture of diffusers


def load(path: Path, **settings: Any) -> TorchRunner:
    return TorchRunner(load_model(EngineConfig(model=ModelConfig(model_path=str(path), **settings))))


def silent(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module", autouse=True)
def no_word_of_truncation() -> Iterator[None]:
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    yield
    logging.set_verbosity(before)


def draws(path: Path) -> Family:
    pipeline = silent(FluxPipeline.from_pretrained(path))
    img2img, inpaint = (silent(kind.from_pipe(pipeline)) for kind in (FluxImg2ImgPipeline, FluxInpaintPipeline))

    def draw(request: GenerationRequest, output_type: str = "latent") -> Any:
        given = fields(request, *NAMES) | {"generator": generator(request), "output_type": output_type}
        if request.mask is not None:
            return inpaint(**given, image=pil(request.images[0]), mask_image=pil(request.mask)).images[0]
        if request.images:
            return img2img(**given, image=pil(request.images[0])).images[0]
        return pipeline(**given).images[0]

    return Family(path, load(path), pipeline, draw)


@pytest.fixture(scope="module")
def dev(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return draws(tiny_flux.flux(tmp_path_factory.mktemp("flux") / "dev", "dev"))


@pytest.fixture(scope="module")
def schnell(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return draws(tiny_flux.flux(tmp_path_factory.mktemp("flux") / "FLUX.1-schnell", "schnell"))


@pytest.fixture(scope="module")
def kontext(tmp_path_factory: pytest.TempPathFactory) -> Family:
    path = tiny_flux.flux(tmp_path_factory.mktemp("flux") / "FLUX.1-Kontext-dev", "kontext")
    runner, pipeline = load(path), silent(FluxKontextPipeline.from_pretrained(path))
    assert isinstance(runner.model, FluxKontext)
    shapes = runner.model.shapes

    def draw(request: GenerationRequest) -> Any:
        width, height = request.resolve(runner.info).size
        given = fields(request, *NAMES) | {"width": width, "height": height, "max_area": width * height}
        if request.images:
            given["image"] = pil(request.images[0])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pipeline_flux_kontext, "PREFERRED_KONTEXT_RESOLUTIONS", shapes)
            return pipeline(**given, generator=generator(request), output_type="latent").images[0]

    return Family(path, runner, pipeline, draw)


def case(family: Family, variant: str, **given: Any) -> Case:
    request = GenerationRequest(**{"max_sequence_length": 32} | given)
    return Case(f"FLUX.1{variant}", request, lambda: family.draw(request))


@pytest.fixture(scope="module")
def dev_parity(dev: Family) -> Parity:
    seen, wide = {"images": (picture(64, 64),), **SQUARE}, {"images": (picture(96, 64, 1),), **WIDE}
    guided = {"negative_prompt": "w9 w8", "true_cfg_scale": 2.5}

    def row(variant: str, **given: Any) -> Case:
        return case(dev, f"-dev, {variant}", **given)

    return Parity(dev.runner, [
        row("text-to-image", prompt="w1 w2", guidance_scale=3.5, num_inference_steps=3, seed=1, **SQUARE),
        row("text-to-image", prompt=LONG, guidance_scale=1.0, num_inference_steps=5, seed=2**40, width=40, height=160),
        row("text-to-image", prompt=LONGER, max_sequence_length=128, num_inference_steps=4, seed=3, **WIDE),
        row("true CFG", prompt="w5", guidance_scale=2.0, num_inference_steps=4, seed=7, **guided, **WIDE),
        row(
            "true CFG", prompt="w6", negative_prompt=LONG, true_cfg_scale=1.5, max_sequence_length=48,
            num_inference_steps=1, seed=7, width=72, height=88,
        ),
        row("image-to-image", prompt="w1", guidance_scale=3.0, strength=0.6, num_inference_steps=5, seed=3, **seen),
        row(
            "image-to-image", prompt="w2 w3", guidance_scale=7.0, strength=0.25, num_inference_steps=4, seed=4,
            **guided, **wide,
        ),
        row(
            "inpainting", prompt="w4", guidance_scale=3.5, strength=1.0, mask=disc(64, 64), num_inference_steps=3,
            seed=5, **seen,
        ),
        row(
            "inpainting", prompt=LONG, guidance_scale=1.5, strength=0.7, mask=disc(96, 64), num_inference_steps=4,
            seed=6, **guided, **wide,
        ),
    ])  # fmt: skip


@pytest.fixture(scope="module")
def schnell_parity(schnell: Family) -> Parity:
    seen = {"images": (picture(96, 64, 1),), **WIDE}

    def row(variant: str, **given: Any) -> Case:
        return case(schnell, f"-schnell, {variant}", **given)

    return Parity(schnell.runner, [
        row("text-to-image", prompt="w1 w2", num_inference_steps=4, seed=1, **SQUARE),
        row("text-to-image", prompt=LONGER, max_sequence_length=121, num_inference_steps=2, seed=2, **WIDE),
        row("true CFG", prompt="w3", negative_prompt="", true_cfg_scale=2.0, num_inference_steps=3, seed=3, **WIDE),
        row("image-to-image", prompt="w4", strength=0.7, num_inference_steps=4, seed=4, **seen),
        row("inpainting", prompt="w5", strength=0.9, mask=disc(96, 64), num_inference_steps=3, seed=5, **seen),
    ])  # fmt: skip


@pytest.fixture(scope="module")
def kontext_parity(kontext: Family) -> Parity:
    high, wide = {"images": (picture(60, 100),)}, {"images": (picture(200, 90, 1),)}
    guided = {"negative_prompt": "w9", "true_cfg_scale": 3.0}

    def row(variant: str, **given: Any) -> Case:
        return case(kontext, f" Kontext, {variant}", **{"guidance_scale": 2.5} | given)

    return Parity(kontext.runner, [
        row("edit", prompt="w1 w2", num_inference_steps=3, seed=1, **SQUARE, **high),
        row("edit", prompt=LONG, guidance_scale=4.0, num_inference_steps=4, seed=2, **wide),
        row("edit", prompt="w3", max_sequence_length=48, num_inference_steps=2, seed=3, **guided, **WIDE, **high),
        row("text-to-image", prompt="w1 w2", num_inference_steps=4, seed=1, **SQUARE),
        row("text-to-image", prompt="w4", num_inference_steps=3, seed=4, **guided, width=40, height=96),
    ])  # fmt: skip


@pytest.fixture(params=["dev", "schnell", "kontext"])
def parity(request: pytest.FixtureRequest) -> Parity:
    made: Parity = request.getfixturevalue(f"{request.param}_parity")
    return made


def test_alone_it_draws_what_diffusers_draws(parity: Parity) -> None:
    assert parity.alone() < TOLERANCE


@pytest.mark.parametrize(("width", "reverse"), [(16, False), (3, True)])
def test_in_company_it_draws_what_diffusers_draws(parity: Parity, width: int, reverse: bool) -> None:
    assert parity.in_company(width, reverse) < TOLERANCE


@pytest.mark.parametrize("kind", ["dev", "schnell", "kontext"])
def test_in_bfloat16_company_moves_a_picture_little(kind: str, request: pytest.FixtureRequest) -> None:
    family, parity = request.getfixturevalue(kind), request.getfixturevalue(f"{kind}_parity")
    assert parity.in_bfloat16(family.path) < BFLOAT16


@pytest.mark.parametrize("kind", ["dev", "kontext"])
def test_with_projections_as_they_are_stored(kind: str, request: pytest.FixtureRequest) -> None:
    family, parity = request.getfixturevalue(kind), request.getfixturevalue(f"{kind}_parity")
    ours = run(make_engine(load(family.path, fuse_projections=False)), [case.request for case in parity.cases])
    for (latents, *_), expected in zip(ours, parity.expected, strict=True):
        assert (latents - expected).abs().max() < TOLERANCE


def test_in_bfloat16_it_is_close_to_diffusers_in_bfloat16(dev: Family, dev_parity: Parity) -> None:
    """Timestep and guidance are rounded as there, which alone moves a picture by far more than this."""
    request = dev_parity.cases[0].request
    ours = run(make_engine(load(dev.path, dtype="bfloat16")), [request])[0][0]
    noise = dev.runner.model.space.noise(*request.size, generator(request))
    pipeline = silent(FluxPipeline.from_pretrained(dev.path, dtype=torch.bfloat16))
    expected = pipeline(**fields(request, *NAMES), latents=noise[None], output_type="latent").images[0].float()
    assert (ours - expected).pow(2).mean().sqrt() < 0.02 * expected.pow(2).mean().sqrt()


def test_pixels_are_those_of_diffusers(dev: Family, dev_parity: Parity) -> None:
    request = dev_parity.cases[1].request
    output = make_engine(dev.runner).generate([request])[0][0]
    ours = np.frombuffer(output.pixels, np.uint8).reshape(output.height, output.width, 3).astype(int)
    image = dev.pipeline(**fields(request, *NAMES), generator=generator(request)).images[0]
    assert np.abs(ours - np.asarray(image)).max() <= 1


def test_only_t5_makes_a_prompt_over_long(dev: Family) -> None:
    for name in ("prompt", "negative_prompt"):
        given = {"prompt": "w1", "true_cfg_scale": 2.0, "max_sequence_length": 120, name: LONGER}
        with pytest.raises(InvalidValue, match="121 tokens and at most 120") as caught:
            dev.runner.check(GenerationRequest(**given).resolve(dev.runner.info))  # type: ignore[arg-type]
        assert caught.value.param == name
        dev.runner.check(GenerationRequest(**given | {"max_sequence_length": 121}).resolve(dev.runner.info))  # type: ignore[arg-type]


def test_a_prompt_is_what_it_is_alone(dev: Family) -> None:
    model, info = dev.runner.model, dev.runner.info
    texts = [("w1", 32), (LONG, 32), ("w1", 64), (LONGER, 128)]
    prompts = [
        model.prompt(text, GenerationRequest(prompt=text, max_sequence_length=length).resolve(info))
        for text, length in texts
    ]
    assert [prompt.length for prompt in prompts] == [32, 32, 64, 128]
    with torch.inference_mode():
        for prompt, together in zip(prompts, model.encode(prompts), strict=True):
            (alone,) = model.encode([prompt])
            assert together.pooled is not None and alone.pooled is not None
            torch.testing.assert_close(together.rows, alone.rows)
            torch.testing.assert_close(together.pooled, alone.pooled)


@pytest.mark.parametrize(
    ("given", "sequences"),
    [
        ({}, 1),
        ({"negative_prompt": "w2"}, 1),
        ({"true_cfg_scale": 1.0, "negative_prompt": "w2"}, 1),
        ({"true_cfg_scale": 2.0}, 2),
        ({"true_cfg_scale": 2.0, "negative_prompt": "w2"}, 2),
    ],
)
def test_when_there_are_two_sequences(dev: Family, given: dict[str, Any], sequences: int) -> None:
    request = GenerationRequest(prompt="w1", max_sequence_length=32, **SQUARE, **given).resolve(dev.runner.info)
    assert sum(dev.runner.lengths(request)) == sequences * (32 + 64)


def test_defaults(dev: Family, schnell: Family, kontext: Family) -> None:
    known = [family.runner.info.defaults for family in (dev, schnell, kontext)]
    assert [d.num_inference_steps for d in known] == [28, 4, 28]
    assert [d.guidance_scale for d in known] == [3.5, None, 2.5]
    assert [d.max_sequence_length for d in known] == [512, 256, 512]
    assert all((d.width, d.height, d.true_cfg_scale, d.strength) == (1024, 1024, 1.0, 0.6) for d in known)


@pytest.mark.parametrize(
    ("kind", "given", "param"),
    [
        ("schnell", {"guidance_scale": 3.5}, "guidance_scale"),
        ("dev", {"flow_shift": 3.0}, "flow_shift"),
        ("dev", {"images": (picture(64, 64),)}, "strength"),
        ("kontext", {"images": (picture(64, 64),), "strength": 0.5}, "strength"),
        ("kontext", {"images": (picture(64, 64),), "mask": disc(64, 64)}, "mask"),
        ("kontext", {"images": (picture(64, 64),) * 2}, "images"),
        ("dev", {"max_sequence_length": 513}, "max_sequence_length"),
    ],
)
def test_what_has_no_effect_is_refused(
    kind: str, given: dict[str, Any], param: str, request: pytest.FixtureRequest
) -> None:
    with pytest.raises(InvalidValue) as caught:
        GenerationRequest(prompt="w1", **given).resolve(request.getfixturevalue(kind).runner.info)
    assert caught.value.param == param


def test_flow_shift_is_the_noise_schedules_shift(schnell: Family) -> None:
    asked = GenerationRequest(
        prompt="w1", num_inference_steps=4, max_sequence_length=16, flow_shift=3.0, seed=1, **SQUARE
    )
    schnell.pipeline.scheduler.set_shift(3.0)
    try:
        expected = schnell.draw(asked)
    finally:
        schnell.pipeline.scheduler.set_shift(1.0)
    assert (run(make_engine(schnell.runner), [asked])[0][0] - expected).abs().max() < TOLERANCE


def test_kontexts_shapes_are_those_of_diffusers(kontext: Family) -> None:
    theirs = pipeline_flux_kontext.PREFERRED_KONTEXT_RESOLUTIONS
    assert list(preferred_shapes(1024 * 1024, 16)) == theirs
    info = kontext.runner.info
    high = GenerationRequest(prompt="w1", images=(picture(30, 40),)).resolve(info)
    assert high.size == (80, 112)  # 880 x 1184, brought to the tiny model's area
    assert kontext.runner.model.image_sizes(high) == [(80, 112)]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"in_channels": 96, "out_channels": 16}, "in_channels 96, out_channels 16"),
        ({"patch_size": 2}, "patch_size 2"),
        ({"num_layers": 3}, "transformer_blocks.2"),
    ],
)
def test_another_transformer_is_refused(dev: Family, tmp_path: Path, change: dict[str, int], reason: str) -> None:
    (tmp_path / "transformer").mkdir()
    for file in dev.path.iterdir():
        if file.name != "transformer":
            (tmp_path / file.name).symlink_to(file)
    weights = "diffusion_pytorch_model.safetensors"
    (tmp_path / "transformer" / weights).symlink_to(dev.path / "transformer" / weights)
    config = json.loads((dev.path / "transformer" / "config.json").read_text())
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(CheckpointError, match=reason) as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)
