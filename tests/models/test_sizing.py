"""What is told of sequences' lengths without a tokenizer, against what the engine counts."""

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
from diffusers import QwenImageEditPipeline, QwenImageEditPlusPipeline

from stepbatch.config import EngineConfig, ModelConfig
from stepbatch.demo.scenes import sample_scene
from stepbatch.engine.backends import load_runner
from stepbatch.engine.engine import Runner
from stepbatch.engine.forecast import lengths
from stepbatch.image import InputImage
from stepbatch.models.dummy import CONFIGS
from stepbatch.request import GenerationRequest

from . import pipelines, tiny_flux, tiny_qwen

CABIN = (
    "A cozy wooden cabin beside a frozen mountain lake at dawn, smoke rising from the chimney, pine trees covered with "
    "fresh snow, warm light glowing in the windows, reflections of purple clouds on the ice, highly detailed photo"
)
PROMPTS = ("a cat", "a lighthouse on a cliff above the sea at dusk, seen from a boat", CABIN)
OFF = 0.1  # how far off it may be


def load(path: Path | str, **settings: str) -> Runner:
    return load_runner(EngineConfig(model=ModelConfig(model_path=str(path), **settings)))  # type: ignore[arg-type]


def requests(runner: Runner, images: tuple[int, ...] = (0,)) -> Iterator[GenerationRequest]:
    """Prompts and sizes of all kinds, with so many images."""
    info = runner.info
    guided = {info.guidance.field: 4.0, "negative_prompt": "blurry"} if info.guidance.field in info.uses else {}
    picture = InputImage(96, 64, bytes(3 * 96 * 64))
    for prompt, scale, count, more in product(PROMPTS, (1, 2), images, ({}, guided)):
        side = max(info.min_side, info.defaults.width // 2 // info.size_multiple * info.size_multiple)
        request = GenerationRequest(
            prompt=prompt,
            images=(picture,) * count,
            width=scale * side,
            height=side,
            num_frames=1 + 4 * scale if info.makes_videos else None,
        )
        yield replace(request, **more).resolve(info)


def check(runner: Runner, images: tuple[int, ...] = (0,)) -> None:
    for request in requests(runner, images):
        told, counted = lengths(request, runner.info), runner.lengths(request)
        assert len(told) == len(counted)
        assert abs(sum(told) / sum(counted) - 1) <= OFF, (request, told, counted)


@pytest.mark.parametrize("name", sorted(folder.name for folder in CONFIGS.iterdir()))
def test_packaged_models(name: str) -> None:
    runner = load(name, load_format="dummy", dummy_size="small")
    info = runner.info
    from_text = {"text-to-image", "text-to-video"}.intersection(info.tasks)
    check(runner, (*([0] if from_text else []), *([1, info.max_images] if "editing" in info.tasks else [])))


def test_the_bundled_model_on_what_it_knows() -> None:
    runner, rng = load(ModelConfig().model_path), random.Random(0)
    for _ in range(50):
        prompt = sample_scene(rng, pairs=0.3).prompt()
        width, height = (16 * rng.randint(8, 16) for _ in range(2))
        request = GenerationRequest(prompt=prompt, width=width, height=height, guidance_scale=rng.choice([0.0, 2.0]))
        assert lengths(request.resolve(runner.info), runner.info) == runner.lengths(request.resolve(runner.info))


EDITORS: dict[str, tuple[Callable[[Path], Path], tuple[int, ...]]] = {
    "one, perhaps": (lambda folder: tiny_flux.flux(folder, "kontext"), (0, 1)),
    "one": (lambda folder: tiny_qwen.qwen_image(folder, QwenImageEditPipeline), (1,)),
    "several": (lambda folder: tiny_qwen.qwen_image(folder, QwenImageEditPlusPipeline), (1, 3)),
}


@pytest.mark.parametrize("name", EDITORS)
def test_images_that_are_edited(name: str, tmp_path: Path) -> None:
    make, images = EDITORS[name]
    check(load(make(tmp_path / "tiny")), images)


@pytest.mark.parametrize("kind", ["stable-diffusion", "wan"])
def test_whole_calls_are_told_exactly(kind: str, tmp_path: Path) -> None:
    runner = load(pipelines.checkpoint(kind, tmp_path), backend="diffusers")
    for request in requests(runner):
        assert lengths(request, runner.info) == runner.lengths(request)
