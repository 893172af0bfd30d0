"""The bundled model draws what its prompts say. ``python -m stepbatch.demo.score`` measures it on more of them."""

import random

import pytest
from PIL import Image

from stepbatch import GenerationRequest, load_engine
from stepbatch.demo import MODEL_PATH
from stepbatch.demo.checker import matches
from stepbatch.demo.score import unseen
from stepbatch.engine.engine import Engine
from stepbatch.engine.messages import Output


@pytest.fixture(scope="module")
def engine() -> Engine:
    return load_engine()


def image_of(output: Output) -> Image.Image:
    return Image.frombytes("RGB", (output.width, output.height), output.pixels)


def test_it_draws_what_prompts_say(engine: Engine) -> None:
    wanted = list(unseen(12, seed=1))
    outputs = engine.generate([request for _, request in wanted])
    right = [matches(image_of(o[0]), scene) for (scene, _), o in zip(wanted, outputs, strict=True)]
    assert sum(right) >= 0.8 * len(right)


@pytest.mark.parametrize("prompt", ["a dog in the rain", "?!", "ein roter Stern", "星", "a " * 300])
def test_other_words_still_draw(engine: Engine, prompt: str) -> None:
    request = GenerationRequest(prompt=prompt, width=128, height=128, num_inference_steps=4, seed=1)
    [[output]] = engine.generate([request])
    assert len(output.pixels) == 128 * 128 * 3


def test_guidance_changes_the_picture(engine: Engine) -> None:
    seed = random.Random(0).randrange(1000)
    fields = {"prompt": "a red star", "width": 128, "height": 128, "num_inference_steps": 4, "seed": seed}
    outputs = engine.generate([GenerationRequest(**fields, guidance_scale=scale) for scale in (0.0, 1.5)])
    assert outputs[0][0].pixels != outputs[1][0].pixels


def test_it_is_small() -> None:
    assert sum(path.stat().st_size for path in MODEL_PATH.rglob("*") if path.is_file()) < 20e6
