"""Images that go with requests: files, and made-up ones where a dataset has none."""

from __future__ import annotations

import io
import random
from hashlib import sha256
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from stepbatch.errors import OptionError

KINDS = 16  # of made-up images, of each size; those of a kind differ in their first pixels
SIDE = 512  # pixels of a made-up image whose request has no size
SHAPES = 6  # on each


class ImageFile(msgspec.Struct, frozen=True):
    """An image that goes with a request."""

    name: str
    data: bytes
    digest: str  # SHA-256, hex: of a file's data, or of a made-up image's pixels, as PNG encoders differ


class Inputs:
    """The images of a run: each file is read once, each made-up image is made once."""

    def __init__(self) -> None:
        self._files: dict[Path, ImageFile] = {}
        self._made: dict[tuple[int, int, int], NDArray[np.uint8]] = {}

    def read(self, path: Path) -> ImageFile:
        """A file's image.

        Raises:
            OptionError: it can't be read.
        """
        if path not in self._files:
            try:
                data = path.read_bytes()
            except OSError as error:
                raise OptionError(f"can't read the image {path}: {error.strerror or error}") from error
            self._files[path] = ImageFile(path.name, data, sha256(data).hexdigest())
        return self._files[path]

    def make(self, index: int, width: int | None, height: int | None) -> ImageFile:
        """The image of request number ``index``, ``width`` x ``height`` pixels; no two are alike.

        A server that remembers images would have less to do for one that it has seen.
        """
        key = index % KINDS, width or SIDE, height or SIDE
        if key not in self._made:
            self._made[key] = _made_up(*key)
        pixels = self._made[key].copy()
        number = np.frombuffer(index.to_bytes(8, "big"), np.uint8)
        pixels.reshape(-1)[: len(number)] = number[-pixels.size :]
        data = io.BytesIO()
        Image.fromarray(pixels).save(data, "PNG", compress_level=1)
        digest = sha256(f"{key[1]}x{key[2]} ".encode() + pixels.tobytes()).hexdigest()
        return ImageFile(f"made-up-{index}.png", data.getvalue(), digest)


def _made_up(kind: int, width: int, height: int) -> NDArray[np.uint8]:
    """Coloured shapes on a gradient, ``[height, width, 3]``. Whole numbers only: it is the same on every machine."""
    chance = random.Random(f"image {kind}")
    x, y = np.arange(width)[None, :], np.arange(height)[:, None]
    shades = 256 - SHAPES  # of the gradient; the palette's other colours are the shapes'
    indices = ((x * shades // width + y * shades // height) // 2).astype(np.uint8)  # [height, width]
    for shape in range(SHAPES):
        left, top, size = (int(part * chance.random()) for part in (width, height, min(width, height) // 2))
        part = slice(top, top + size), slice(left, left + size)
        round_one = (2 * (x - left) - size) ** 2 + (2 * (y - top) - size) ** 2 < size**2
        indices[part][round_one[part] if shape % 2 else ...] = shades + shape
    return _palette(shades, chance)[indices]


def _palette(shades: int, chance: random.Random) -> NDArray[np.uint8]:
    """Colours, ``[256, 3]``: so many from one to another, and others."""
    colours = np.array([[int(256 * chance.random()) for _ in range(3)] for _ in range(2 + 256 - shades)])
    blend = np.arange(shades)[:, None]
    gradient = (colours[0] * blend + colours[1] * (shades - blend)) // shades
    return np.concatenate([gradient, colours[2:]]).astype(np.uint8)
