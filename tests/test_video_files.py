"""Files are read back with other readers than ours: what is in them is what went in."""

import io
import os
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from stepbatch.engine.messages import Output
from stepbatch.request import Times
from stepbatch.video_files import spritesheet, thumbnail, write_mp4


def film(frames: int, width: int, height: int) -> NDArray[np.uint8]:
    """Red grows to the right, green downwards, blue with time: each frame can be told from any other."""
    time, down, right = np.indices((frames, height, width))
    parts = (right / max(1, width - 1), down / max(1, height - 1), time / max(1, frames - 1))
    return np.stack([(255 * part).astype(np.uint8) for part in parts], axis=-1)


def output(pixels: NDArray[np.uint8]) -> Output:
    frames, height, width, _ = pixels.shape
    return Output("r", 0, 1, width, height, frames, pixels.tobytes(), Times())


@pytest.mark.parametrize(
    ("frames", "width", "height", "fps"),
    [(9, 64, 48, 8), (1, 16, 16, 24), (30, 32, 16, 240), (5, 47, 33, 30), (2, 1, 1, 1)],
)
def test_an_mp4_has_the_frames_at_their_rate(tmp_path: Path, frames: int, width: int, height: int, fps: int) -> None:
    pixels = film(frames, width, height)
    write_mp4(tmp_path / "film.mp4", output(pixels), fps)
    with av.open(str(tmp_path / "film.mp4")) as file:
        stream = file.streams.video[0]
        decoded = list(file.decode(stream))
        assert (stream.codec_context.name, stream.pix_fmt, stream.average_rate) == ("h264", "yuv420p", fps)
    assert [frame.pts * frame.time_base for frame in decoded] == [Fraction(i, fps) for i in range(frames)]
    got = np.stack([frame.to_ndarray(format="rgb24") for frame in decoded])
    assert got.shape == (frames, height + height % 2, width + width % 2, 3)
    difference = np.abs(got[:, :height, :width].astype(int) - pixels)
    assert difference.mean() < 6  # of 255; colours have half the resolution, which tells where pictures are tiny
    assert np.abs(got.mean((1, 2)) - pixels.mean((1, 2))).max() < 8  # frame by frame: blue grows with time


def test_an_mp4_plays_while_it_comes_in(tmp_path: Path) -> None:
    write_mp4(tmp_path / "film.mp4", output(film(9, 64, 48)), 8)
    data = (tmp_path / "film.mp4").read_bytes()
    assert data[4:8] == b"ftyp"
    assert data.index(b"moov") < data.index(b"mdat")


@pytest.mark.parametrize("path", ["/dev/full", "/nowhere/film.mp4"])
def test_what_can_not_be_written_is_an_error(path: str) -> None:
    opened = os.listdir("/proc/self/fd")
    with pytest.raises(OSError, match=r"No space left|No such file"):
        write_mp4(Path(path), output(film(40, 128, 128)), 8)
    assert os.listdir("/proc/self/fd") == opened


def test_a_thumbnail_is_the_first_frame() -> None:
    picture = Image.open(io.BytesIO(thumbnail(output(film(9, 64, 48)))))
    assert (picture.format, picture.size) == ("WEBP", (64, 48))
    assert np.abs(np.asarray(picture).astype(int) - film(9, 64, 48)[0]).mean() < 8
    assert Image.open(io.BytesIO(thumbnail(output(film(1, 2560, 16))))).size == (1280, 8)


@pytest.mark.parametrize(
    ("frames", "size", "shown"),
    [
        (1, (64, 48), [0]),
        (3, (192, 48), [0, 1, 2]),
        (5, (256, 96), [0, 1, 2, 3, 4]),
        (31, (256, 192), list(range(0, 31, 2))),
    ],
)
def test_a_sheet_shows_frames_from_first_to_last(frames: int, size: tuple[int, int], shown: list[int]) -> None:
    pixels = film(frames, 64, 48)
    sheet = Image.open(io.BytesIO(spritesheet(output(pixels))))
    assert (sheet.format, sheet.size) == ("JPEG", size)
    for place, number in enumerate(shown):
        left, top = place % 4 * 64, place // 4 * 48
        tile = np.asarray(sheet)[top : top + 48, left : left + 64]
        assert np.abs(tile.mean((0, 1)) - pixels[number].mean((0, 1))).max() < 6


def test_a_sheet_of_large_frames_is_no_wider_than_a_screen() -> None:
    assert Image.open(io.BytesIO(spritesheet(output(film(4, 640, 320))))).size == (1280, 160)
