from __future__ import annotations

import io

import pytest
from PIL import Image

from stepbatch.engine.messages import Output
from stepbatch.request import Times
from stepbatch.server.images import encode_image

WIDTH, HEIGHT = 64, 48
PIXELS = bytes((x * y * channel) % 256 for y in range(HEIGHT) for x in range(WIDTH) for channel in (1, 2, 3))
OUTPUT = Output("r", 0, 1, WIDTH, HEIGHT, PIXELS, Times())


def test_a_png_holds_every_pixel() -> None:
    image = Image.open(io.BytesIO(encode_image(OUTPUT, "png", 100)))
    assert image.mode == "RGB"
    assert image.tobytes() == PIXELS


@pytest.mark.parametrize("output_format", ["jpeg", "webp"])
def test_less_quality_makes_smaller_files(output_format: str) -> None:
    sizes = [len(encode_image(OUTPUT, output_format, quality)) for quality in (0, 50, 100)]
    assert sizes == sorted(set(sizes))
    assert Image.open(io.BytesIO(encode_image(OUTPUT, output_format, 0))).size == (WIDTH, HEIGHT)
