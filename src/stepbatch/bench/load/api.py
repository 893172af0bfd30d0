"""OpenAI's routes: what is sent for a request of the run, and what is read of the answer."""

from __future__ import annotations

import asyncio
import binascii
import hashlib
import importlib.util
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol
from urllib.parse import quote

import msgspec

from stepbatch.bench.load.wire import Answer, Wire, shortened
from stepbatch.bench.workload.work import ImageFile, WorkItem
from stepbatch.errors import OptionError, SetupError

MADE = ("completed", "succeeded")  # of a video's states
LOST = ("failed", "cancelled", "canceled", "expired", "error")


class BadOutput(Exception):
    """An answer, or an output of it, that isn't what was asked for; the message says why."""


@dataclass(frozen=True)
class Expected:
    """What outputs should be, as far as the request says it."""

    count: int
    width: int | None = None  # pixels
    height: int | None = None  # pixels
    frames: int | None = None  # of a video; None for a picture too


@dataclass(frozen=True, eq=False)
class Prepared:
    """A request that is ready to be sent."""

    api: Api
    body: tuple[bytes, ...]  # in pieces, so that a file that many requests have is in memory once
    content_type: str
    expected: Expected
    asked: dict[str, Any]  # for the record


@dataclass(frozen=True)
class Found:
    """What an answer holds: outputs, each as a file or as the URL of one, and what the server tells besides."""

    outputs: tuple[bytes | str | BadOutput, ...]
    told: Mapping[str, Any]


class Api(Protocol):
    """One of OpenAI's routes."""

    path: str
    is_video: bool

    def prepare(self, item: WorkItem, model: str) -> Prepared:
        """What is sent for an item.

        Raises:
            OptionError: the item isn't for this route.
            SetupError: what comes couldn't be read.
        """

    async def ask(self, wire: Wire, request: Prepared) -> Answer:
        """Send it, and wait until it is done.

        Raises:
            FAULTS: the connection failed.
        """

    def read(self, body: bytes, told: bytes) -> Found:
        """What an answer holds.

        Raises:
            BadOutput: it isn't in this route's shape.
        """


class Generations:
    """Pictures from a prompt."""

    path = "/v1/images/generations"
    is_video = False

    def prepare(self, item: WorkItem, model: str) -> Prepared:
        if item.images:
            raise OptionError("--api images can't send the images of a request; --api edits can")
        fields = _picture_fields(item, model)
        return Prepared(self, *_json(fields), _expected(fields), item.asked())

    async def ask(self, wire: Wire, request: Prepared) -> Answer:
        return await wire.post(self.path, request.body, request.content_type)

    def read(self, body: bytes, told: bytes) -> Found:
        return _read_pictures(body)


class Edits:
    """Pictures from a prompt and images."""

    path = "/v1/images/edits"
    is_video = False

    def prepare(self, item: WorkItem, model: str) -> Prepared:
        if not item.images:
            raise OptionError("--api edits needs requests with images; give --task image-to-image")
        fields = _picture_fields(item, model)
        name = "image" if len(item.images) == 1 else "image[]"
        return Prepared(self, *_form(fields, name, item.images), _expected(fields), item.asked())

    async def ask(self, wire: Wire, request: Prepared) -> Answer:
        return await wire.post(self.path, request.body, request.content_type)

    def read(self, body: bytes, told: bytes) -> Found:
        return _read_pictures(body)


class _State(msgspec.Struct):
    """What a server says of a video."""

    id: str
    status: str
    error: Any = None


class Videos:
    """A video from a prompt, and an image perhaps: it is asked for, looked after until it is made, and fetched.

    The caller's wait ends when the video is seen to be made; fetching it comes after, in the request's own slot.
    """

    path = "/v1/videos"
    is_video = True

    def prepare(self, item: WorkItem, model: str) -> Prepared:
        if importlib.util.find_spec("av") is None:
            raise SetupError("videos are checked with PyAV, which is not installed: pip install av")
        if item.n != 1 or len(item.images) > 1:
            raise OptionError(f"a request for a video takes {'--n 1' if item.n != 1 else 'one image'} at most")
        names = ("seed", "fps", "num_frames", "num_inference_steps", "guidance_scale")
        fields = _fields(item, model, {name: getattr(item, name) for name in names})
        sent = _form(fields, "input_reference", item.images) if item.images else _json(fields)
        return Prepared(self, *sent, replace(_expected(fields), count=1), item.asked())

    async def ask(self, wire: Wire, request: Prepared) -> Answer:
        seen = await wire.post(self.path, request.body, request.content_type, in_memory=True)
        while seen.outcome == "ok":
            state = _state(seen.told)
            if state is None:
                return replace(seen, outcome="failed", error="the answer has no id or status of a video")
            if state.status in LOST:
                return replace(seen, outcome="failed", error=_fault(state))
            if state.status in MADE:
                return replace(seen, **await self._content(wire, state))
            await asyncio.sleep(wire.poll_interval)
            seen = await self._look(wire, state, seen)
        return seen

    def read(self, body: bytes, told: bytes) -> Found:
        return Found((body,), _object(told))

    async def _look(self, wire: Wire, state: _State, before: Answer) -> Answer:
        """How it is now. To be turned away here says nothing of the video, so that is as if nothing had been seen."""
        seen = await wire.get(f"{self.path}/{quote(state.id, safe='')}", in_memory=True)
        return before if seen.outcome == "rejected" else seen

    async def _content(self, wire: Wire, state: _State) -> dict[str, Any]:
        """Where the video lies in the spool, or why it couldn't be had."""
        content = await wire.get(f"{self.path}/{quote(state.id, safe='')}/content")
        if content.outcome == "ok":
            return {"body": content.body}
        return {"outcome": "failed", "status": content.status, "error": f"its content: {content.error}"}


APIS: dict[str, Api] = {"images": Generations(), "edits": Edits(), "videos": Videos()}


def prepare(items: Sequence[WorkItem], api: str, model: str) -> list[Prepared]:
    """What is sent for each item, made before the load starts.

    Args:
        items: The requests.
        api: A name of ``APIS``, or ``auto``, which goes by each item's task.
        model: The name that they have the model by.

    Raises:
        OptionError: an item isn't for its route.
        SetupError: what comes couldn't be read.
    """
    return [APIS[_route(item) if api == "auto" else api].prepare(item, model) for item in items]


def _route(item: WorkItem) -> str:
    if item.is_video:
        return "videos"
    return "edits" if item.task == "image-to-image" else "images"


def _picture_fields(item: WorkItem, model: str) -> dict[str, Any]:
    names = ("seed", "num_inference_steps", "guidance_scale")
    of_item = {name: getattr(item, name) for name in names}
    return _fields(item, model, {"n": item.n, "response_format": "b64_json", **of_item})


def _fields(item: WorkItem, model: str, more: Mapping[str, Any]) -> dict[str, Any]:
    """A body's fields: what is given, and ``extra`` laid over it, whose nulls take fields away."""
    if (item.width is None) != (item.height is None):
        raise OptionError("--width and --height go together")
    size = f"{item.width}x{item.height}" if item.width else None
    fields = {"model": model, "prompt": item.prompt, "size": size, **more, **item.extra}
    return {name: value for name, value in fields.items() if value is not None}


def _expected(fields: Mapping[str, Any]) -> Expected:
    """What the fields ask for; by them and not by the item, for ``extra`` may say otherwise."""
    size = re.fullmatch(r"(\d+)x(\d+)", str(fields.get("size", "")))
    width, height = size.groups() if size else (fields.get("width"), fields.get("height"))
    return Expected(_whole(fields.get("n")) or 1, _whole(width), _whole(height), _whole(fields.get("num_frames")))


def _whole(value: Any) -> int | None:
    try:
        return int(value)
    except (TypeError, ValueError):
        return None


def _json(fields: Mapping[str, Any]) -> tuple[tuple[bytes, ...], str]:
    return (msgspec.json.encode(fields),), "application/json"


def _form(fields: Mapping[str, Any], name: str, images: Sequence[ImageFile]) -> tuple[tuple[bytes, ...], str]:
    """``multipart/form-data`` of texts, then images under a name; the boundary is made from what it must not be in."""
    texts = [(field, _text(value)) for field, value in fields.items()]
    about = msgspec.json.encode([texts, [image.digest for image in images]])
    boundary = f"stepbatch-{hashlib.sha256(about).hexdigest()[:40]}"
    start = f'--{boundary}\r\nContent-Disposition: form-data; name="'
    head = "".join(f'{start}{_quoted(field)}"\r\n\r\n{text}\r\n' for field, text in texts)
    pieces = [head.encode()]
    for image in images:
        disposition = f'{start}{name}"; filename="{_quoted(image.name)}"'
        pieces += [f"{disposition}\r\nContent-Type: {_media_type(image.data)}\r\n\r\n".encode(), image.data, b"\r\n"]
    return (*pieces, f"--{boundary}--\r\n".encode()), f"multipart/form-data; boundary={boundary}"


def _text(value: Any) -> str:
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()


def _quoted(name: str) -> str:
    """A name in a part's header, as browsers write it."""
    return name.replace('"', "%22").replace("\r", "%0D").replace("\n", "%0A")


def _media_type(data: bytes) -> str:
    kinds = {b"\x89PNG": "image/png", b"\xff\xd8\xff": "image/jpeg", b"RIFF": "image/webp"}
    return next((kind for start, kind in kinds.items() if data.startswith(start)), "application/octet-stream")


def _object(data: bytes) -> dict[str, Any]:
    """A JSON object.

    Raises:
        BadOutput: it is none.
    """
    try:
        value = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadOutput(shortened(f"the answer is no JSON: {error}")) from None
    if not isinstance(value, dict):
        raise BadOutput("the answer is no JSON object")
    return value


def _read_pictures(body: bytes) -> Found:
    told = _object(body)
    items = told.pop("data", None)
    return Found(tuple(map(_picture, items if isinstance(items, list) else ())), told)


def _picture(item: Any) -> bytes | str | BadOutput:
    given = item if isinstance(item, dict) else {}
    if text := given.get("b64_json"):
        try:
            return binascii.a2b_base64(text)
        except (TypeError, ValueError) as error:
            return BadOutput(f"is no base64: {error}")
    url = given.get("url")
    return url if isinstance(url, str) and url else BadOutput("is missing: there is neither b64_json nor url")


def _state(told: bytes) -> _State | None:
    try:
        return msgspec.json.decode(told, type=_State)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


def _fault(state: _State) -> str:
    message = state.error.get("message") if isinstance(state.error, dict) else state.error
    return shortened(str(message or f"the video is {state.status}"))
