"""Frames to files: an MP4, a picture that stands for it, and a sheet of its frames. No torch here."""

from __future__ import annotations

import io
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace
from numpy.typing import NDArray
from PIL import Image

from stepbatch.engine.messages import Output

SHEET_FRAMES = 16  # the most that a sheet shows
SHEET_COLUMNS = 4
SHEET_WIDTH = 1280  # pixels; of a sheet, and the most of a thumbnail

BT709 = 1  # what players take colours of HD for; by the numbers of H.273

# Visually lossless at a rate that a CPU keeps up with: a frame of 832x480 takes about a hundredth of a second.
_ENCODER = {"crf": "17", "preset": "veryfast"}


def write_mp4(path: Path, output: Output, fps: int) -> None:
    """Write an output's frames as H.264, playable while it is still coming in.

    H.264's colours have half the resolution, so an odd side is made even: its last row or column is there twice.

    Raises:
        OSError: it can't be written.
    """
    frames = _frames(output)
    height, width = output.height + output.height % 2, output.width + output.width % 2
    written = io.BytesIO()  # as PyAV never closes a file of its own where there is no room for the header

    def again(*_: object) -> io.BytesIO:
        return io.BytesIO(written.getvalue())

    # Its index, which is known last, is put first: for that, what is behind it is read again.
    with av.open(written, "w", format="mp4", options={"movflags": "+faststart"}, io_open=again) as file:
        stream = file.add_stream("libx264", rate=Fraction(fps), options=_ENCODER)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.time_base = Fraction(1, fps)
        stream.codec_context.colorspace = Colorspace.ITU709
        stream.codec_context.color_primaries = stream.codec_context.color_trc = BT709
        stream.codec_context.color_range = ColorRange.MPEG
        for number, pixels in enumerate(frames):
            even = np.pad(pixels, ((0, height - output.height), (0, width - output.width), (0, 0)), "edge")
            frame = av.VideoFrame.from_ndarray(even, format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG)
            frame.pts, frame.time_base = number, Fraction(1, fps)
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    path.write_bytes(written.getbuffer())


def thumbnail(output: Output) -> bytes:
    """The first frame as a WebP file, no wider than ``SHEET_WIDTH``."""
    picture = Image.fromarray(_frames(output)[0])
    picture.thumbnail((SHEET_WIDTH, SHEET_WIDTH))
    return _encode(picture, "webp")


def spritesheet(output: Output) -> bytes:
    """Up to ``SHEET_FRAMES`` frames from first to last, row by row, as a JPEG file."""
    frames = _frames(output)
    count = min(len(frames), SHEET_FRAMES)
    columns = min(count, SHEET_COLUMNS)
    width = min(output.width, SHEET_WIDTH // columns)
    height = max(1, round(output.height * width / output.width))
    sheet = Image.new("RGB", (columns * width, -(-count // columns) * height))
    for place in range(count):
        number = round(place * (len(frames) - 1) / max(1, count - 1))
        picture = Image.fromarray(frames[number]).resize((width, height))
        sheet.paste(picture, (place % columns * width, place // columns * height))
    return _encode(sheet, "jpeg")


def _frames(output: Output) -> NDArray[np.uint8]:
    return np.frombuffer(output.pixels, np.uint8).reshape(output.frames, output.height, output.width, 3)


def _encode(picture: Image.Image, output_format: str) -> bytes:
    file = io.BytesIO()
    picture.save(file, output_format, quality=85)
    return file.getvalue()
