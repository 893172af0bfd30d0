"""A server in this process, so that what passes between it and its engine process can be seen."""

from __future__ import annotations

import asyncio
import base64
import gc
import io
import os
import signal
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
from PIL import Image

from stepbatch.cli.parser import build_groups
from stepbatch.config import EngineConfig, ServerConfig
from stepbatch.engine.client import AsyncEngine
from stepbatch.engine.handle import Handle
from stepbatch.engine.messages import FromEngine, Unit
from stepbatch.garbage import settle
from stepbatch.request import GenerationRequest
from stepbatch.server.run import bind, make_server
from stepbatch.testing import FakeRunner

WIDTH = 8  # of a batch that is hurt
Bodies = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Begun:
    """A unit of work that an engine process has begun."""

    process: int  # how many there were before it
    kind: str
    prompts: list[str]


class Watched(AsyncEngine):
    """An engine that remembers what it was asked and what its process began; prompts tell requests apart."""

    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config)
        self.tell: Callable[[FromEngine], None]  # who else listens
        self.units: list[Begun] = []
        self.asked: dict[str, Handle] = {}
        self.left: dict[str, int] = {}  # of those that were cancelled: how many units had begun by then

    def submit(self, request: GenerationRequest, request_id: str | None = None) -> Handle:
        handle = super().submit(request, request_id)
        self.asked[request.prompt] = handle
        return handle

    def cancel(self, request_id: str) -> None:
        for prompt, handle in self.asked.items():
            if handle.request_id == request_id and not handle.ended:
                self.left[prompt] = len(self.units)
        super().cancel(request_id)

    def see(self, message: FromEngine) -> None:
        """Take down a unit of work, and pass the message on."""
        if isinstance(message, Unit):
            names = {handle.request_id: prompt for prompt, handle in self.asked.items()}
            prompts = [names.get(request_id, "") for request_id, _ in message.jobs]
            self.units.append(Begun(self.restarts, message.kind, prompts))
        self.tell(message)

    def with_prompt(self, prompt: str, kind: str | None = None) -> list[Begun]:
        """The units of work that a request was in."""
        return [unit for unit in self.units if prompt in unit.prompts and kind in (None, unit.kind)]

    def forget(self) -> None:
        """Begin anew."""
        self.units.clear()
        self.asked.clear()
        self.left.clear()

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """The engine process takes nothing in meanwhile, and then all at once."""
        assert self.pid is not None
        os.kill(self.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(self.pid, signal.SIGCONT)


@dataclass(frozen=True)
class Inside:
    """A server that is up."""

    engine: Watched
    port: int
    http: httpx.AsyncClient
    tasks: int = field(default_factory=lambda: len(asyncio.all_tasks()))  # when nothing is going on

    async def generate(self, **fields: Any) -> httpx.Response:
        return await self.http.post("/v1/images/generations", json={"size": "16x16", "num_inference_steps": 3} | fields)

    async def together(self, bodies: Bodies) -> list[httpx.Response]:
        """The answers to requests that the engine process takes in at once."""
        with self.engine.stopped():
            answers = [asyncio.ensure_future(self.generate(**body)) for body in bodies]
            await until(lambda: all(body["prompt"] in self.engine.asked for body in bodies), 4.0)
            await asyncio.sleep(0.02)  # until the last is out of this process, which nobody tells
        return await asyncio.gather(*answers)

    async def metric(self, name: str) -> float:
        """The value of a metric, named with its labels where it has some."""
        text = (await self.http.get("/metrics")).text
        return next(float(line.split()[-1]) for line in text.splitlines() if line.startswith(f"stepbatch:{name} "))


@asynccontextmanager
async def inside(config: EngineConfig, **settings: Any) -> AsyncIterator[Inside]:
    """Serve on a free port, in this event loop."""
    engine = Watched(config)
    await engine.start()
    server_config = build_groups(ServerConfig, {"log_level": "warning"} | settings)
    with bind("127.0.0.1", 0) as sock:
        sock.listen(2048)
        server = make_server(engine, server_config)
        assert engine.on_message is not None
        engine.tell, engine.on_message = engine.on_message, engine.see
        settle()  # as a server does, whose heap is small beside that of all tests
        serving = asyncio.ensure_future(server.serve(sockets=[sock]))
        try:
            await until(lambda: server.started)
            port = sock.getsockname()[1]
            limits = httpx.Limits(max_connections=None, max_keepalive_connections=WIDTH)
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=600, limits=limits) as http:
                yield Inside(engine, port, http)
        finally:
            server.should_exit = True
            await serving
            await engine.stop()
            gc.unfreeze()


async def until(condition: Callable[[], object], seconds: float = 20.0) -> None:
    """Wait for something to come true; raises ``TimeoutError``."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)


def pictures(answer: httpx.Response) -> list[Image.Image]:
    """What was answered."""
    data = [base64.b64decode(item["b64_json"]) for item in answer.json()["data"]]
    return [Image.open(io.BytesIO(picture)).convert("RGB") for picture in data]


def is_own(answer: httpx.Response, prompt: str) -> bool:
    """Whether the fake model's pictures are those of this prompt and the seeds that are answered with them."""
    drawn = zip(pictures(answer), answer.json()["seeds"], strict=True)
    return all(picture.tobytes() == FakeRunner.pixels(prompt, seed, *picture.size) for picture, seed in drawn)


def assert_failed(answer: httpx.Response, status: int, code: str, retry: str | None = "false") -> None:
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code), answer.text
    assert answer.headers.get("x-should-retry") == retry
