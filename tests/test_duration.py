import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepbatch.config import ModelConfig
from stepbatch.duration import frames_in, parse_seconds, seconds_of
from stepbatch.errors import InvalidValue
from stepbatch.testing import FakeRunner

INFO = FakeRunner(ModelConfig(fake_videos=True)).info


@pytest.mark.parametrize(
    ("value", "seconds"), [("4", 4.0), ("4.5", 4.5), (".5", 0.5), ("8.", 8.0), (4, 4.0), (0.1, 0.1)]
)
def test_seconds_are_a_number_or_a_text(value: object, seconds: float) -> None:
    assert parse_seconds(value) == seconds


@pytest.mark.parametrize(
    "value",
    ["", "0", 0, -1, "-4", "4s", "4e1", " 4", "nan", math.nan, math.inf, True, None, [4], "9" * 20, 1e9, ".", "\u0664"],
)  # fmt: skip
def test_anything_else_is_refused_by_name(value: object) -> None:
    with pytest.raises(InvalidValue, match="must be a number of more than 0") as refused:
        parse_seconds(value)
    assert refused.value.param == "seconds"


@pytest.mark.parametrize(
    ("seconds", "fps", "multiple", "frames"),
    [(5, 16, 4, 81), (4, 16, 4, 65), (2, 24, 8, 49), (4, 24, 1, 96), (0.01, 16, 4, 1), (0.2, 8, 4, 1), (0.5, 8, 4, 5)],
)
def test_the_nearest_number_of_frames(seconds: float, fps: int, multiple: int, frames: int) -> None:
    assert frames_in(seconds, fps, msgspec.structs.replace(INFO, frames_multiple=multiple)) == frames


@given(st.floats(0, 1e9, exclude_min=True), st.integers(1, 240), st.integers(1, 16), st.integers(1, 400))
def test_what_comes_can_be_made_and_nothing_is_nearer(seconds: float, fps: int, multiple: int, most: int) -> None:
    info = msgspec.structs.replace(INFO, frames_multiple=multiple, max_frames=most)
    try:
        frames = frames_in(seconds, fps, info)
    except InvalidValue as refused:
        assert refused.param == "seconds"  # noqa: PT017
        largest = most - (most - 1) % multiple
        assert seconds * fps - largest >= multiple / 2 * (1 - 1e-9)
    else:
        assert 1 <= frames <= most
        assert (frames - 1) % multiple == 0
        if frames > 1:
            assert abs(frames - seconds * fps) <= multiple / 2 * (1 + 1e-9)


@pytest.mark.parametrize(
    ("frames", "fps", "text"), [(81, 16, "5.062"), (96, 24, "4"), (1, 3, "0.333"), (4096, 1, "4096")]
)
def test_how_long_frames_last(frames: int, fps: int, text: str) -> None:
    assert seconds_of(frames, fps) == text
