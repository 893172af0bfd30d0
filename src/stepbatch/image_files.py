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

_DAMAGE = (OSError, SyntaxError, ValueError)  # what Pillow finds, in its words
_MARKER = re.compile(rb"\xff+[\x01-\xcf\xd9-\xfe]")  # but for those within a scan: restarts, and a value of 255
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
        image = _open(data)
        if image.width * image.height > max_pixels:
            raise _Refused(f"is {image.width}x{image.height}; it must have at most {max_pixels} pixels")
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


def _open(data: bytes) -> ImageFile:
    """The file's header. ``Image.open`` would do more: guess among formats, and warn of large pictures on stderr."""
    if not data:
        raise _Refused("is empty")
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        if b"acTL" in _png_chunks(data):
            raise _Refused("is animated; a single picture is needed")
        return PngImageFile(io.BytesIO(data))
    if data.startswith(b"\xff\xd8\xff"):
        if _scans(data) > MAX_SCANS:
            raise _Refused(f"has more than {MAX_SCANS} scans")
        return _Jpeg(io.BytesIO(data))  # of a file with more pictures behind it, as cameras write, the first
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        webp = WebPImageFile(io.BytesIO(data))
        if webp.n_frames > 1:
            raise _Refused("is animated; a single picture is needed")
        return webp
    raise _Refused("is not a PNG, JPEG or WebP file")


def _check_transparency(image: ImageFile, data: bytes) -> None:
    """Refuse the PNGs that Pillow gets wrong: it compares their transparent colour with values scaled to 8 bits."""
    if not isinstance(image, PngImageFile):
        return
    if image.mode == "P" and image.palette is None:
        raise _Refused("has no palette")
    depth, kind = data[24], data[25]  # the header is the first chunk
    if "transparency" in image.info and kind in (0, 2) and depth not in (1, 8):
        raise _Refused(f"has a transparent colour of {depth} bits; an alpha channel can be read")


def _scans(data: bytes) -> int:
    """How many scans a JPEG has, up to its end: phones put films behind it."""
    count, position = 0, 2
    while marker := _MARKER.search(data, position):
        kind, position = data[marker.end() - 1], marker.end()
        if kind == 0xD9:  # the end
            break
        count += kind == 0xDA
        position += int.from_bytes(data[position : position + 2], "big")  # of its own bytes, none is a marker
    return count


def _png_chunks(data: bytes) -> Iterator[bytes]:
    """The kinds of a PNG's chunks, in order."""
    position = 8
    while position + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        yield kind
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
