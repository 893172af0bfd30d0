"""Image files to pixels. They come from strangers, so they are measured before they are decoded. No torch here."""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from PIL import Image
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from stepbatch.errors import InvalidValue
from stepbatch.image import InputImage

MAX_SCANS = 100  # of a JPEG, which has about ten: each is a pass over all its pixels, and takes but a few bytes
MAX_PASSES = 20  # over as many pixels as there may be
MAX_PARTS = 10_000  # of a PNG or JPEG; of the largest, there are some thousands
MAX_HEADER = 1 << 18  # bytes of a JPEG before its first scan, of what is needed to decode it

_STRETCH = 1 << 18  # bytes that are searched at once, while which no other thread runs
_DAMAGE = (OSError, SyntaxError, ValueError)  # what Pillow finds, in its words
_PNG, _JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"
_NEEDED = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"eXIf", b"IEND")  # of a PNG's chunks
_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by a PNG's kind of colours
_MOST_PACKED = 1032  # bytes that deflate makes one of, at most
_MARKER = re.compile(rb"\xff[\x01-\xcf\xd9-\xfe]")  # but for those within a scan: restarts, and a value of 255
_ORIENTATION = 0x0112  # EXIF's tag
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True, eq=False)
class Picture:
    """A decoded file: its colours, RGB, and its alpha channel where any of it is transparent."""

    colours: Image.Image
    alpha: Image.Image | None

    @property
    def has_holes(self) -> bool:
        """Whether some of it is more transparent than not."""
        return self.alpha is not None and any(self.alpha.histogram()[:128])

    def on_white(self) -> InputImage:
        """The picture, laid on white where it is transparent."""
        if self.alpha is None:
            return _input_image(self.colours)
        canvas = Image.new("RGB", self.colours.size, "white")
        canvas.paste(self.colours, mask=self.alpha)
        return _input_image(canvas)

    def as_mask(self) -> InputImage:
        """What is to be painted anew: what is transparent, or, in a file without transparency, what is white."""
        if self.alpha is None:
            return _input_image(self.colours.convert("L").point([0] * 128 + [255] * 128))
        return _input_image(self.alpha.point([255] * 128 + [0] * 128))


def read_picture(data: bytes, max_pixels: int, name: str, param: str) -> Picture:
    """Decode a PNG, JPEG or WebP file, whichever its bytes say it is, and turn it as its EXIF says.

    Args:
        data: The file.
        max_pixels: What has more is refused before anything of it is decoded.
        name: What the file is called in errors.
        param: Which field it is of.

    Raises:
        InvalidValue: it is none of these, animated, too large, damaged, or of a kind that Pillow would read wrongly.
    """
    try:
        data, scans = _needed(data)
        image = _open(data)
        pixels = image.width * image.height
        if pixels > max_pixels:
            raise _Refused(f"is {image.width}x{image.height}; it must have at most {max_pixels} pixels")
        if scans > MAX_SCANS or scans * pixels > MAX_PASSES * max_pixels:
            raise _Refused(f"has {scans} scans, which are too many")
        _check_whole(image, data)
        image.load()
        _check_transparency(image, data)
        return _picture(_upright(image))
    except _Refused as error:
        raise InvalidValue(f"{name} {error}", param) from None
    except Image.DecompressionBombError:  # the WebP reader's own limit, before it says the size
        raise InvalidValue(f"{name} is too large; it must have at most {max_pixels} pixels", param) from None
    except _DAMAGE:
        raise InvalidValue(f"{name} can't be read: it is damaged, or not all of it is there", param) from None


class _Refused(Exception):
    """A file that is whole and won't be decoded; the message goes on where its name ends."""


class _Jpeg(JpegImageFile):
    """Without Pillow's look into the EXIF for dots per inch, which prints warnings about what it doesn't like there."""

    def getexif(self) -> Image.Exif:
        return Image.Exif()


def _needed(data: bytes) -> tuple[bytes, int]:
    """The file without what its pixels don't need, of which little can become much, and how many scans it has."""
    if data.startswith(_PNG):
        return b"".join([_PNG, *_png_parts(data)]), 0
    if data.startswith(_JPEG):
        parts, scans = _jpeg_parts(data)
        return b"".join([data[:2], *parts]) if parts else data, scans
    return data, 0


def _png_parts(data: bytes) -> Iterator[memoryview]:
    for number, (kind, part) in enumerate(_png_chunks(data), start=1):
        if number > MAX_PARTS:
            raise _Refused(f"has more than {MAX_PARTS} parts")
        if kind == b"acTL":
            raise _Refused("is animated; a single picture is needed")
        if kind in _NEEDED:
            yield part
        if kind == b"IEND":
            return


def _jpeg_parts(data: bytes) -> tuple[list[memoryview], int]:
    """What a decoder needs before the first scan, where Pillow looks at everything, and all from there."""
    parts, size, scans, view = [], 0, 0, memoryview(data)
    for kind, start, end in _jpeg_markers(data):
        if kind in (0xD9, 0xDA):
            parts += [] if scans else [view[start:]]
            scans += kind == 0xDA
        elif not scans and _is_needed(kind, data[start + 4 : start + 10]):
            parts.append(view[start:end])
            size += end - start
        if size > MAX_HEADER:
            raise _Refused(f"has more than {MAX_HEADER} bytes before its pixels")
    return parts, scans


def _is_needed(kind: int, part: bytes) -> bool:
    """Whether a JPEG's part is: tables, frames, what says how colours are meant, and EXIF."""
    return 0xC0 <= kind <= 0xE0 or kind == 0xEE or (kind == 0xE1 and part == b"Exif\0\0")


def _open(data: bytes) -> ImageFile:
    """The file's header. ``Image.open`` would do more: guess among formats, and warn of large pictures on stderr."""
    if not data:
        raise _Refused("is empty")
    if data.startswith(_PNG):
        return PngImageFile(io.BytesIO(data))
    if data.startswith(_JPEG):
        return _Jpeg(io.BytesIO(data))  # of a file with more pictures behind it, as cameras write, the first
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        webp = WebPImageFile(io.BytesIO(data))
        if webp.n_frames > 1:
            raise _Refused("is animated; a single picture is needed")
        return webp
    raise _Refused("is not a PNG, JPEG or WebP file")


def _check_whole(image: ImageFile, data: bytes) -> None:
    """Raise ``ValueError`` for a PNG that can't be whole, before there is memory for its pixels."""
    if not isinstance(image, PngImageFile):
        return
    parts = list(_png_chunks(data))
    packed = sum(len(part) for kind, part in parts if kind == b"IDAT")
    depth, kind = data[24], data[25]  # the header is the first chunk
    pixels = image.width * image.height * depth * _CHANNELS.get(kind, 1) // 8
    if parts[-1][0] != b"IEND" or packed * _MOST_PACKED < pixels:
        raise ValueError("it is cut off")


def _check_transparency(image: ImageFile, data: bytes) -> None:
    """Refuse the PNGs that Pillow gets wrong: it compares their transparent colour with values scaled to 8 bits."""
    if not isinstance(image, PngImageFile):
        return
    if image.mode == "P" and image.palette is None:
        raise _Refused("has no palette")
    depth, kind = data[24], data[25]  # the header is the first chunk
    if "transparency" in image.info and kind in (0, 2) and depth not in (1, 8):
        raise _Refused(f"has a transparent colour of {depth} bits; an alpha channel can be read")


def _jpeg_markers(data: bytes) -> Iterator[tuple[int, int, int]]:
    """What a JPEG consists of, up to its end, as phones put films behind it: its kind, and where it begins and ends."""
    position = 2
    for _ in range(MAX_PARTS):
        start = _find_marker(data, position)
        if start is None:
            return
        kind, length = data[start + 1], int.from_bytes(data[start + 2 : start + 4], "big")
        position = start + 2 + length  # of its own bytes, none is a marker
        yield kind, start, position
        if kind == 0xD9:  # the end
            return
    raise _Refused(f"has more than {MAX_PARTS} parts")


def _find_marker(data: bytes, position: int) -> int | None:
    for start in range(position, len(data), _STRETCH):
        if found := _MARKER.search(data, start, start + _STRETCH + 1):
            return found.start()
    return None


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, memoryview]]:
    """A PNG's chunks: their kinds, and all of them."""
    position, view = 8, memoryview(data)
    while position + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        yield kind, view[position : position + 12 + length]
        position += 12 + length


def _upright(image: Image.Image) -> Image.Image:
    method = _UPRIGHT.get(_orientation(image.info.get("exif", b"")))
    return image if method is None else image.transpose(method)


def _orientation(exif: bytes) -> int:
    """How a picture was held, from 1 to 8. EXIF that can't be read says nothing: the picture is whole without it."""
    tiff = exif.removeprefix(b"Exif\0\0")
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4], "")
    if not order:
        return 1
    try:
        (start,) = struct.unpack_from(f"{order}I", tiff, 4)
        (count,) = struct.unpack_from(f"{order}H", tiff, start)
        for index in range(count):
            tag, kind, _, value = struct.unpack_from(f"{order}HHIH", tiff, start + 2 + 12 * index)
            if tag == _ORIENTATION and kind == 3:  # a 16-bit number
                return int(value)
    except struct.error:  # it ends before that
        pass
    return 1


def _picture(image: Image.Image) -> Picture:
    if image.mode == "I;16":  # a conversion would clip, not scale
        return Picture(image.point(lambda value: value * (255 / 65535) + 0.5).convert("L").convert("RGB"), None)
    if not image.has_transparency_data:
        return Picture(image.convert("RGB"), None)
    image = image.convert("RGBA")
    alpha = image.getchannel("A")
    return Picture(image.convert("RGB"), alpha if any(alpha.histogram()[:255]) else None)


def _input_image(image: Image.Image) -> InputImage:
    return InputImage(image.width, image.height, image.tobytes())
