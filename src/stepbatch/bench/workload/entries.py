"""What is said of a request by a line of a dataset or by a profile: names, types and ranges."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import msgspec

from stepbatch.errors import InvalidValue, OptionError
from stepbatch.sizes import parse_size

Task = Literal["text-to-image", "image-to-image", "text-to-video", "image-to-video"]

ALIASES = {
    "kind": "task",
    "num_outputs_per_prompt": "n",
    "text": "prompt",
    "image_path": "images",
    "image_paths": "images",
}
UNSENT = ("id", "request_id")  # names of a line, not fields of a request
NUMBERS: dict[str, tuple[type[int] | type[float], float]] = {  # their type, and the least they may be
    "width": (int, 1),
    "height": (int, 1),
    "num_inference_steps": (int, 1),
    "n": (int, 1),
    "num_frames": (int, 1),
    "fps": (int, 1),
    "seed": (int, 0),
    "guidance_scale": (float, 0),
    "slo_ms": (float, 0),
    "timestamp": (float, -math.inf),
}
FIELDS = ("prompt", "size", "task", "images", *NUMBERS, *ALIASES, *UNSENT)
_GREATEST = 2**63 - 1


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """What a dataset says of one request; ``None`` where it says nothing."""

    prompt: str
    task: Task | None = None
    width: int | None = None  # pixels
    height: int | None = None  # pixels
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    n: int | None = None
    seed: int | None = None
    num_frames: int | None = None
    fps: int | None = None
    images: tuple[Path, ...] = ()
    extra: dict[str, Any] = {}  # what else is sent
    timestamp: float | None = None  # seconds after the start
    slo_ms: float | None = None

    def said(self) -> dict[str, Any]:
        """The fields that are given."""
        fields = {name: getattr(self, name) for name in self.__struct_fields__}
        return {name: value for name, value in fields.items() if value not in (None, (), {})}


def parse(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Fields of an ``Entry``, from values as JSON has them, or from text.

    ``size`` becomes width and height, and what is no field goes into ``extra``. ``None``, a blank prompt and the size
    ``auto`` say nothing. ``images`` are as they were given: text.

    Args:
        values: By name.
        where: What errors begin with.

    Raises:
        OptionError: a value is of the wrong type or out of range, or two contradict each other.
    """
    try:
        return _parse({name: value for name, value in values.items() if value is not None})
    except InvalidValue as error:
        raise OptionError(f"{where}: {error.message}") from None


def _parse(values: Mapping[str, Any]) -> dict[str, Any]:
    if "size" in values and ("width" in values or "height" in values):
        raise InvalidValue("size goes without width and height", "size")
    fields: dict[str, Any] = {}
    extra: dict[str, Any] = {}
    for given, value in values.items():
        name = ALIASES.get(given, given)
        if name in fields:
            raise InvalidValue(f"{name} is given twice, once as {given}", given)
        if name in FIELDS:
            fields |= {} if name in UNSENT else _field(name, value)
        else:
            extra[name] = value
    if ("width" in fields) != ("height" in fields):
        raise InvalidValue("width and height go together", "width")
    if "images" in fields and fields.get("task", "").startswith("text"):
        raise InvalidValue(f"{fields['task']} takes no image", "task")
    return fields | ({"extra": extra} if extra else {})


def _field(name: str, value: Any) -> dict[str, Any]:
    if name in NUMBERS:
        return {name: _number(name, value)}
    if name == "size":
        return {} if value == "auto" else dict(zip(("width", "height"), _size(value), strict=True))
    if name == "task":
        return {name: _task(value)}
    if name == "images":
        return {name: _images(value)}
    if not isinstance(value, str):
        raise InvalidValue(f"{name} must be text, not {value!r:.80}", name)
    return {name: value} if value.strip() else {}


def _number(name: str, value: Any) -> float:
    kind, least = NUMBERS[name]
    try:
        number = msgspec.convert(value, int | float, strict=False)  # text too, as tables have it
    except msgspec.ValidationError:
        number = math.nan
    whole = isinstance(number, int) or number.is_integer()
    if not least <= number <= _GREATEST or (kind is int and not whole):
        bound = "" if math.isinf(least) else f" of at least {least}"
        raise InvalidValue(f"{name} must be a {'whole ' * (kind is int)}number{bound}, not {value!r:.80}", name)
    return kind(number)


def _size(value: Any) -> tuple[float, float]:
    width, height = parse_size(value)
    return _number("width", width), _number("height", height)


def _task(value: Any) -> str:
    tasks: tuple[str, ...] = get_args(Task)
    if value not in tasks:
        close = difflib.get_close_matches(str(value), tasks, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise InvalidValue(f"task must be one of {', '.join(tasks)}, not {value!r:.80}{hint}", "task")
    return str(value)


def _images(value: Any) -> tuple[str, ...]:
    paths = tuple(value) if isinstance(value, list | tuple) else (value,)
    if not all(isinstance(path, str) and path for path in paths):
        raise InvalidValue(f"an image must be a file's path, not {value!r:.80}", "image_path")
    return paths
