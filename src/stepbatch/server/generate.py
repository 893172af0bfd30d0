"""The routes that make pictures: read the body, have the engine work on what it asks for, write the answer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from stepbatch.config import LimitsConfig
from stepbatch.engine.client import AsyncEngine
from stepbatch.engine.handle import Handle
from stepbatch.engine.messages import Output
from stepbatch.errors import InternalError, InvalidValue, RequestCancelled, RequestError
from stepbatch.request import GenerationRequest
from stepbatch.server.access import by_key
from stepbatch.server.answers import Answers
from stepbatch.server.body import Room, Share, read_body, unless_gone
from stepbatch.server.edits import check_before_decoding, form_limits, parse_edit, with_images
from stepbatch.server.files import FileStore
from stepbatch.server.forms import read_form
from stepbatch.server.images import Threads, encode_image, predicted
from stepbatch.server.logs import note, note_prompt
from stepbatch.server.metrics import Metrics
from stepbatch.server.schema import ImageRequest, check_makes_pictures, parse, parse_json

SMALL_BYTES = 1 << 18  # of pictures that are written into an answer at once, which another thread would only delay


class ImageRoutes:
    """The routes and what they work with."""

    def __init__(
        self,
        engine: AsyncEngine,
        files: FileStore,
        metrics: Metrics,
        threads: Threads,
        limits: LimitsConfig,
        room: Room,
        answers: Answers,
        idle: tuple[str, ...],
    ) -> None:
        self.engine = engine
        self.files = files
        self.metrics = metrics
        self.threads = threads
        self.limits = limits
        self.room = room
        self.answers = answers
        self._idle = idle  # fields without effect

    async def generations(self, request: Request) -> Response:
        """Pictures from a prompt."""
        return await self._count(request, self._read_json)

    async def edits(self, request: Request) -> Response:
        """Pictures from a prompt and images."""
        return await self._count(request, self._read_form)

    async def _read_json(self, request: Request, share: Share) -> ImageRequest:
        values = parse_json(await read_body(request, self.limits.max_body_bytes, share))
        note_prompt(request, values)
        return parse(values, self.engine.info, self._idle, self.limits)

    async def _read_form(self, request: Request, share: Share) -> ImageRequest:
        info, max_pixels = self.engine.info, self.limits.max_image_pixels
        check_makes_pictures(info)
        form = await read_form(request, form_limits(self.limits, info), share)
        note_prompt(request, form.texts)
        wanted, strength = parse_edit(form, info, self._idle, self.limits)
        check_before_decoding(wanted, strength, form, info)
        self.engine.check()
        decoding = self.threads.decode(lambda: with_images(wanted, strength, form, info, max_pixels, share))
        return await unless_gone(request, decoding)

    async def _count(self, request: Request, read: Callable[[Request, Share], Awaitable[ImageRequest]]) -> Response:
        """Answer, and count how it ended."""
        began = time.monotonic()
        code = InternalError.code
        try:
            self.engine.check()  # what is refused costs nothing more
            self.answers.check()
            with self.room.share() as share:
                response = await self._answer(request, await read(request, share))
            code = "ok"
        except RequestError as error:
            code = error.code
            raise
        except asyncio.CancelledError:
            code = RequestCancelled.code
            raise
        finally:
            self.metrics.ended(code, time.monotonic() - began)
        return response

    async def _answer(self, request: Request, wanted: ImageRequest) -> Response:
        submitted = time.monotonic()
        self.answers.check()
        try:
            handle = self.engine.submit(by_key(request, wanted.generation))
            with self.answers.promise(_pixel_bytes(handle.request)):
                outputs = await unless_gone(request, handle.outputs())
                return await self._write(request, wanted, handle, outputs, time.monotonic() - submitted)
        except InvalidValue as error:
            raise wanted.blame(error) from None

    async def _write(
        self, request: Request, wanted: ImageRequest, handle: Handle, outputs: Sequence[Output], seconds: float
    ) -> Response:
        if handle.predicted:
            self.metrics.predicted(handle.predicted.total, seconds)
        fields = self._fields(wanted, outputs, seconds) | {"predicted": predicted(handle.predicted)}
        idle = [
            name
            for name in handle.request.without_effect(self.engine.info)
            if getattr(wanted.generation, name) is not None
        ]
        fields["ignored"] = [*wanted.ignored, *idle]
        note(request, timings=fields["timings"])
        pictures = await asyncio.gather(*(self._encode(output, wanted) for output in outputs))
        if wanted.response_format == "url":
            base = f"{str(request.base_url).rstrip('/')}/v1/files/"
            media_type, extension = f"image/{wanted.output_format}", wanted.output_format
            for item, picture in zip(fields["data"], pictures, strict=True):
                item["url"] = base + self.files.put(picture, media_type, extension)
        else:
            for item, picture in zip(fields["data"], pictures, strict=True):
                item["b64_json"] = picture  # bytes are written as base64
        if sum(map(len, pictures)) < SMALL_BYTES:
            content = msgspec.json.encode(fields)
        else:
            content = await self.threads.run(lambda: msgspec.json.encode(fields))
        return Response(content, media_type="application/json")

    async def _encode(self, output: Output, wanted: ImageRequest) -> bytes:
        return await self.threads.run(lambda: encode_image(output, wanted.output_format, wanted.output_compression))

    def _fields(self, wanted: ImageRequest, outputs: Sequence[Output], seconds: float) -> dict[str, Any]:
        """OpenAI's answer and ours around it, without the pictures."""
        times = [output.times for output in outputs]
        return {
            "created": int(time.time()),
            "data": [{"seed": output.seed} for output in outputs],
            "background": "opaque",
            "output_format": wanted.output_format,
            "size": f"{outputs[0].width}x{outputs[0].height}",
            "model": self.engine.info.id,
            "seeds": [output.seed for output in outputs],
            "inference_time_s": round(seconds - min(t.queue for t in times), 6),
            "peak_memory_mb": self.engine.stats.peak_memory_mb,
            "timings": {
                "queue": round(max(t.queue for t in times), 6),
                "encode": round(max(t.encode for t in times), 6),
                "denoise": round(max(t.denoise for t in times), 6),
                "decode": round(max(t.decode for t in times), 6),
            },
        }


def _pixel_bytes(request: GenerationRequest) -> int:
    """How much memory a resolved request's pictures take before they are files."""
    assert request.width and request.height
    return request.n * request.width * request.height * 3
