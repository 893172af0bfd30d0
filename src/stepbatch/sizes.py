"""Sizes of pictures: how they are written, and how one is chosen that goes with an input image."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from stepbatch.errors import InvalidValue

_SIZE = re.compile(r"([0-9]{1,5})x([0-9]{1,5})")


def parse_size(size: object) -> tuple[int, int]:
    """The sides that ``WIDTHxHEIGHT`` says.

    Raises:
        InvalidValue: it doesn't.
    """
    match = _SIZE.fullmatch(size) if isinstance(size, str) else None
    if match is None:
        raise InvalidValue('size must be "WIDTHxHEIGHT", like "1024x1024", or "auto"', "size")
    return int(match[1]), int(match[2])


def of_area(width: int, height: int, area: int, multiple: int) -> tuple[int, int]:
    """About ``area`` pixels in the proportions of ``width`` and ``height``, each side the nearest multiple."""
    wide = math.sqrt(area * (width / height))
    sides = wide, wide / (width / height)
    return max(multiple, round(sides[0] / multiple) * multiple), max(multiple, round(sides[1] / multiple) * multiple)


def nearest_shape(width: int, height: int, choices: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The one of the (width, height) ``choices`` whose proportions are nearest to those of ``width`` and ``height``."""
    return min((abs(width / height - w / h), w, h) for w, h in choices)[1:]


def within(width: int, height: int, longest: int, multiple: int) -> tuple[int, int]:
    """This size in multiples, rounded down, and smaller in its proportions where a side is over ``longest``."""
    scale = min(1.0, longest / max(width, height))
    wide, high = (max(multiple, int(side * scale) // multiple * multiple) for side in (width, height))
    return wide, high
