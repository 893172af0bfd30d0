"""What several tests here need: applications without a network, and what an error must look like."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, cast

import httpx
from fastapi import FastAPI

from stepbatch.cli.parser import build_groups
from stepbatch.config import EngineConfig, ModelConfig, ServerConfig
from stepbatch.engine.admission import Admission
from stepbatch.engine.client import AsyncEngine, State
from stepbatch.engine.cost import UNKNOWN, Costs
from stepbatch.engine.forecast import Prediction
from stepbatch.engine.handle import Handle
from stepbatch.engine.messages import FromEngine, Output, Stats
from stepbatch.errors import EngineUnavailable, RequestCancelled
from stepbatch.model_info import ModelInfo
from stepbatch.request import GenerationRequest, Times
from stepbatch.server.app import create_app
from stepbatch.testing import FakeRunner

MODEL = ModelConfig(backend="fake", fake_step_ms=2, model_path="/models/org/tiny", served_model_name="org/tiny-fake")
VIDEO_MODEL = replace(MODEL, fake_videos=True)
MAX_BODY_BYTES = 64 << 10
MAX_IMAGE_BYTES = 128 << 10
MAX_UPLOAD_BYTES = 256 << 10
MAX_IMAGE_PIXELS = 512 * 512


@dataclass
class RunningServer:
    """A server in a thread of its own, and its engine, to be looked at only."""

    url: str
    engine: AsyncEngine


@dataclass
class StubEngine:
    """An engine in a state that a real one can't be held in."""

    state: State = "restarting"
    stats: Stats = field(default_factory=Stats)
    restarts: int = 0
    stop_by: float = math.inf
    on_message: Callable[[FromEngine], None] | None = None
    info: ModelInfo = field(default_factory=lambda: FakeRunner(MODEL).info)
    error: Exception = field(default_factory=lambda: EngineUnavailable("the engine is restarting"))
    config: EngineConfig = field(default_factory=lambda: EngineConfig(model=MODEL))
    predicted: Prediction | None = None

    def __post_init__(self) -> None:
        self.admission = Admission(self.config)
        self.admission.serve(self.info, UNKNOWN)

    @property
    def ready(self) -> bool:
        return self.state == "ready"

    @property
    def costs(self) -> Costs:
        return self.admission.costs

    def check(self) -> None:
        self.admission.check()

    def submit(self, request: GenerationRequest, request_id: str | None = None) -> Any:
        raise self.error


@dataclass
class DrawingEngine(StubEngine):
    """One that answers at once, and keeps what it was asked for as it came."""

    requests: list[GenerationRequest] = field(default_factory=list)

    def submit(self, request: GenerationRequest, request_id: str | None = None) -> Any:
        self.requests.append(request)
        self.request = request.resolve(self.info)
        return self

    async def outputs(self) -> list[Output]:
        return [Output("r", 0, 1, 2, 1, 1, b"rgbrgb", Times())]


@dataclass
class WaitingEngine(StubEngine):
    """One that makes videos and does nothing by itself: what it makes of each request is told to its handle."""

    info: ModelInfo = field(default_factory=lambda: FakeRunner(VIDEO_MODEL).info)
    handles: dict[str, Handle] = field(default_factory=dict)

    def submit(self, request: GenerationRequest, request_id: str | None = None) -> Any:
        assert request_id
        self.handles[request_id] = Handle(request_id, request.resolve(self.info), self.cancel)
        return self.handles[request_id]

    def cancel(self, request_id: str) -> None:
        if request_id in self.handles:
            self.handles[request_id].fail(RequestCancelled("the request was cancelled"))


def make_app(engine: StubEngine, **settings: Any) -> FastAPI:
    return create_app(cast(AsyncEngine, engine), build_groups(ServerConfig, settings))


def call(app: FastAPI, method: str, path: str, **options: Any) -> httpx.Response:
    """One request to an application, without a network. Exceptions that it raises after its answer are left out."""

    async def run() -> httpx.Response:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.request(method, path, **options)

    return asyncio.run(run())


def assert_error(response: httpx.Response, status: int, code: str, param: str | None = None) -> str:
    """Check that an answer is an error of the one shape; returns its message."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    body = response.json()
    assert set(body) == {"error"}
    error = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["code"], error["param"]) == (code, param), error
    kinds = {429: "rate_limit_error"}
    assert error["type"] == kinds.get(status, "server_error" if status >= 500 else "invalid_request_error")
    assert isinstance(error["message"], str)
    assert error["message"]
    return str(error["message"])


def within(seconds: float, condition: Callable[[], bool]) -> bool:
    """Whether a condition comes true in time."""
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()
