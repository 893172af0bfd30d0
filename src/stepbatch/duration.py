"""How long a video is: seconds as a number of frames, and back."""

from __future__ import annotations

import math
import re

from stepbatch.errors import InvalidValue
from stepbatch.model_info import ModelInfo

_SECONDS = re.compile(r"[0-9]{1,9}(\.[0-9]{0,9})?|\.[0-9]{1,9}")


def parse_seconds(value: object) -> float:
    """The seconds that a number, or a text like OpenAI's ``"4"``, says.

    Raises:
        InvalidValue: it is neither, or not more than 0.
    """
    if isinstance(value, str) and _SECONDS.fullmatch(value):
        value = float(value)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 1e9:
        raise InvalidValue('seconds must be a number of more than 0, like "4"', "seconds")
    return float(value)


def frames_in(seconds: float, fps: int, info: ModelInfo) -> int:
    """The number of frames that the model can make and that comes nearest to so many seconds.

    Raises:
        InvalidValue: it is more than the model makes.
    """
    multiple = info.frames_multiple
    frames = max(0, math.floor((seconds * fps - 1) / multiple + 0.5)) * multiple + 1
    if frames > info.max_frames:
        limit = f"{seconds_of(info.max_frames, fps)} at {fps} frames a second, which are {info.max_frames} frames"
        raise InvalidValue(f"seconds must be at most {limit}", "seconds")
    return frames


def seconds_of(frames: int, fps: int) -> str:
    """How long so many frames last, as OpenAI writes it: a number in a text."""
    return f"{round(frames / fps, 3):.10g}"
