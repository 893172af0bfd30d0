"""Image files for tests, the odd ones among them made by hand."""

from __future__ import annotations

import io
import random
import struct
import zlib
from typing import Any

from PIL import Image


def image(mode: str = "RGB", size: tuple[int, int] = (12, 8), seed: int = 0) -> Image.Image:
    """A picture of noise."""
    pixels = random.Random(seed).randbytes(4 * size[0] * size[1])
    return Image.frombytes("RGBA", size, pixels).convert(mode)


def file(picture: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """A picture as a file."""
    data = io.BytesIO()
    picture.save(data, kind, **options)
    return data.getvalue()


def frames(kind: str, count: int = 2) -> bytes:
    """An animation."""
    data = file(image(), kind, save_all=True, append_images=[image(seed=1)])
    if kind == "WEBP" and count == 1:  # Pillow writes no animation then
        data = data[: data.rindex(b"ANMF")]
        data = data[:4] + struct.pack("<I", len(data) - 8) + data[8:]
    return data


def chunk(kind: bytes, data: bytes) -> bytes:
    """A part of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(size: tuple[int, int], depth: int, colours: int, rows: bytes, *extra: bytes) -> bytes:
    """A PNG of any depth and kind of colours; each of ``rows`` begins with the number of its filter, 0."""
    header = struct.pack(">IIBBBBB", *size, depth, colours, 0, 0, 0)
    chunks = (chunk(b"IHDR", header), *extra, chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def with_right_sums(data: bytes) -> bytes:
    """A PNG whose chunks' checksums are made to fit again."""
    mended, position = data[:8], 8
    while position + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, position)
        if position + 12 + length > len(data):
            break
        mended += chunk(data[position + 4 : position + 8], data[position + 8 : position + 8 + length])
        position += 12 + length
    return mended + data[position:]


def bombs(side: int) -> dict[str, bytes]:
    """Small files that say they are ``side`` pixels wide and high."""
    jpeg = bytearray(file(image(), "JPEG"))
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = struct.pack(">HH", side, side)
    webp = bytearray(frames("WEBP", count=1))
    webp[24:30] = 2 * (side - 1).to_bytes(3, "little")  # the canvas; a frame may be smaller
    return {"PNG": png((side, side), 8, 2, bytes(1000)), "JPEG": bytes(jpeg), "WEBP": bytes(webp)}
