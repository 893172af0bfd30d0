"""Reads a picture of the bundled model back into its scene, and says whether it is what a prompt asked for.

Things are what stands out from the background and stays solid when thin edges are taken away, grown back to half way
between their colour and the background's. A thing's colour is the one of the palette that most of its inner pixels are
nearest to; its shape the outline that it overlaps best at equal area and centre; its size word the nearest radius; and
it must be where the scene has it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from stepbatch.demo.scenes import COLORS, OUTLINES, RADIUS_ALONE, RADIUS_IN_PAIR, RING_HOLE, Scene, Thing

Mask = NDArray[np.bool_]
Floats = NDArray[np.float32]

NAMES = tuple(COLORS)
PALETTE = np.array([COLORS[name] for name in NAMES], dtype=np.float32)  # [8, 3]
BORDER = 4  # pixels: where the background's colour is read
CONTRAST = 40.0  # RGB distance from the background at which something stands out; half the palette's smallest distance
EDGE = 2  # pixels: what is thinner than two of these is an edge, not a thing
SPECK = 0.004  # of the picture: what is smaller is no thing
GRID = 48  # shapes are compared on a grid of this side
REACH = 1.1  # half the side of that grid, in square roots of the shape's area
LEAST_OVERLAP = 0.75  # intersection over union below which a shape is none of ours
LEAST_VOTE = 0.5  # of a thing's inner pixels, for its colour
ASTRAY = 0.10  # of the shorter side: how far from its place a thing may be, jitter included
UNCLEAR = "unclear"


@dataclass(frozen=True)
class Found:
    """A thing in a picture, measured in pixels; ``overlap`` is the intersection over union with its shape's outline."""

    shape: str
    color: str
    x: float
    y: float
    radius: float
    overlap: float


@dataclass(frozen=True)
class Outline:
    """A shape at standard area and centre; its area with holes filled and its centroid, in the unit circle."""

    grid: Floats  # [GRID, GRID], coverage from 0 to 1
    area: float
    x: float
    y: float


def read(image: Image.Image) -> Scene | None:
    """The scene that a picture shows; ``None`` where it shows none of the language's."""
    background, found = look(image)
    scene = _scene(background, found, image.size)
    return None if scene is None or _misplaced(scene, found, image.size) else scene


def matches(image: Image.Image, scene: Scene) -> bool:
    """Whether the picture shows the scene."""
    return not mismatch(image, scene)


def mismatch(image: Image.Image, scene: Scene) -> str:
    """What is wrong with a picture of ``scene``, in a few words; empty where it is right."""
    background, found = look(image)
    if background != scene.background:
        return f"the background is {background}, not {scene.background}"
    if len(found) != len(scene.things):
        return f"there are {len(found)} things, not {len(scene.things)}"
    seen, wanted = _scene(background, found, image.size), canonical(scene)
    if seen is None:
        return "the shape or colour of a thing is unclear"
    for thing, other in zip(wanted.things, seen.things, strict=True):
        for name in ("shape", "color", "size"):
            if getattr(thing, name) != getattr(other, name):
                return (
                    f"the {thing.color} {thing.shape} has the {name} {getattr(other, name)}, not {getattr(thing, name)}"
                )
    if seen.relation != wanted.relation:
        return f"the things are {seen.relation}, not {wanted.relation} each other"
    return _misplaced(seen, found, image.size)


def canonical(scene: Scene) -> Scene:
    """The same scene told from above and from the left: "a below b" is "b above a"."""
    turned = {"below": "above", "right of": "left of"}.get(scene.relation or "")
    return scene if turned is None else Scene(scene.things[::-1], scene.background, turned)


def look(image: Image.Image) -> tuple[str, list[Found]]:
    """The background's colour and the things in a picture, from the top or from the left."""
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32)  # [H, W, 3]
    smooth = np.asarray(image.convert("RGB").filter(ImageFilter.MedianFilter(3)), dtype=np.float32)
    frame = np.ones(pixels.shape[:2], dtype=bool)
    frame[BORDER:-BORDER, BORDER:-BORDER] = False
    border = smooth[frame]  # [N, 3]
    background = int(_votes(border).argmax())
    ground = np.median(border[_nearest(border) == background], axis=0)
    seeds = [m for m in components(_erode(_distance(smooth, ground) > CONTRAST)) if m.mean() >= SPECK]
    found = [_measure(smooth, background, mask) for mask in _grow(pixels, ground, seeds)]
    across, down = (max(v, default=0.0) - min(v, default=0.0) for v in ([f.x for f in found], [f.y for f in found]))
    sideways = across / image.width > down / image.height
    return NAMES[background], sorted(found, key=lambda f: f.x if sideways else f.y)


def components(mask: Mask) -> list[Mask]:
    """The connected parts of a mask (neighbours share an edge), by joining runs of neighbouring rows."""
    change = np.diff(np.pad(mask, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    rows, lefts = np.nonzero(change == 1)
    rights = np.nonzero(change == -1)[1]
    runs = list(zip(rows.tolist(), lefts.tolist(), rights.tolist(), strict=True))
    parent = list(range(len(runs)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    above = 0  # the first run that may touch this one from the row before
    for i, (y, left, right) in enumerate(runs):
        while runs[above][0] < y - 1 or (runs[above][0] == y - 1 and runs[above][2] <= left):
            above += 1
        j = above
        while runs[j][0] == y - 1 and runs[j][1] < right:
            parent[root(j)] = root(i)
            j += 1
    roots = [root(i) for i in range(len(runs))]
    parts = {i: np.zeros_like(mask) for i in set(roots)}
    for i, (y, left, right) in zip(roots, runs, strict=True):
        parts[i][y, left:right] = True
    return list(parts.values())


def _distance(pixels: Floats, color: Floats) -> Floats:
    difference = pixels - color
    distance: Floats = np.sqrt(np.einsum("...c,...c->...", difference, difference))
    return distance


def _nearest(pixels: Floats) -> NDArray[np.intp]:
    """Which colour of the palette each pixel of ``[N, 3]`` is nearest to: squared distances, less the pixel's own."""
    nearest: NDArray[np.intp] = ((PALETTE**2).sum(axis=1) - 2 * pixels @ PALETTE.T).argmin(axis=1)
    return nearest


def _votes(pixels: Floats) -> NDArray[np.intp]:
    """How many pixels of ``[N, 3]`` are nearest to each colour of the palette."""
    votes: NDArray[np.intp] = np.bincount(_nearest(pixels), minlength=len(NAMES))
    return votes


def _erode(mask: Mask) -> Mask:
    """What is left when a border of ``EDGE`` pixels is taken off; beyond the picture counts as inside."""
    for _ in range(EDGE):
        padded = np.pad(mask, 1, constant_values=True)
        mask = mask & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return mask


def _dilate(mask: Mask) -> Mask:
    padded = np.pad(mask, 1)
    grown: Mask = mask | padded[:-2, 1:-1] | padded[2:, 1:-1] | padded[1:-1, :-2] | padded[1:-1, 2:]
    return grown


def _grow(pixels: Floats, ground: Floats, seeds: list[Mask]) -> list[Mask]:
    """Grow the seeds, all at the same pace, over pixels that are nearer to their colour than to the background's."""
    from_ground = _distance(pixels, ground)
    reach = [_distance(pixels, np.median(pixels[seed], axis=0)) < from_ground for seed in seeds]
    masks = [seed & near for seed, near in zip(seeds, reach, strict=True)]
    free = ~np.any(seeds, axis=0) if seeds else np.zeros(0, dtype=bool)
    growing = True
    while growing:
        growing = False
        for i, mask in enumerate(masks):
            new = _dilate(mask) & reach[i] & free
            if new.any():
                masks[i], free, growing = mask | new, free & ~new, True
    return masks


def _measure(pixels: Floats, background: int, mask: Mask) -> Found:
    filled = ~_outside(mask)
    grid = _to_grid(mask, filled)
    overlaps = {name: _overlap(grid, outline.grid) for name, outline in outlines().items()}
    shape = max(overlaps, key=lambda name: overlaps[name])
    outline, overlap = outlines()[shape], overlaps[shape]
    core = _erode(mask)
    votes = _votes(pixels[core if core.any() else mask])
    votes[background] = 0
    color = NAMES[votes.argmax()] if votes.max() > LEAST_VOTE * votes.sum() else UNCLEAR
    radius = float(np.sqrt(filled.sum() / outline.area))
    x, y = _centroid(filled)
    x, y = x - outline.x * radius, y - outline.y * radius
    return Found(shape if overlap >= LEAST_OVERLAP else UNCLEAR, color, x, y, radius, overlap)


def _outside(mask: Mask) -> Mask:
    """What of a picture is around the thing, not in a hole of it."""
    parts = components(np.pad(~mask, 1, constant_values=True))
    return next(part for part in parts if part[0, 0])[1:-1, 1:-1]


def _centroid(mask: Mask) -> tuple[float, float]:
    """The middle of a mask's pixels, across and down."""
    across, down = mask.sum(axis=0), mask.sum(axis=1)
    pixels = across.sum()
    return (
        float(across @ np.arange(len(across)) / pixels) + 0.5,
        float(down @ np.arange(len(down)) / pixels) + 0.5,
    )


def _to_grid(mask: Mask, filled: Mask) -> Floats:
    """The mask about its filled centroid, scaled to standard area, as coverage ``[GRID, GRID]``."""
    x, y = _centroid(filled)
    half = REACH * np.sqrt(filled.sum())
    image = Image.fromarray(mask.astype(np.uint8) * 255)
    window = image.transform(
        (4 * GRID, 4 * GRID),
        Image.Transform.EXTENT,
        (x - half, y - half, x + half, y + half),
        Image.Resampling.BILINEAR,
    )
    return np.asarray(window.reduce(4), dtype=np.float32) / np.float32(255)


def _overlap(a: Floats, b: Floats) -> float:
    """Intersection over union of two coverages."""
    return float(np.minimum(a, b).sum() / np.maximum(a, b).sum())


@cache
def outlines() -> dict[str, Outline]:
    """Every shape of the language, drawn large."""
    return {shape: _outline(shape) for shape in OUTLINES}


def _outline(shape: str) -> Outline:
    scale, middle = 200, 250
    image = Image.new("L", (2 * middle, 2 * middle))
    draw = ImageDraw.Draw(image)
    draw.polygon([(middle + scale * x, middle + scale * y) for x, y in OUTLINES[shape]], fill=255)
    filled = np.asarray(image) > 127
    if shape == "ring":
        hole = scale * RING_HOLE
        draw.ellipse([middle - hole, middle - hole, middle + hole, middle + hole], fill=0)
    x, y = ((at - middle) / scale for at in _centroid(filled))
    return Outline(_to_grid(np.asarray(image) > 127, filled), float(filled.sum()) / scale**2, x, y)


def _scene(background: str, found: list[Found], size: tuple[int, int]) -> Scene | None:
    """What was found as a scene, the upper or left thing first; ``None`` where it isn't one."""
    if len(found) not in (1, 2) or any(UNCLEAR in (f.shape, f.color) for f in found):
        return None
    radii = RADIUS_ALONE if len(found) == 1 else RADIUS_IN_PAIR
    side = min(size)
    things = tuple(
        Thing(f.shape, f.color, min(radii, key=lambda word: abs(radii[word] * side - f.radius))) for f in found
    )
    if len(found) == 1:
        return Scene(things, background)
    across, down = (found[1].x - found[0].x) / size[0], (found[1].y - found[0].y) / size[1]
    return Scene(things, background, "left of" if abs(across) > abs(down) else "above")


def _misplaced(scene: Scene, found: list[Found], size: tuple[int, int]) -> str:
    """Which thing is not where its scene has it; empty where each is in its place."""
    for thing, item, (x, y, _) in zip(scene.things, found, scene.placements(*size), strict=True):
        if max(abs(item.x - x), abs(item.y - y)) > ASTRAY * min(size):
            return f"the {thing.color} {thing.shape} is out of its place"
    return ""
