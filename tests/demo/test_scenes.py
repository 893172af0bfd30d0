"""The language: what is written is read back, whatever the wording."""

import random

import numpy as np
import pytest

from stepbatch.demo.scenes import COLORS, OUTLINES, SHAPES, Scene, Thing, parse, sample_scene, sample_wording


def test_prompt_and_parse_are_inverse() -> None:
    rng = random.Random(0)
    for _ in range(300):
        scene = sample_scene(rng)
        assert parse(scene.prompt()) == scene


def test_every_wording_means_the_same() -> None:
    rng = random.Random(1)
    for _ in range(300):
        scene = sample_scene(rng)
        assert parse(sample_wording(scene, rng)) == scene


@pytest.mark.parametrize(
    ("prompt", "scene"),
    [
        ("a small red star on a white background", Scene((Thing("star", "red", "small"),), "white")),
        ("Please draw a tiny violet BOX", Scene((Thing("square", "purple", "small"),), "white")),
        ("a white heart", Scene((Thing("heart", "white"),), "black")),
        ("a red dot and a blue plus", Scene((Thing("circle", "red"), Thing("cross", "blue")), "white", "left of")),
    ],
)
def test_reads(prompt: str, scene: Scene) -> None:
    assert parse(prompt) == scene


@pytest.mark.parametrize("prompt", ["", "a cat", "a red", "a star", "a red star a blue ring", "a red star above"])
def test_what_says_something_else_is_none(prompt: str) -> None:
    assert parse(prompt) is None


def test_every_shape_has_an_outline_that_fits() -> None:
    assert set(OUTLINES) == set(SHAPES)
    for points in OUTLINES.values():
        assert np.abs(points).max() <= 1.05


def test_render_has_the_size_and_the_colors() -> None:
    image = Scene((Thing("square", "red", "large"),), "blue").render(144, 128)
    assert image.size == (144, 128)
    assert image.getpixel((0, 0)) == COLORS["blue"]
    assert image.getpixel((72, 64)) == COLORS["red"]
