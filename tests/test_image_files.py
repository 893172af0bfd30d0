"""Files of every kind to pixels: what is read is read right, all else is refused, and nothing else ever comes out."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import time
import tracemalloc
import zlib
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from tests.pictures import bombs, chunk, file, frames, image, png, with_right_sums

from stepbatch.errors import InvalidValue
from stepbatch.image_files import MAX_HEADER, MAX_PARTS, Picture, read_picture

RED, WHITE, GREY, BLACK = b"\xff\0\0", b"\xff\xff\xff", b"\x7f\x7f\x7f", b"\0\0\0"


def read(data: bytes, max_pixels: int = 1 << 16) -> Picture:
    return read_picture(data, max_pixels, "the file", "image")


def pixels(data: bytes) -> bytes:
    return read(data).on_white().pixels


def rgba(*values: tuple[int, int, int, int], kind: str = "PNG", **options: Any) -> bytes:
    """A row of these pixels as a file."""
    return file(Image.frombytes("RGBA", (len(values), 1), bytes(sum(values, ()))), kind, **options)


PALETTE = chunk(b"PLTE", BLACK + RED)
LATTER = WHITE + BLACK
EXACT = {
    "1 bit": (png((8, 1), 1, 0, b"\0\x1b"), b"".join(WHITE if bit == "1" else BLACK for bit in f"{0x1B:08b}")),
    "1 bit, one transparent": (png((8, 1), 1, 0, b"\0\x1b", chunk(b"tRNS", b"\0\0")), 8 * WHITE),
    "2 bits": (png((4, 1), 2, 0, b"\0\x1b"), b"\0\0\0UUU\xaa\xaa\xaa\xff\xff\xff"),
    "grey": (file(image("L")), image("L").convert("RGB").tobytes()),
    "grey, one transparent": (png((2, 1), 8, 0, b"\0\x07\x08", chunk(b"tRNS", b"\0\x07")), WHITE + b"\x08\x08\x08"),
    "grey and alpha": (png((2, 1), 8, 4, b"\0\x07\xff\x07\x00"), b"\x07\x07\x07" + WHITE),
    "grey, 16 bits": (png((3, 1), 16, 0, b"\0\0\0\x80\0\xff\xff"), BLACK + b"\x80\x80\x80" + WHITE),
    "grey and alpha, 16 bits": (png((1, 1), 16, 4, b"\0\x12\x34\xff\xff"), b"\x12\x12\x12"),
    "colours": (file(image()), image().tobytes()),
    "colours, one transparent": (png((2, 1), 8, 2, b"\0" + RED + BLACK, chunk(b"tRNS", b"\0\xff" + bytes(4))), LATTER),
    "colours, 16 bits": (png((1, 1), 16, 2, b"\0\x12\x34\x80\0\xff\xff"), b"\x12\x80\xff"),
    "alpha": (rgba((255, 0, 0, 255), (0, 0, 0, 128), (9, 9, 9, 0)), RED + GREY + WHITE),
    "palette": (png((3, 1), 8, 3, b"\0\0\1\1", PALETTE), BLACK + RED + RED),
    "palette, one transparent": (png((2, 1), 8, 3, b"\0\0\1", PALETTE, chunk(b"tRNS", b"\0")), WHITE + RED),
    "palette, half transparent": (png((2, 1), 8, 3, b"\0\0\1", PALETTE, chunk(b"tRNS", b"\x80")), GREY + RED),
    "lossless webp": (file(image(), "WEBP", lossless=True), image().tobytes()),
    "webp with alpha": (rgba((255, 0, 0, 255), (0, 0, 0, 0), kind="WEBP", lossless=True), RED + WHITE),
}  # fmt: skip


@pytest.mark.parametrize(("data", "expected"), EXACT.values(), ids=EXACT)
def test_every_kind_of_file_becomes_rgb(data: bytes, expected: bytes) -> None:
    assert pixels(data) == expected


@pytest.mark.parametrize(
    ("picture", "expected"),
    [
        (Image.new("RGB", (8, 8), (200, 100, 50)), (200, 100, 50)),
        (Image.new("L", (8, 8), 77), (77, 77, 77)),
        (Image.new("CMYK", (8, 8), (0, 255, 255, 0)), (255, 0, 0)),  # Pillow writes it inverted, as Adobe does
        (Image.new("CMYK", (8, 8), (0, 0, 0, 255)), (0, 0, 0)),
    ],
)
@pytest.mark.parametrize("progressive", [False, True])
def test_jpegs_of_every_mode(picture: Image.Image, expected: tuple[int, int, int], progressive: bool) -> None:
    got = pixels(file(picture, "JPEG", quality=95, progressive=progressive))
    assert len(got) == 3 * 64
    assert all(abs(value - wanted) <= 3 for value, wanted in zip(got[:3], expected, strict=True))


def test_a_camera_s_file_with_a_second_picture_is_read_as_its_first() -> None:
    data = file(image(), "MPO", save_all=True, append_images=[image(seed=1)])
    assert pixels(data) == Image.open(io.BytesIO(data)).convert("RGB").tobytes()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("orientation", range(10))
def test_pictures_are_turned_as_their_exif_says(kind: str, order: str, orientation: int) -> None:
    exif = Image.Exif()
    exif.endian = order
    exif[0x010E] = "a description"
    exif[0x0112] = orientation
    data = file(image(), kind, exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    got = read(data).on_white()
    assert (got.width, got.height) == expected.size == ((8, 12) if orientation in (5, 6, 7, 8) else (12, 8))
    assert got.pixels == expected.convert("RGB").tobytes()


@pytest.mark.parametrize(
    "exif",
    [
        b"",
        b"Exif\0\0",
        b"Exif\0\0II*\0",
        b"Exif\0\0II*\0\xff\xff\xff\xff",
        b"Exif\0\0MM\0*\0\0\0\x08\xff\xff",
        b"Exif\0\0II*\0\x08\0\0\0\1\0" + struct.pack("<HHII", 0x0112, 3, 1, 6)[:9],
        b"Exif\0\0II*\0\x08\0\0\0\1\0" + struct.pack("<HHII", 0x010E, 2, 0xFFFFFF, 0xFFFFFF),
        b"nonsense",
    ],
)
def test_exif_that_makes_no_sense_is_left_alone(exif: bytes) -> None:
    jpeg = file(image(), "JPEG")
    start = jpeg.index(b"\xff\xdb")  # in the place of JFIF's header: without it Pillow looks into the EXIF
    part = b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif
    assert pixels(jpeg[:2] + part + jpeg[start:]) == pixels(jpeg)


def mask(data: bytes) -> bytes:
    return read(data).as_mask().pixels


def test_a_mask_is_what_is_white() -> None:
    assert mask(png((4, 1), 8, 0, b"\0\x00\x7f\x80\xff")) == b"\0\0\xff\xff"
    assert mask(png((8, 1), 1, 0, b"\0\x0f")) == 4 * b"\0" + 4 * b"\xff"
    assert mask(file(Image.new("RGB", (8, 8), "white"), "JPEG")) == 64 * b"\xff"
    assert mask(png((2, 1), 16, 0, b"\0\x7f\xff\x80\x80")) == b"\0\xff"


def test_or_where_it_has_transparency_what_is_transparent() -> None:
    assert mask(rgba((255, 255, 255, 255), (255, 255, 255, 128), (0, 0, 0, 127), (0, 0, 0, 0))) == b"\0\0\xff\xff"


def test_an_alpha_channel_that_is_opaque_throughout_says_nothing() -> None:
    assert mask(rgba((255, 255, 255, 255), (0, 0, 0, 255))) == b"\xff\0"


def test_holes_are_more_transparent_than_not() -> None:
    assert read(rgba((0, 0, 0, 255), (0, 0, 0, 127))).has_holes
    assert not read(rgba((0, 0, 0, 255), (0, 0, 0, 128))).has_holes
    assert not read(file(image())).has_holes


def scans(count: int) -> bytes:
    return file(image(), "JPEG").replace(b"\xff\xd9", count * b"\xff\xda\0\x02" + b"\xff\xd9")


def test_a_film_behind_a_picture_has_no_scans() -> None:
    data = file(image(), "JPEG")
    assert read(data + 1000 * b"\xff\xda\0\x02").on_white() == read(data).on_white()


def flooded(data: bytes, part: bytes, at: int) -> bytes:
    """A file with a small part, far too often."""
    return data[:at] + 20_000 * part + data[at:]


JPEG, PNG = file(image(), "JPEG"), file(image())
TABLES = b"\xff\xdb\xff\xff" + bytes(65533)  # of a JPEG, as many as a part can hold


REFUSED = {
    "empty": (b"", "is empty"),
    "text": (b"https://example.com/a.png", "is not a PNG, JPEG or WebP file"),
    "gif": (file(image("P"), "GIF"), "is not a PNG, JPEG or WebP file"),
    "tiff": (file(image(), "TIFF"), "is not a PNG, JPEG or WebP file"),
    "bmp": (file(image(), "BMP"), "is not a PNG, JPEG or WebP file"),
    "signature alone": (b"\x89PNG\r\n\x1a\n", "can't be read"),
    "start alone": (b"\xff\xd8\xff", "can't be read"),
    "container alone": (b"RIFF\0\0\0\0WEBP", "can't be read"),
    "apng": (frames("PNG"), "is animated"),
    "apng that says something odd": (png((1, 1), 8, 0, b"\0\0", chunk(b"acTL", bytes(8))), "is animated"),
    "animated webp": (frames("WEBP"), "is animated"),
    "a short header": (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", bytes(5)), "can't be read"),
    "no palette": (png((1, 1), 8, 3, b"\0\0"), "has no palette"),
    "16 bits, one transparent": (png((1, 1), 16, 0, bytes(3), chunk(b"tRNS", bytes(2))), "transparent colour of 16"),
    "2 bits, one transparent": (png((1, 1), 2, 0, bytes(2), chunk(b"tRNS", bytes(2))), "transparent colour of 2 bits"),
    "48 bits, one transparent": (png((1, 1), 16, 2, bytes(7), chunk(b"tRNS", bytes(6))), "transparent colour of 16"),
    "a thousand scans": (scans(1000), "has 1001 scans, which are too many"),
    "a scan for every pixel": (
        file(Image.new("L", (256, 256)), "JPEG").replace(b"\xff\xd9", 40 * b"\xff\xda\0\x02" + b"\xff\xd9"),
        "has 41 scans, which are too many",
    ),
    "parts without end": (flooded(PNG, chunk(b"abCd", b""), 33), f"has more than {MAX_PARTS} parts"),
    "data in tiny parts": (flooded(PNG, chunk(b"IDAT", b""), 33), f"has more than {MAX_PARTS} parts"),
    "parts behind the data": (flooded(PNG, chunk(b"tEXt", b"a\0"), len(PNG) - 12), f"has more than {MAX_PARTS} parts"),
    "markers without end": (flooded(JPEG, b"\xff\xe5\0\x02", 2), f"has more than {MAX_PARTS} parts"),
    "markers in a scan": (flooded(JPEG, b"\xff\x01\0\x02", len(JPEG) - 2), f"has more than {MAX_PARTS} parts"),
    "tables without end": (JPEG[:2] + 5 * TABLES + JPEG[2:], f"has more than {MAX_HEADER} bytes before its pixels"),
    "no pixels": (png((0, 4), 8, 0, bytes(4)), "can't be read"),
    "no end": (PNG[:-12], "can't be read"),
    "no pixels to speak of": (png((250, 250), 16, 6, bytes(9)), "can't be read"),
    "wrong sum": (file(image())[:20] + b"\1" + file(image())[21:], "can't be read"),
}


@pytest.mark.parametrize(("data", "message"), REFUSED.values(), ids=REFUSED)
def test_all_else_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(InvalidValue, match=message) as caught:
        read(data)
    assert caught.value.message.startswith("the file ")
    assert caught.value.param == "image"


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("part", [0.01, 0.3, 0.6, 0.9])
def test_a_file_that_is_cut_off_is_refused(kind: str, part: float) -> None:
    data = file(image(size=(64, 64)), kind)
    assert read(data)
    with pytest.raises(InvalidValue, match=r"can't be read|is not a PNG"):
        read(data[: int(len(data) * part)])


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_picture_may_have_as_many_pixels_as_is_said(kind: str) -> None:
    data = file(image(), kind)
    assert read(data, max_pixels=96)
    with pytest.raises(InvalidValue, match="is 12x8; it must have at most 95 pixels"):
        read(data, max_pixels=95)


TEXT = zlib.compress(bytes(1 << 20))  # what Pillow would unpack of a text; it reads 64 of them
HARMLESS = {
    "texts that unpack to much": png((1, 1), 8, 0, b"\0\x07", *60 * [chunk(b"zTXt", b"a\0\0" + TEXT)]),
    "a profile that unpacks to too much": png((1, 1), 8, 0, b"\0\x07", chunk(b"iCCP", b"a\0\0" + TEXT + TEXT)),
    "wrong sum of a text": png((1, 1), 8, 0, b"\0\x07", chunk(b"tEXt", b"a\0b")[:-1] + b"x"),
}


@pytest.mark.parametrize("data", HARMLESS.values(), ids=HARMLESS)
def test_what_the_pixels_do_not_need_is_not_looked_at(data: bytes) -> None:
    tracemalloc.start()
    assert pixels(data) == b"\7\7\7"
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20


def test_a_run_of_fill_bytes_takes_no_time() -> None:
    filled = JPEG[:2] + (1 << 21) * b"\xff" + JPEG[2:]
    began = time.process_time()
    assert pixels(filled) == pixels(JPEG)
    assert time.process_time() - began < 5  # a run that is begun anew at each of its bytes would take hours


def test_what_says_that_it_is_huge_is_refused_before_it_takes_memory_or_time() -> None:
    code = """
import resource, sys, time
from stepbatch.errors import InvalidValue
from stepbatch.image_files import read_picture
from tests.pictures import bombs
files = [*bombs(40_000).values(), *bombs(12_000).values()]
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for data in files:
    began = time.monotonic()
    try:
        read_picture(data, 32 << 20, "image", "image")
    except InvalidValue as error:
        assert "at most 33554432 pixels" in error.message
    else:
        raise AssertionError("it was read")
    assert time.monotonic() - began < 1
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before  # KiB
assert grown < 8192, grown
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


SEEDS = [
    *(data for data, _ in EXACT.values()),
    *(data for data, _ in REFUSED.values() if 0 < len(data) < 5000),
    file(image(), "JPEG", progressive=True),
    file(image("CMYK"), "JPEG"),
    file(image(), "PNG", exif=Image.Exif(), icc_profile=b"abc" * 9, dpi=(72, 72)),
    *bombs(9_999).values(),
]
changes = st.tuples(st.floats(0, 1), st.integers(0, 8), st.binary(max_size=8))


@settings(max_examples=150)
@given(data=st.sampled_from(SEEDS), edits=st.lists(changes, max_size=5), mend=st.booleans(), end=st.floats(0, 2))
def test_whatever_comes_is_read_or_refused(
    data: bytes, edits: list[tuple[float, int, bytes]], mend: bool, end: float
) -> None:
    for place, length, new in edits:
        position = int(place * len(data))
        data = data[:position] + new + data[position + length :]
    data = data[: int(end * len(data))] if end < 1 else data
    data = with_right_sums(data) if mend and data.startswith(b"\x89PNG") else data
    with suppress(InvalidValue):
        picture = read(data)
        assert picture.on_white().channels == 3
        assert set(picture.as_mask().pixels) <= {0, 255}
