"""The language and the pictures that the bundled model was trained on.

A scene is one or two coloured shapes on a plain background. ``parse`` reads the scene out of a prompt, ``Scene.prompt``
writes it, ``Scene.render`` paints it; ``checker`` reads it back out of a picture.
"""

from __future__ import annotations

import math
import random
import re
from dataclasses import dataclass

from PIL import Image, ImageDraw

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "orange": (255, 150, 30),
    "yellow": (250, 225, 60),
    "green": (40, 160, 70),
    "blue": (40, 80, 215),
    "purple": (150, 60, 180),
    "black": (20, 20, 20),
    "white": (250, 250, 250),
}
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross", "diamond", "heart")
SIZES = ("small", "medium", "large")
RELATIONS = ("above", "below", "left of", "right of")

# Radius as a share of the picture's shorter side.
RADIUS_ALONE = {"small": 0.20, "medium": 0.29, "large": 0.39}
RADIUS_IN_PAIR = {"small": 0.145, "medium": 0.185, "large": 0.225}
OFFSET_IN_PAIR = 0.26  # of the picture's side along the relation, from the centre

SYNONYMS = {
    "disc": "circle",
    "dot": "circle",
    "box": "square",
    "plus": "cross",
    "rhombus": "diamond",
    "violet": "purple",
    "big": "large",
    "huge": "large",
    "tiny": "small",
    "little": "small",
    "over": "above",
    "under": "below",
    "beneath": "below",
}
FILLERS = ("draw", "please", "a picture of", "an image of", "show me", "paint", "a drawing of", "i want", "make")
SUPERSAMPLING = 4


def _outlines() -> dict[str, list[tuple[float, float]]]:
    """Each shape's outline inside the unit circle, x to the right and y down."""

    def turn(points: int, start: float = -90.0, radius: float = 1.0) -> list[tuple[float, float]]:
        angles = [math.radians(start + 360 * i / points) for i in range(points)]
        return [(radius * math.cos(a), radius * math.sin(a)) for a in angles]

    star = [p for pair in zip(turn(5), turn(5, -54, 0.45), strict=True) for p in pair]
    a, b = 0.33, 0.92
    cross = [(-a, -b), (a, -b), (a, -a), (b, -a), (b, a), (a, a), (a, b), (-a, b), (-a, a), (-b, a), (-b, -a), (-a, -a)]
    heart = []
    for i in range(64):
        t = 2 * math.pi * i / 64
        y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        heart.append((16 * math.sin(t) ** 3 / 17, -(y + 2.5) / 15.5))
    return {
        "circle": turn(72, radius=0.95),
        "ring": turn(72, radius=0.98),
        "square": [(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)],
        "triangle": [(0, -0.95), (0.95, 0.8), (-0.95, 0.8)],
        "star": [(x * 1.05, y * 1.05 + 0.05) for x, y in star],
        "cross": cross,
        "diamond": [(0, -1), (0.72, 0), (0, 1), (-0.72, 0)],
        "heart": heart,
    }


OUTLINES = _outlines()
RING_HOLE = 0.55  # of the ring's radius


def _article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


@dataclass(frozen=True)
class Thing:
    """One shape of a scene."""

    shape: str
    color: str
    size: str = "medium"


@dataclass(frozen=True)
class Scene:
    """What a prompt of the bundled model's language says; ``relation`` holds between the first thing and the second."""

    things: tuple[Thing, ...]
    background: str = "white"
    relation: str | None = None

    def prompt(self) -> str:
        """The scene in its plainest words."""
        names = [_article(f"{t.size + ' ' if t.size != 'medium' else ''}{t.color} {t.shape}") for t in self.things]
        words = {"left of": "to the left of", "right of": "to the right of"}
        text = names[0]
        if self.relation is not None:
            text += f" {words.get(self.relation, self.relation)} {names[1]}"
        return f"{text} on {_article(self.background)} background"

    def placements(self, width: int, height: int) -> list[tuple[float, float, float]]:
        """Centre x, centre y and radius in pixels of each thing."""
        side = min(width, height)
        if self.relation is None:
            centres = [(0.5 * width, 0.5 * height)]
            radii = [RADIUS_ALONE[self.things[0].size] * side]
        else:
            dx = {"left of": -OFFSET_IN_PAIR, "right of": OFFSET_IN_PAIR}.get(self.relation, 0.0) * width
            dy = {"above": -OFFSET_IN_PAIR, "below": OFFSET_IN_PAIR}.get(self.relation, 0.0) * height
            centres = [(0.5 * width + s * dx, 0.5 * height + s * dy) for s in (1, -1)]
            radii = [RADIUS_IN_PAIR[t.size] * side for t in self.things]
        return [(x, y, r) for (x, y), r in zip(centres, radii, strict=True)]

    def render(self, width: int, height: int) -> Image.Image:
        """Paint the scene in RGB."""
        scale = SUPERSAMPLING
        image = Image.new("RGB", (width * scale, height * scale), COLORS[self.background])
        draw = ImageDraw.Draw(image)
        for thing, (x, y, r) in zip(self.things, self.placements(width, height), strict=True):
            points = [((x + r * px) * scale, (y + r * py) * scale) for px, py in OUTLINES[thing.shape]]
            draw.polygon(points, fill=COLORS[thing.color])
            if thing.shape == "ring":
                hole = r * RING_HOLE
                box = [(x - hole) * scale, (y - hole) * scale, (x + hole) * scale, (y + hole) * scale]
                draw.ellipse(box, fill=COLORS[self.background])
        return image.resize((width, height), Image.Resampling.BOX)


def sample_scene(rng: random.Random, pairs: float = 0.6) -> Scene:
    """A random scene, two things with probability ``pairs``; no thing has the background's colour."""
    background = rng.choice(list(COLORS))
    others = [c for c in COLORS if c != background]
    count = 2 if rng.random() < pairs else 1
    things = tuple(Thing(rng.choice(SHAPES), rng.choice(others), rng.choice(SIZES)) for _ in range(count))
    return Scene(things, background, rng.choice(RELATIONS) if count == 2 else None)


def sample_wording(scene: Scene, rng: random.Random) -> str:
    """The scene in other words than its plainest: synonyms, fillers, unknown words, a background left out."""
    backwards: dict[str, list[str]] = {}
    for word, meaning in SYNONYMS.items():
        backwards.setdefault(meaning, []).append(word)
    text = scene.prompt()
    if rng.random() < 0.35:
        words = [rng.choice([w, *backwards.get(w, [])]) if rng.random() < 0.7 else w for w in text.split()]
        text = " ".join(words)
    if rng.random() < 0.15:
        text = text.replace("to the left of", "left of").replace("to the right of", "right of")
    if rng.random() < 0.15 and scene.relation == "left of":
        text = text.replace("to the left of", "and").replace("left of", "and")
    if rng.random() < 0.15:
        text = re.sub(" on an? ", ", ", text)
    elif scene.background == default_background(scene.things) and rng.random() < 0.5:
        text = re.split(" on an? ", text)[0]
    if rng.random() < 0.2:
        text = f"{rng.choice(FILLERS)} {text}"
    if rng.random() < 0.15:
        words = text.split()
        for _ in range(rng.randint(1, 3)):
            words.insert(rng.choice([0, len(words)]), "unknownword")
        text = " ".join(words)
    return text


def default_background(things: tuple[Thing, ...]) -> str:
    """The background of a prompt that names none."""
    return "black" if any(t.color == "white" for t in things) else "white"


def parse(prompt: str) -> Scene | None:
    """Read a prompt of the language; ``None`` where it says something else."""
    words = [SYNONYMS.get(w, w) for w in re.findall(r"[a-z]+", prompt.lower())]
    background = None
    if "background" in words and words.index("background") > 0:
        at = words.index("background") - 1
        background = words[at] if words[at] in COLORS else None
        words = words[:at]
    things, relation = [], None
    color, size = None, "medium"
    for word in words:
        if word in COLORS:
            color = word
        elif word in SIZES:
            size = word
        elif word in SHAPES and color is not None:
            things.append(Thing(word, color, size))
            color, size = None, "medium"
        elif word in ("above", "below", "left", "right", "and") and len(things) == 1:
            relation = {"left": "left of", "right": "right of", "and": "left of"}.get(word, word)
    if len(things) not in (1, 2) or (len(things) == 2) != (relation is not None):
        return None
    return Scene(tuple(things), background or default_background(tuple(things)), relation)
