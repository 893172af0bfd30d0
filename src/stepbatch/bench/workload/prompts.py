"""Prompts that are made up."""

from __future__ import annotations

import random

MOST = 24  # things in a prompt
_LOOKS = (
    *("red", "blue", "golden", "tiny", "huge", "wooden", "glass", "rusty", "shiny", "bright", "broken", "painted"),
    *("striped", "round", "quiet", "frozen", "sunlit", "dusty", "floating", "marble", "paper", "silver"),
)
_THINGS = (
    *("lighthouse", "bicycle", "teapot", "fox", "violin", "bridge", "market", "harbour", "balloon", "clock", "garden"),
    *("whale", "staircase", "lantern", "robot", "castle", "train", "umbrella", "mountain", "library", "owl", "mirror"),
)


def made_up(count: int, seed: int) -> list[str]:
    """Prompts of 5 to 74 words, short ones as often as long ones, each unlike all others: they are numbered."""
    chance = random.Random(f"prompts {seed}")  # a stream of its own, so that no other choice goes with the length
    return [f"Picture {number}: {_scene(chance)}" for number in range(1, count + 1)]


def _scene(chance: random.Random) -> str:
    things = int((MOST + 1) ** chance.random())
    looks, kinds = chance.choices(_LOOKS, k=things), chance.choices(_THINGS, k=things)
    return ", ".join(f"a {look} {kind}" for look, kind in zip(looks, kinds, strict=True))
