from __future__ import annotations

import asyncio
import io
import time
from functools import partial

import pytest
from PIL import Image

from stepbatch.engine.messages import Output
from stepbatch.request import Times
from stepbatch.server.images import Threads, encode_image

WIDTH, HEIGHT = 64, 48
PIXELS = bytes((x * y * channel) % 256 for y in range(HEIGHT) for x in range(WIDTH) for channel in (1, 2, 3))
OUTPUT = Output("r", 0, 1, WIDTH, HEIGHT, 1, PIXELS, Times())


def test_a_png_holds_every_pixel() -> None:
    image = Image.open(io.BytesIO(encode_image(OUTPUT, "png", 100)))
    assert image.mode == "RGB"
    assert image.tobytes() == PIXELS


@pytest.mark.parametrize("output_format", ["jpeg", "webp"])
def test_less_quality_makes_smaller_files(output_format: str) -> None:
    sizes = [len(encode_image(OUTPUT, output_format, quality)) for quality in (0, 50, 100)]
    assert sizes == sorted(set(sizes))
    assert Image.open(io.BytesIO(encode_image(OUTPUT, output_format, 0))).size == (WIDTH, HEIGHT)


def test_records_are_kept_in_the_order_of_the_calls() -> None:
    threads, seen = Threads(), []

    def note(number: int) -> None:
        time.sleep(0.01 * (number == 0))  # the first takes longest
        seen.append(number)

    async def run() -> None:
        await asyncio.gather(*(threads.record(partial(note, number)) for number in range(5)))

    asyncio.run(run())
    threads.close()
    assert seen == [0, 1, 2, 3, 4]
