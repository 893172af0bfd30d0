"""Real servers for all tests here, one of pictures, one of videos: uvicorn around an engine with the fake model."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from stepbatch.cli.parser import build_groups
from stepbatch.config import AdmissionConfig, BatchingConfig, EngineConfig, ModelConfig, ServerConfig
from stepbatch.engine.client import AsyncEngine
from stepbatch.server.run import bind, make_server

from .support import (
    MAX_BODY_BYTES,
    MAX_IMAGE_BYTES,
    MAX_IMAGE_PIXELS,
    MAX_UPLOAD_BYTES,
    MODEL,
    VIDEO_MODEL,
    RunningServer,
)


@contextmanager
def running(
    model: ModelConfig,
    batching: BatchingConfig | None = None,
    admission: AdmissionConfig | None = None,
    **settings: Any,
) -> Iterator[RunningServer]:
    batching = batching or BatchingConfig(dynamic_batch_max_size=4)
    engine_config = EngineConfig(model=model, batching=batching, admission=admission or AdmissionConfig())
    limits = {
        "max_body_bytes": MAX_BODY_BYTES,
        "max_image_bytes": MAX_IMAGE_BYTES,
        "max_upload_bytes": MAX_UPLOAD_BYTES,
        "max_image_pixels": MAX_IMAGE_PIXELS,
    }
    config = build_groups(ServerConfig, {"log_level": "warning"} | limits | settings)
    sock = bind("127.0.0.1", 0)
    started = threading.Event()
    running: list[Any] = []

    async def serve() -> None:
        engine = AsyncEngine(engine_config)
        await engine.start()
        sock.listen()
        uvicorn_server = make_server(engine, config)
        running.extend([engine, uvicorn_server])
        started.set()
        try:
            await uvicorn_server.serve(sockets=[sock])
        finally:
            await engine.stop()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    assert started.wait(20)
    try:
        yield RunningServer(f"http://127.0.0.1:{sock.getsockname()[1]}", running[0])
    finally:
        running[1].should_exit = True
        thread.join()


@pytest.fixture(scope="session")
def server() -> Iterator[RunningServer]:
    with running(MODEL, docs=True) as server:
        yield server


@pytest.fixture(scope="session")
def video_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with running(VIDEO_MODEL, docs=True, video_dir=str(tmp_path_factory.mktemp("videos"))) as server:
        yield server


@pytest.fixture(scope="session")
def video_http(video_server: RunningServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=video_server.url, timeout=20) as client:
        yield client


@pytest.fixture(scope="session")
def http(server: RunningServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=20) as client:
        yield client


@pytest.fixture(scope="session")
def generate(http: httpx.Client) -> Callable[..., httpx.Response]:
    """Post a body made of the fields given, with a prompt and few steps unless given others."""

    def post(**fields: Any) -> httpx.Response:
        return http.post("/v1/images/generations", json={"prompt": "a cat", "num_inference_steps": 1, **fields})

    return post


@pytest.fixture(scope="session")
def edit(http: httpx.Client) -> Callable[..., httpx.Response]:
    """Post a form of files, each a name and its bytes, and texts, with a prompt and few steps unless given others."""

    def post(*files: tuple[str, bytes], **texts: str) -> httpx.Response:
        fields = {"prompt": "a cat", "num_inference_steps": "1", **texts}
        return http.post("/v1/images/edits", files=[(name, ("x", data)) for name, data in files], data=fields)

    return post
