"""The body of an image request: which fields there are, and how it becomes a ``GenerationRequest``.

Values are checked where they have a meaning: what the model is asked for in ``request.py``, how it is answered here.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from stepbatch.errors import InvalidJSON, InvalidValue, ModelNotFound, RequestError, UnknownParameter
from stepbatch.model_info import ModelInfo
from stepbatch.request import MAX_GUIDANCE, MAX_OUTPUTS, MAX_PROMPT_CHARACTERS, MAX_SEED, MAX_STEPS, GenerationRequest
from stepbatch.sizes import parse_size

OUTPUT_FORMATS = ("png", "jpeg", "webp")
RESPONSE_FORMATS = ("b64_json", "url")
BACKGROUNDS = ("auto", "opaque", "transparent")

# Every field that is read, as JSON Schema. The OpenAPI document shows this table; a test holds docs/api.md against it.
FIELDS: dict[str, dict[str, Any]] = {
    "prompt": {"type": "string", "maxLength": MAX_PROMPT_CHARACTERS, "description": "What to draw."},
    "model": {"type": "string", "description": "The served model's name, its path, or the last folder of its path."},
    "n": {"type": "integer", "minimum": 1, "maximum": MAX_OUTPUTS, "default": 1, "description": "How many pictures."},
    "size": {"type": "string", "description": "WIDTHxHEIGHT in pixels, or auto for the model's own size."},
    "width": {"type": "integer", "minimum": 1, "description": "Pixels; goes with height, instead of size."},
    "height": {"type": "integer", "minimum": 1, "description": "Pixels; goes with width, instead of size."},
    "response_format": {
        "type": "string",
        "enum": list(RESPONSE_FORMATS),
        "default": "b64_json",
        "description": "The pictures in the answer itself, or addresses to fetch them from for a while.",
    },
    "output_format": {
        "type": "string",
        "enum": list(OUTPUT_FORMATS),
        "default": "png",
        "description": "The pictures' file format.",
    },
    "output_compression": {
        "type": "integer",
        "minimum": 0,
        "maximum": 100,
        "default": 100,
        "description": "Quality of jpeg and webp, 100 the best; a png is lossless and takes only 100.",
    },
    "negative_prompt": {"type": "string", "maxLength": MAX_PROMPT_CHARACTERS, "description": "What not to draw."},
    "num_inference_steps": {"type": "integer", "minimum": 1, "maximum": MAX_STEPS, "description": "Denoising steps."},
    "guidance_scale": {
        "type": "number",
        "minimum": 0,
        "maximum": MAX_GUIDANCE,
        "description": "Strength of guidance, as the model's diffusers pipeline means it.",
    },
    "true_cfg_scale": {
        "type": "number",
        "minimum": 0,
        "maximum": MAX_GUIDANCE,
        "description": "Strength of classifier-free guidance, for models that have a distilled guidance_scale besides.",
    },
    "flow_shift": {
        "type": "number",
        "exclusiveMinimum": 0,
        "maximum": MAX_GUIDANCE,
        "description": "Shift of the noise schedule.",
    },
    "max_sequence_length": {"type": "integer", "minimum": 1, "description": "The prompt's limit, tokens."},
    "seed": {
        "type": "integer",
        "minimum": 0,
        "maximum": MAX_SEED,
        "description": "Of the first picture; the i-th after it has seed + i. Drawn at random where absent.",
    },
    "background": {
        "type": "string",
        "enum": ["auto", "opaque"],
        "default": "opaque",
        "description": "Pictures are opaque; transparent is refused.",
    },
    "stream": {"type": "boolean", "enum": [False], "default": False, "description": "Streaming is not served yet."},
    "partial_images": {"type": "integer", "enum": [0], "default": 0, "description": "Not served yet."},
    "generator_device": {
        "type": "string",
        "enum": ["cpu"],
        "default": "cpu",
        "description": "Noise is always drawn on the CPU; another device would draw other noise.",
    },
    "enable_upscaling": {"type": "boolean", "enum": [False], "default": False, "description": "Not served."},
    "output_quality": {
        "type": "string",
        "enum": ["default"],
        "default": "default",
        "description": "Not served; output_compression is.",
    },
}

# Fields that are read only to refuse what can't be done: the values that ask for nothing.
_HARMLESS: dict[str, tuple[bool | int | str, str]] = {
    "stream": (False, "streaming is not served yet"),
    "partial_images": (0, "partial images are not served yet"),
    "generator_device": ("cpu", "noise is drawn on the CPU; on another device the pictures would differ"),
    "enable_upscaling": (False, "upscaling is not served"),
    "output_quality": ("default", "use output_compression, from 0 to 100"),
}

# OpenAI's fields that mean nothing to a diffusion model that runs here (background too, where it isn't transparent).
IGNORED_OPENAI = ("quality", "style", "moderation", "user", "safety_identifier")

# Fields that users of SGLang and vLLM-Omni send and that don't say what the picture is: speed, memory, profiling, where
# that server keeps its files. Those that change the picture (lora, diffusers_kwargs, ...) are unknown, hence refused.
IGNORED_OTHERS = (
    "enable_teacache",  # SGLang
    "upscaling_model_path",  # SGLang; means something with enable_upscaling only
    "upscaling_scale",  # SGLang; likewise
    "output_path",  # SGLang
    "perf_dump_path",  # SGLang
    "profile",  # SGLang
    "num_profiled_timesteps",  # SGLang
    "profile_all_stages",  # SGLang
    "vae_use_slicing",  # vLLM-Omni
    "vae_use_tiling",  # vLLM-Omni
)

_PASSED_ON = (
    "negative_prompt",
    "num_inference_steps",
    "guidance_scale",
    "true_cfg_scale",
    "flow_shift",
    "max_sequence_length",
    "seed",
)
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
        return _blame(error, self.has_size)


def parse_json(body: bytes) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        InvalidJSON: it isn't UTF-8, JSON or an object, or nests too deeply.
    """
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


def parse(body: Mapping[str, Any], info: ModelInfo) -> ImageRequest:
    """Turn a body into what it asks for. Null counts as absent.

    Raises:
        UnknownParameter: a field that is neither read nor on a list of ignored ones.
        ModelNotFound: another model than the served one.
        InvalidValue: a value of the wrong type, out of range or not served; ``param`` names the field.
    """
    for name in body:
        _check_known(name)
    given = {name: value for name, value in body.items() if value is not None}
    if "model" in given:
        check_model(given["model"], info)
    for name, (harmless, reason) in _HARMLESS.items():
        if name in given and (type(given[name]) is not type(harmless) or given[name] != harmless):
            raise InvalidValue(f"{name} must be {json.dumps(harmless)} or absent: {reason}", name)
    ignored = [name for name in given if name in IGNORED_OPENAI or name in IGNORED_OTHERS]
    if _choice(given, "background", BACKGROUNDS, "opaque") == "transparent":
        raise InvalidValue("background can't be transparent: pictures have no alpha channel", "background")
    if "background" in given:
        ignored.append("background")
    output_format = _choice(given, "output_format", OUTPUT_FORMATS, "png")
    has_size = given.get("size", "auto") != "auto"
    try:
        generation = _generation(given)
    except InvalidValue as error:
        raise _blame(error, has_size) from None
    return ImageRequest(
        generation=generation,
        response_format=_choice(given, "response_format", RESPONSE_FORMATS, "b64_json"),
        output_format=output_format,
        output_compression=_compression(given, output_format),
        ignored=tuple(ignored),
        has_size=has_size,
    )


def check_model(name: object, info: ModelInfo) -> None:
    """Raise ``ModelNotFound`` unless ``name`` is the served model's."""
    if not isinstance(name, str):
        raise InvalidValue("model must be a string", "model")
    if not name or name not in (info.id, info.path, PurePath(info.path).name):
        raise ModelNotFound(f"the model {json.dumps(name[:200])} is not served here; {info.id} is", "model")


def _generation(given: Mapping[str, Any]) -> GenerationRequest:
    if "prompt" not in given:
        raise InvalidValue("prompt is required", "prompt")
    width, height = _size(given)
    optional = {name: given[name] for name in _PASSED_ON if name in given}
    return GenerationRequest(prompt=given["prompt"], n=given.get("n", 1), width=width, height=height, **optional)


def _size(given: Mapping[str, Any]) -> tuple[Any, Any]:
    width, height = given.get("width"), given.get("height")
    size = given.get("size", "auto")
    if size == "auto":
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


def _check_known(name: str) -> None:
    known: Iterable[str] = (*FIELDS, *IGNORED_OPENAI, *IGNORED_OTHERS)
    if name not in known:
        shown = name[:64]
        close = difflib.get_close_matches(shown, known, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise UnknownParameter(f"{json.dumps(shown)} is not a field of this request{hint}", shown)


def _blame(error: RequestError, has_size: bool) -> RequestError:
    if has_size and error.param in ("width", "height"):
        return type(error)(error.message, "size")
    return error


def _integer(digits: str) -> int | float:
    return int(digits) if len(digits) <= _MAX_DIGITS else float(digits)
