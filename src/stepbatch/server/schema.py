"""The fields of an image request as what they ask for: a ``GenerationRequest``, and how it is answered.

Much of it serves requests for videos too. Values are checked where they have a meaning: what the model is asked for in
``request.py``, how it is answered here.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from stepbatch.checks import check_int
from stepbatch.config import LimitsConfig
from stepbatch.errors import InvalidJSON, InvalidValue, ModelNotFound, RequestError, UnknownParameter
from stepbatch.model_info import ModelInfo
from stepbatch.request import FIELDS, GenerationRequest
from stepbatch.server.fields import (
    BACKGROUNDS,
    EDITS,
    GENERATIONS,
    HARMLESS,
    IGNORED_OPENAI,
    IGNORED_OTHERS,
    OUTPUT_FORMATS,
    RESPONSE_FORMATS,
    ROUTES,
    USUALLY_IDLE,
    VIDEOS,
)
from stepbatch.sizes import parse_size

USUAL_LIMITS = LimitsConfig()
_MAX_MARKS = 20_000  # commas and brackets of JSON: values take long to read for what they are, unlike long texts
_MAX_DIGITS = 40  # of an integer; a longer one is out of every range, and slow to convert


@dataclass(frozen=True, kw_only=True)
class ImageRequest:
    """What a body asked for: the pictures, and how they are answered."""

    generation: GenerationRequest
    response_format: str
    output_format: str
    output_compression: int
    ignored: tuple[str, ...]  # fields that were given and have no effect
    has_size: bool  # width and height came as size

    def blame(self, error: RequestError) -> RequestError:
        """The same error, naming the field that the caller gave."""
        if error.param == "images":
            hint = "" if self.generation.images else f"; send it to {EDITS}"
            return type(error)(error.message + hint, "image")
        return blame_size(error, self.generation, self.has_size)


def parse_json(body: bytes) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        InvalidJSON: it isn't UTF-8, JSON or an object, nests too deeply or has far more values than there are fields.
    """
    if sum(body.count(mark) for mark in (b",", b"[", b"{")) > _MAX_MARKS:
        raise InvalidJSON(f"the body has more than {_MAX_MARKS} commas and brackets")
    try:
        value = json.loads(body.decode("utf-8"), parse_int=_integer)
    except RecursionError:
        raise InvalidJSON("the body nests too deeply") from None
    except UnicodeDecodeError:
        raise InvalidJSON("the body is not UTF-8") from None
    except ValueError as error:
        raise InvalidJSON(f"the body is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise InvalidJSON("the body must be a JSON object")
    return value


def parse(
    body: Mapping[str, Any],
    info: ModelInfo,
    idle: Collection[str] = USUALLY_IDLE,
    limits: LimitsConfig = USUAL_LIMITS,
) -> ImageRequest:
    """Turn a body into what it asks for. Null counts as absent.

    Args:
        idle: Fields that the server's settings leave without effect.
        limits: How much may be asked for.

    Raises:
        UnknownParameter: a field that is neither read nor on a list of ignored ones.
        ModelNotFound: another model than the served one.
        InvalidValue: a value of the wrong type, out of range or not served; ``param`` names the field.
    """
    given, ignored = known_fields(body, info, GENERATIONS, idle)
    check_makes_pictures(info)
    if _choice(given, "background", BACKGROUNDS, "opaque") == "transparent":
        raise InvalidValue("background can't be transparent: pictures have no alpha channel", "background")
    if "background" in given:
        ignored.append("background")
    output_format = _choice(given, "output_format", OUTPUT_FORMATS, "png")
    return ImageRequest(
        generation=generation_of(given, idle, limits),
        response_format=_choice(given, "response_format", RESPONSE_FORMATS, "b64_json"),
        output_format=output_format,
        output_compression=_compression(given, output_format),
        ignored=tuple(ignored),
        has_size=has_size(given),
    )


def known_fields(
    body: Mapping[str, Any], info: ModelInfo, route: str, idle: Collection[str] = USUALLY_IDLE
) -> tuple[dict[str, Any], list[str]]:
    """The fields of a route that are given, null counting as absent, and the names of those without effect.

    Raises:
        RequestError: a field that there isn't, another model than the served one, or a wish that no model fulfils.
    """
    for name in body:
        check_known(name, route)
    given = {name: value for name, value in body.items() if value is not None}
    if "model" in given:
        check_model(given["model"], info)
    for name, (harmless, reason) in HARMLESS.items():
        if name in given and (type(given[name]) is not type(harmless) or given[name] != harmless):
            raise InvalidValue(f"{name} must be {json.dumps(harmless)} or absent: {reason}", name)
    ignored = (*IGNORED_OPENAI, *IGNORED_OTHERS, *idle)
    return given, [name for name in given if name in ignored]


def check_makes_pictures(info: ModelInfo) -> None:
    """Raise ``InvalidValue`` where the model makes videos instead."""
    if info.makes_videos:
        raise InvalidValue(f"the model makes videos; ask for them at {VIDEOS}", "model")


def from_texts(texts: Mapping[str, str], route: str = EDITS) -> dict[str, Any]:
    """The values that the texts of a route's form stand for, by the types of their fields.

    An empty text counts as absent, since forms send what was left blank; only a negative prompt can be empty.

    Raises:
        InvalidValue: a text is no number, or neither true nor false, where it should be.
    """
    fields = ROUTES[route]
    return {
        name: _value(name, text, fields.get(name, {"type": "string"}))  # an ignored one is a string
        for name, text in texts.items()
        if text or name == "negative_prompt"
    }


def check_known(name: str, route: str = GENERATIONS) -> None:
    """Raise ``UnknownParameter`` for a field that a route doesn't have, with the one that was perhaps meant."""
    known = (*ROUTES[route], *IGNORED_OPENAI, *IGNORED_OTHERS)
    if name in known:
        return
    if other := next((path for path, fields in ROUTES.items() if name in fields), None):
        raise UnknownParameter(f"{name} is a field of {other}, not of this route", name)
    shown = name[:64]
    close = difflib.get_close_matches(shown, known, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    raise UnknownParameter(f"{json.dumps(shown)} is not a field of this request{hint}", shown)


def check_model(name: object, info: ModelInfo) -> None:
    """Raise ``ModelNotFound`` unless ``name`` is the served model's."""
    if not isinstance(name, str):
        raise InvalidValue("model must be a string", "model")
    if not name or name not in (info.id, info.path, PurePath(info.path).name):
        raise ModelNotFound(f"the model {json.dumps(name[:200])} is not served here; {info.id} is", "model")


def generation_of(
    given: Mapping[str, Any], idle: Collection[str] = USUALLY_IDLE, limits: LimitsConfig = USUAL_LIMITS
) -> GenerationRequest:
    """What the fields of a route that are given ask of the model. A user that has no effect may be anything.

    Raises:
        InvalidValue: a value is missing, of the wrong type or out of range; ``param`` is the field that was given.
    """
    if "prompt" not in given:
        raise InvalidValue("prompt is required", "prompt")
    width, height = _size(given)
    fields = {name: value for name, value in given.items() if name in FIELDS}
    if "user" in idle:
        fields.pop("user", None)
    try:
        generation = GenerationRequest(**{**fields, "width": width, "height": height})
    except InvalidValue as error:
        raise blame_size(error, None, has_size(given)) from None
    _check_limits(generation, limits)
    return generation


def _check_limits(generation: GenerationRequest, limits: LimitsConfig) -> None:
    check_int("n", generation.n, 1, limits.max_outputs)
    check_int("num_inference_steps", generation.num_inference_steps, 1, limits.max_steps)
    for name, text in (("prompt", generation.prompt), ("negative_prompt", generation.negative_prompt or "")):
        if len(text.encode()) > limits.max_prompt_bytes:
            raise InvalidValue(f"{name} must have at most {limits.max_prompt_bytes} bytes", name)


def has_size(given: Mapping[str, Any]) -> bool:
    """Whether width and height come as ``size``."""
    return bool(given.get("size", "auto") != "auto")


def _size(given: Mapping[str, Any]) -> tuple[Any, Any]:
    width, height, size = given.get("width"), given.get("height"), given.get("size")
    if not has_size(given):
        return width, height
    sides = parse_size(size)
    for name, value, side in (("width", width, sides[0]), ("height", height, sides[1])):
        if value is not None and (type(value) is not int or value != side):
            raise InvalidValue(f"size is {size}, which disagrees with {name}; give one or the other", "size")
    return sides


def _compression(given: Mapping[str, Any], output_format: str) -> int:
    value = given.get("output_compression", 100)
    if type(value) is not int or not 0 <= value <= 100:
        raise InvalidValue("output_compression must be an integer from 0 to 100", "output_compression")
    if output_format == "png" and value != 100:
        raise InvalidValue("output_compression is for jpeg and webp; a png is lossless", "output_compression")
    return value


def _choice(given: Mapping[str, Any], name: str, choices: tuple[str, ...], default: str) -> str:
    value = given.get(name, default)
    if not isinstance(value, str) or value not in choices:
        raise InvalidValue(f"{name} must be one of {', '.join(choices)}", name)
    return value


def blame_size(error: RequestError, generation: GenerationRequest | None, has_size: bool) -> RequestError:
    """The same error, laid on ``size`` where that, or its absence beside an image, made width and height."""
    if error.param in ("width", "height"):
        if has_size:
            return type(error)(error.message, "size")
        if generation is not None and generation.width is None and generation.images:
            return type(error)(f"the image's own size can't be drawn, so give one: {error.message}", "size")
    return error


def _integer(digits: str) -> int | float:
    return int(digits) if len(digits) <= _MAX_DIGITS else float(digits)


# What a form's text must look like, how it is read, and what it should have been.
_TEXTS: dict[str, tuple[re.Pattern[str], Callable[[str], Any], str]] = {
    "integer": (re.compile(r"[+-]?[0-9]+"), _integer, "an integer"),
    "number": (re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?"), float, "a number"),
    "boolean": (re.compile(r"true|false", re.IGNORECASE), lambda text: text.lower() == "true", "true or false"),
    "string": (re.compile(r".*", re.DOTALL), str, "text"),
}


def _value(name: str, text: str, field: Mapping[str, Any]) -> Any:
    kinds = field["type"] if isinstance(field["type"], list) else [field["type"]]
    pattern, convert, kind = _TEXTS[kinds[0]]
    if not pattern.fullmatch(text):
        raise InvalidValue(f"{name} must be {kind}", name)
    return convert(text)
