"""The checker must read every clean picture right, most blemished ones too, and accept nothing that is wrong."""

import random
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from stepbatch.demo import checker
from stepbatch.demo.scenes import COLORS, RELATIONS, SHAPES, SIZES, Scene, Thing, parse, sample_scene

SIDES = range(128, 257, 16)


def drawn(count: int, seed: int) -> list[tuple[Scene, Image.Image]]:
    rng = random.Random(seed)
    pairs = []
    for _ in range(count):
        scene = sample_scene(rng)
        pairs.append((scene, scene.render(rng.choice(SIDES), rng.choice(SIDES))))
    return pairs


def scene(prompt: str) -> Scene:
    found = parse(prompt)
    assert found is not None
    return found


def test_reads_every_clean_picture() -> None:
    for wanted, image in drawn(24, seed=1):
        assert checker.mismatch(image, wanted) == ""
        assert checker.read(image) == checker.canonical(wanted)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", SIZES)
def test_reads_every_shape_in_every_size(shape: str, size: str) -> None:
    wanted = Scene((Thing(shape, "blue", size),), "yellow")
    assert checker.read(wanted.render(176, 128)) == wanted


def test_reads_blurred_tinted_noisy_pictures() -> None:
    noise = np.random.default_rng(0)
    for wanted, image in drawn(14, seed=2):
        pixels = np.asarray(image.filter(ImageFilter.GaussianBlur(1.2)), dtype=float)
        pixels += noise.uniform(-15, 15, 3) + noise.normal(0, 6, pixels.shape)
        blemished = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
        assert checker.mismatch(blemished, wanted) == ""


def altered(wanted: Scene, rng: random.Random) -> list[Scene]:
    """The scene with each thing's shape, colour and size changed in turn, another background, another relation."""
    scenes = [replace(wanted, background=rng.choice([c for c in COLORS if c != wanted.background]))]
    for i, thing in enumerate(wanted.things):
        for name, values in (("shape", SHAPES), ("color", tuple(COLORS)), ("size", SIZES)):
            other = replace(thing, **{name: rng.choice([v for v in values if v != getattr(thing, name)])})
            scenes.append(replace(wanted, things=(*wanted.things[:i], other, *wanted.things[i + 1 :])))
    if wanted.relation is not None:
        scenes += [replace(wanted, relation=relation) for relation in RELATIONS if relation != wanted.relation]
        scenes.append(replace(wanted, things=wanted.things[:1], relation=None))
        scenes.append(replace(wanted, things=wanted.things[::-1]))
    return [s for s in scenes if checker.canonical(s) != checker.canonical(wanted)]


def test_refuses_altered_scenes() -> None:
    rng = random.Random(3)
    for wanted, image in drawn(5, seed=3):
        for other in altered(wanted, rng):
            assert checker.mismatch(image, other), f"{wanted.prompt()} taken for {other.prompt()}"


def test_says_what_is_wrong() -> None:
    image = scene("a small red star on a white background").render(128, 128)
    assert checker.mismatch(image, scene("a small blue star")) == "the blue star has the color red, not blue"
    assert checker.mismatch(image, scene("a red star")) == "the red star has the size small, not medium"
    assert (
        checker.mismatch(image, scene("a small red star on a green background")) == "the background is white, not green"
    )
    assert checker.mismatch(image, scene("a red star above a red ring")) == "there are 1 things, not 2"


def test_relation_may_be_told_from_either_side() -> None:
    image = scene("a red star above a blue ring").render(160, 192)
    assert checker.matches(image, scene("a blue ring below a red star"))
    assert not checker.matches(image, scene("a red star below a blue ring"))


def test_refuses_what_is_no_scene() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    for image in (Image.new("RGB", (128, 128), "white"), Image.fromarray(noise)):
        assert checker.read(image) is None


@pytest.mark.parametrize("blob", [(4, 4, 30, 30), (60, 4, 68, 30)], ids=["in the corner", "beside it"])
def test_refuses_an_extra_thing(blob: tuple[int, int, int, int]) -> None:
    wanted = scene("a small red circle")
    image = wanted.render(128, 128)
    ImageDraw.Draw(image).rectangle(blob, fill=COLORS["green"])
    assert checker.mismatch(image, wanted) == "there are 2 things, not 1"


def test_refuses_a_thing_out_of_place() -> None:
    wanted = scene("a small red circle")
    moved = Image.new("RGB", (128, 128), COLORS["white"])
    moved.paste(wanted.render(128, 128), (30, 0))
    assert checker.mismatch(moved, wanted) == "the red circle is out of its place"


def test_refuses_a_thing_of_two_colors() -> None:
    wanted = scene("a large red square")
    image = wanted.render(128, 128)
    ImageDraw.Draw(image).rectangle((0, 60, 128, 95), fill=COLORS["blue"])
    assert not checker.matches(image, wanted)


def test_components_are_joined_across_rows() -> None:
    mask = np.array([[1, 0, 1, 0], [1, 1, 1, 0], [0, 0, 0, 1]], dtype=bool)
    assert sorted(int(part.sum()) for part in checker.components(mask)) == [1, 5]


def test_components_of_random_masks_are_those_of_a_flood() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        mask = rng.random((9, 11)) < rng.uniform(0.2, 0.8)
        parts = checker.components(mask)
        assert (np.sum(parts, axis=0) == mask).all() if parts else not mask.any()
        for part in parts:
            flood, grown = np.zeros_like(mask), np.zeros_like(mask)
            grown[tuple(np.argwhere(part)[0])] = True
            while (flood != grown).any():
                flood, grown = grown, checker._dilate(grown) & mask
            assert (flood == part).all()
