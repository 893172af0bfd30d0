"""``POST /v1/images/generations``: read the body, have the engine work on it, write the answer."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from stepbatch.engine.client import AsyncEngine
from stepbatch.engine.messages import Output
from stepbatch.errors import InternalError, InvalidValue, PayloadTooLarge, RequestCancelled, RequestError
from stepbatch.server.files import FileStore
from stepbatch.server.images import Threads, encode_image
from stepbatch.server.metrics import Metrics
from stepbatch.server.schema import ImageRequest, parse, parse_json

T = TypeVar("T")


class ImageGeneration:
    """The route and what it works with."""

    def __init__(
        self, engine: AsyncEngine, files: FileStore, metrics: Metrics, threads: Threads, max_body_bytes: int
    ) -> None:
        self.engine = engine
        self.files = files
        self.metrics = metrics
        self.threads = threads
        self.max_body_bytes = max_body_bytes

    async def __call__(self, request: Request) -> Response:
        """Answer, and count how it ended."""
        began = time.monotonic()
        code = InternalError.code
        try:
            response = await self._generate(request)
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

    async def _generate(self, request: Request) -> Response:
        wanted = parse(parse_json(await read_body(request, self.max_body_bytes)), self.engine.info)
        submitted = time.monotonic()
        try:
            handle = self.engine.submit(wanted.generation)
            outputs = await unless_gone(request, handle.outputs())
        except InvalidValue as error:
            raise wanted.blame(error) from None
        fields = self._fields(wanted, outputs, time.monotonic() - submitted)
        idle = [
            name
            for name in handle.request.without_effect(self.engine.info)
            if getattr(wanted.generation, name) is not None
        ]
        fields["ignored"] = [*wanted.ignored, *idle]
        pictures = await asyncio.gather(*(self._encode(output, wanted) for output in outputs))
        if wanted.response_format == "url":
            base = f"{str(request.base_url).rstrip('/')}/v1/files/"
            media_type, extension = f"image/{wanted.output_format}", wanted.output_format
            for item, picture in zip(fields["data"], pictures, strict=True):
                item["url"] = base + self.files.put(picture, media_type, extension)
        content = await self.threads.run(lambda: _render(fields, pictures, wanted.response_format))
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


async def read_body(request: Request, limit: int) -> bytes:
    """The body, never holding more than ``limit`` bytes of it and what came in one read.

    Raises:
        PayloadTooLarge: it is longer, by its own account or as it comes.
        RequestCancelled: the client went away before its end.
    """
    too_large = PayloadTooLarge(f"the body must have at most {limit} bytes")
    length = request.headers.get("content-length", "0")
    if length.isdecimal() and (len(length) > 18 or int(length) > limit):
        raise too_large
    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > limit:
                raise too_large
    except ClientDisconnect:
        raise RequestCancelled("the client went away") from None
    return bytes(body)


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """What ``work`` returns or raises; if the client hangs up before, ``work`` is cancelled.

    Raises:
        RequestCancelled: the client went away.
    """
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise RequestCancelled("the client went away")
        return task.result()
    finally:
        task.cancel()
        watch.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _render(fields: dict[str, Any], pictures: Sequence[bytes], response_format: str) -> bytes:
    if response_format == "b64_json":
        for item, picture in zip(fields["data"], pictures, strict=True):
            item["b64_json"] = base64.b64encode(picture).decode("ascii")
    return json.dumps(fields, allow_nan=False).encode()
