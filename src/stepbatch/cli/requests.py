"""Where ``generate`` and ``edit`` get their requests from: prompts and images on the command line, lines of a file."""

from __future__ import annotations

import difflib
import json
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from stepbatch.duration import frames_in, parse_seconds
from stepbatch.errors import InvalidJSON, InvalidValue, OptionError, RequestError, UnknownParameter
from stepbatch.image_files import Picture, read_picture
from stepbatch.model_info import ModelInfo
from stepbatch.request import FIELDS, IMAGE_FIELDS, GenerationRequest
from stepbatch.sizes import parse_size

OUTPUT_FORMATS = ("png", "jpeg", "webp")
MAX_PIXELS = 1 << 28  # of an image; these are the user's own files, so it is more than the server takes
LINE_FIELDS = (*(name for name in FIELDS if name not in IMAGE_FIELDS), "size", "seconds", "id")
SCHEDULING_FIELDS = ("priority", "timeout", "user")  # which say nothing of the output
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True)
class Item:
    """A request, or what is wrong with it; ``name`` begins the names of its files."""

    name: str
    request: GenerationRequest | RequestError
    seconds: float | None = None  # how long a video is; a model's frames are needed to say it in the request

    def timed(self, info: ModelInfo) -> Item:
        """The same with its seconds in frames of a model."""
        if self.seconds is None or isinstance(self.request, RequestError):
            return self
        fps = self.request.fps or info.defaults.fps
        try:
            if fps is None:
                raise InvalidValue("seconds has no effect on this model: it makes pictures", "seconds")
            return Item(self.name, replace(self.request, num_frames=frames_in(self.seconds, fps, info)))
        except InvalidValue as error:
            return Item(self.name, error)

    def digest(self, model: str, output_format: str) -> str:
        """Tells whether files that are there already are of this very request."""
        assert isinstance(self.request, GenerationRequest)
        fields = {name: getattr(self.request, name) for name in FIELDS if name not in SCHEDULING_FIELDS}
        about = [model, output_format, fields, *([] if self.seconds is None else [self.seconds])]
        text = json.dumps(about, sort_keys=True, default=lambda image: image.digest.hex())
        return sha256(text.encode()).hexdigest()[:16]


class Source:
    """The requests, read anew on every iteration, so that of a long file no more than the names is held.

    Args:
        prompts: Given on the command line.
        file: JSON Lines, a request a line: ``GenerationRequest``'s fields, ``size``, ``id``.
        common: What a request has where it doesn't say; ``size`` instead of width and height.

    Raises:
        OptionError: ``common`` or a prompt can't be, or there is no such file.
    """

    def __init__(self, prompts: Sequence[str], file: Path | None, common: Mapping[str, Any]) -> None:
        self.file = file
        self.common = common
        if file is not None and not file.is_file():
            raise OptionError(f"--input: there is no file {file}")
        try:
            self._item("", {"prompt": "any"})
        except RequestError as error:
            param = "size" if error.param in ("width", "height") else error.param or ""
            flag = "" if param == "images" else f"--{param.replace('_', '-')}: "  # images have none
            raise OptionError(f"{flag}{error.message}") from error
        try:
            self._prompts = [self._item_of(prompt) for prompt in prompts]
        except RequestError as error:
            raise OptionError(error.message) from error

    def __iter__(self) -> Iterator[Item]:
        names: set[str] = set()
        for item in self._items():
            if item.name in names:
                item = Item(item.name, InvalidValue(f"the id {item.name} is used twice", "id"))
            names.add(item.name)
            yield item

    def _items(self) -> Iterator[Item]:
        yield from self._prompts
        if self.file is not None:
            with self.file.open(encoding="utf-8", errors="surrogateescape") as lines:
                for number, line in enumerate(lines, start=1):
                    if line.strip():
                        yield self._parse(number, line)

    def _item_of(self, prompt: str) -> Item:
        """A prompt as an item: its seed is drawn here, and all of it is in its name, so that no file is overwritten."""
        seed = self.common.get("seed", random.SystemRandom().randint(0, 2**32 - 1))
        item = self._item("", {"prompt": prompt, "seed": seed})
        words = re.sub(r"[^a-z0-9]+", "-", prompt.lower())[:48].strip("-") or "picture"
        return replace(item, name=f"{words}-{item.digest('', '')[:8]}")

    def _parse(self, number: int, line: str) -> Item:
        name = f"{number:06d}"
        try:
            given = _read(line)
            name = _name(given.pop("id", name))
            return self._item(name, given)
        except RequestError as error:
            return Item(name, error)

    def _item(self, name: str, given: Mapping[str, Any]) -> Item:
        common = dict(self.common)
        if "width" in given or "height" in given:
            common.pop("size", None)
        for one, other in (("seconds", "num_frames"), ("num_frames", "seconds")):
            if one in given:
                common.pop(other, None)
        values = {**common, **given}
        seconds = parse_seconds(values.pop("seconds")) if "seconds" in values else None
        if seconds is not None and "num_frames" in values:
            raise InvalidValue("seconds goes without num_frames", "seconds")
        size = values.pop("size", None)
        if size not in (None, "auto"):
            if "width" in values or "height" in values:
                raise InvalidValue("size goes without width and height", "size")
            values["width"], values["height"] = parse_size(size)
        if "prompt" not in values:
            raise InvalidValue("prompt is required", "prompt")
        return Item(name, GenerationRequest(**values), seconds)


def read_images(images: Sequence[Path], mask: Path | None) -> dict[str, Any]:
    """The fields of a request that these files are.

    Raises:
        OptionError: there is no such file, or it can't be read.
    """
    pictures = tuple(_read_picture(path, "images").on_white() for path in images)
    return {"images": pictures, "mask": _read_picture(mask, "mask").as_mask() if mask else None}


def _read_picture(path: Path, param: str) -> Picture:
    try:
        return read_picture(path.read_bytes(), MAX_PIXELS, str(path), param)
    except FileNotFoundError:
        raise OptionError(f"there is no file {path}") from None
    except OSError as error:
        raise OptionError(f"can't read {path}: {error.strerror or error}") from error
    except InvalidValue as error:
        raise OptionError(error.message) from error


def _read(line: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InvalidJSON(f"the line is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise InvalidJSON("the line must be a JSON object")
    for name in value:
        if name not in LINE_FIELDS:
            close = difflib.get_close_matches(name, LINE_FIELDS, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise UnknownParameter(f"{name[:64]!r} is not a field of a request{hint}", name[:64])
    return {name: item for name, item in value.items() if item is not None}


def _name(value: object) -> str:
    name = str(value) if isinstance(value, int) and not isinstance(value, bool) else value
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InvalidValue("id must be up to 100 letters, digits, dots, dashes and underscores", "id")
    return name
