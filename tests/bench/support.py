"""Small servers for the load client's tests: they do what ours doesn't."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web
from PIL import Image
from tests import pictures

from stepbatch.bench.load.client import Driven, drive
from stepbatch.bench.options import TargetOptions
from stepbatch.bench.workload.work import ImageFile, WorkItem

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

GENERATIONS = "/v1/images/generations"
EDITS = "/v1/images/edits"


@asynccontextmanager
async def serving(*routes: tuple[str, str, Handler], port: int = 0) -> AsyncIterator[str]:
    """A server with these routes (method, path, handler) in this very loop; gives its address."""
    app = web.Application(client_max_size=1 << 30)
    app.add_routes([web.route(method, path, handler) for method, path, handler in routes])
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


@asynccontextmanager
async def raw_server(answer: Callable[[int], bytes]) -> AsyncIterator[str]:
    """A server that reads a request and writes bytes, which need not be HTTP, and hangs up; gives its address.

    Args:
        answer: From the request's number to the bytes.
    """
    count = 0

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal count
        number, count = count, count + 1
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0] or 0)
            await reader.readexactly(length)
            writer.write(answer(number))
            await writer.drain()
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


def png(width: int = 8, height: int = 8, seed: int = 0) -> bytes:
    return pictures.file(pictures.image(size=(width, height), seed=seed))


def image_file(name: str = "input.png", data: bytes = b"") -> ImageFile:
    data = data or png()
    return ImageFile(name, data, hashlib.sha256(data).hexdigest())


def pictures_json(*files: bytes, **more: Any) -> web.Response:
    """An answer in OpenAI's shape."""
    data = [{"b64_json": base64.b64encode(file).decode()} for file in files]
    return web.json_response({"created": 1, "data": data, **more})


async def draw(request: web.Request) -> web.StreamResponse:
    """What was asked for, drawn."""
    fields = await request.json()
    width, _, height = fields.get("size", "8x8").partition("x")
    return pictures_json(*(png(int(width), int(height), seed) for seed in range(fields["n"])))


def item(prompt: str = "x", **fields: Any) -> WorkItem:
    return WorkItem(prompt=prompt, **fields)


def at(*urls: str, **options: Any) -> TargetOptions:
    """These servers; a request may take 10 seconds."""
    return TargetOptions(base_url=urls, **{"timeout": 10.0, **options})


async def send(
    items: Sequence[WorkItem] | int,
    target: TargetOptions,
    times: Sequence[float] | None = None,
    max_concurrency: int = 0,
    model: str = "m",
    **more: Any,
) -> Driven:
    """Drive a number of plain requests, or these."""
    items = [item(f"prompt {i}") for i in range(items)] if isinstance(items, int) else items
    return await drive(items, times, target, max_concurrency, model, [None] * len(items), **more)


def video(width: int = 32, height: int = 16, frames: int = 5) -> bytes:
    """A small MP4."""
    import av

    data = io.BytesIO()
    with av.open(data, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=8, width=width, height=height, pix_fmt="yuv420p")
        for i in range(frames):
            frame = av.VideoFrame.from_image(Image.new("RGB", (width, height), (40 * i % 256, 0, 0)))
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return data.getvalue()


class VideoServer:
    """OpenAI's video API: each video is made after some looks at it, and then can be fetched.

    Args:
        content: What every video is.
        looks: After how many looks it is made.
        end: What it is then.
    """

    def __init__(self, content: bytes, looks: int = 2, end: str = "completed") -> None:
        self.content = content
        self.looks = looks
        self.end = end
        self.asked: list[dict[str, Any]] = []  # bodies
        self.files: list[tuple[str, bytes]] = []  # of multipart bodies: names, files
        self.seen: dict[str, int] = {}
        self.more: dict[str, Any] = {}  # that the last look tells
        self.busy = 0  # so many looks are turned away
        self.content_status = 200
        self.fetched = asyncio.Event()

    def routes(self) -> list[tuple[str, str, Handler]]:
        return [
            ("POST", "/v1/videos", self.create),
            ("GET", "/v1/videos/{id}", self.look),
            ("GET", "/v1/videos/{id}/content", self.fetch),
        ]

    async def create(self, request: web.Request) -> web.StreamResponse:
        if request.content_type == "application/json":
            self.asked.append(await request.json())
        else:
            form = await request.post()
            self.asked.append({name: value for name, value in form.items() if isinstance(value, str)})
            files = [(name, value) for name, value in form.items() if isinstance(value, web.FileField)]
            self.files += [(name, value.file.read()) for name, value in files]
        name = f"video/{len(self.asked)}"
        self.seen[name] = 0
        return web.json_response({"id": name, "status": "queued", "progress": 0})

    async def look(self, request: web.Request) -> web.StreamResponse:
        if self.busy:
            self.busy -= 1
            return web.json_response({"error": {"message": "slow down"}}, status=429)
        name = request.match_info["id"]
        self.seen[name] += 1
        if self.seen[name] < self.looks:
            return web.json_response({"id": name, "status": "in_progress"})
        return web.json_response({"id": name, "status": self.end, **self.more})

    async def fetch(self, request: web.Request) -> web.StreamResponse:
        self.fetched.set()
        return web.Response(body=self.content, status=self.content_status, content_type="video/mp4")
