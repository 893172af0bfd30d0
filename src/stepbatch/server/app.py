"""The HTTP application: its routes, and what each answers from."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
from fastapi import FastAPI
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from stepbatch.config import LimitsConfig, ServerConfig, VideosConfig
from stepbatch.engine.client import REFUSALS, AsyncEngine
from stepbatch.engine.messages import FromEngine
from stepbatch.errors import EngineUnavailable, SetupError
from stepbatch.server import handlers
from stepbatch.server.access import AccessMiddleware, Keys, own_hosts
from stepbatch.server.answers import Answers, CountAnswers
from stepbatch.server.body import FREE_BYTES, Room
from stepbatch.server.fields import EDITS, GENERATIONS, VIDEOS, idle_fields
from stepbatch.server.files import FileStore
from stepbatch.server.generate import ImageRoutes
from stepbatch.server.idempotency import Idempotency
from stepbatch.server.images import Threads
from stepbatch.server.metrics import Metrics
from stepbatch.server.openapi import document
from stepbatch.server.request_id import RequestIdMiddleware
from stepbatch.server.schema import check_model
from stepbatch.server.video_jobs import VideoJobs
from stepbatch.server.video_store import VideoStore
from stepbatch.server.videos import VideoRoutes

VIDEO = f"{VIDEOS}/{{video_id}}"


def create_app(engine: AsyncEngine, config: ServerConfig) -> FastAPI:
    """The application for a started engine. It takes over ``engine.on_message``."""
    files, metrics, threads = FileStore(config.http.url_ttl_seconds), Metrics(engine), Threads()
    keys, hosts = Keys(config.access.api_key), own_hosts(config.access, config.http)
    idle = idle_fields(engine.config.batching, keyed=bool(keys))
    room = Room(config.limits.max_uploads_mb << 20, FREE_BYTES, engine.admission.later)
    answers = Answers(config.limits.max_answers_mb << 20, engine.admission.later)
    images = ImageRoutes(engine, files, metrics, threads, config.limits, room, answers, idle)
    jobs = VideoJobs(engine, _video_store(config.videos), metrics, threads) if engine.info.makes_videos else None
    videos = VideoRoutes(engine, jobs, metrics, threads, config.limits, room, idle)
    pages = Pages(engine, files, metrics, config.limits)

    def on_message(message: FromEngine) -> None:
        metrics.on_message(message)
        if jobs:
            jobs.on_message(message)

    engine.on_message = on_message

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with metrics.loop.watching():
            if jobs:
                jobs.start()
            yield
            written = await jobs.close() if jobs else True
        threads.close(wait_for_videos=written)

    # No generated documents: /openapi.json comes from our own tables, and the pages to browse it load remote scripts.
    app = FastAPI(
        title="stepbatch", openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False, lifespan=lifespan
    )
    handlers.install(app)
    app.add_middleware(CountAnswers, answers=answers)
    app.add_middleware(AccessMiddleware, keys=keys, hosts=hosts)
    app.add_middleware(RequestIdMiddleware)  # the last comes first
    idempotency = Idempotency(config.http.idempotency_seconds, config.limits.max_upload_bytes)
    for path, route in ((GENERATIONS, images.generations), (EDITS, images.edits), (VIDEOS, videos.create)):
        app.add_api_route(path, idempotency.once(route), methods=["POST"], response_model=None)
    app.add_api_route(VIDEO, videos.delete, methods=["DELETE"], response_model=None)
    _add_pages(app, videos, pages, config.access.docs)
    return app


def _add_pages(app: FastAPI, videos: VideoRoutes, pages: Pages, docs: bool) -> None:
    """Add the routes that only look; ``docs`` is whether the interface is described too."""
    for path, page in (
        (VIDEOS, videos.page),
        (VIDEO, videos.retrieve),
        (f"{VIDEO}/content", videos.content),
        ("/v1/files/{name}", pages.file),
        ("/v1/models", pages.models),
        ("/v1/models/{model:path}", pages.model),
        ("/v1/model_info", pages.model_info),
        ("/v1/profile", pages.profile),
        ("/health", pages.health),
        ("/ready", pages.ready),
        ("/metrics", pages.prometheus),
        *([("/openapi.json", pages.openapi)] if docs else []),
    ):
        app.add_api_route(path, page, methods=["GET", "HEAD"], response_model=None)


def _video_store(config: VideosConfig) -> VideoStore:
    folder = Path(config.video_dir) if config.video_dir else _data_home() / "stepbatch" / "videos"
    return VideoStore(folder, config.video_ttl_seconds, int(config.video_disk_mb * 2**20))


def _data_home() -> Path:
    """Where a user's data is kept, by the XDG Base Directory Specification, which has no use for relative paths."""
    given = Path(os.environ.get("XDG_DATA_HOME", ""))
    try:
        return given if given.is_absolute() else Path.home() / ".local" / "share"
    except RuntimeError as error:
        raise SetupError("--video-dir is needed: this user has no home for videos to be kept in") from error


class Pages:
    """Everything that is only looked at."""

    def __init__(self, engine: AsyncEngine, files: FileStore, metrics: Metrics, limits: LimitsConfig) -> None:
        self.engine = engine
        self.files = files
        self.metrics = metrics
        self.limits = limits
        self.created = int(time.time())

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        check_model(request.path_params["model"], self.engine.info)
        return JSONResponse(self._model())

    async def model_info(self, request: Request) -> Response:
        info = msgspec.to_builtins(self.engine.info)
        return JSONResponse({"model_path": self.engine.info.path, **info})

    async def profile(self, request: Request) -> Response:
        """What is known now of what work costs, as a curve for ``bench simulate``."""
        info = msgspec.structs.replace(self.engine.info, path="")
        note = f"learned by a server on {info.device}, {info.dtype}"
        curve = {"name": info.id, "costs": self.engine.costs, "model": info, "note": note}
        return JSONResponse(msgspec.to_builtins(curve))

    async def health(self, request: Request) -> Response:
        """Whether this process is worth keeping: not once the engine can't be started any more."""
        if self.engine.state == "failed":
            raise EngineUnavailable(REFUSALS["failed"])
        return JSONResponse({"status": "ok", "engine": self.engine.state})

    async def ready(self, request: Request) -> Response:
        if not self.engine.ready:
            raise EngineUnavailable("the engine is not ready")
        return JSONResponse({"status": "ready"})

    async def prometheus(self, request: Request) -> Response:
        return Response(self.metrics.render(), media_type=CONTENT_TYPE_LATEST)

    async def file(self, request: Request) -> Response:
        file = self.files.get(request.path_params["name"])
        left = max(0, int(file.expires - self.files.clock()))
        headers = {"cache-control": f"private, max-age={left}", "x-content-type-options": "nosniff"}
        return Response(file.data, media_type=file.media_type, headers=headers)

    async def openapi(self, request: Request) -> Response:
        return JSONResponse(document(self.limits))

    def _model(self) -> dict[str, Any]:
        info = self.engine.info
        takes_images = any(not task.startswith("text-") for task in info.tasks)
        return {
            "id": info.id,
            "object": "model",
            "created": self.created,
            "owned_by": "stepbatch",
            "pipeline": info.pipeline,
            "device": info.device,
            "dtype": info.dtype,
            "tasks": list(info.tasks),
            "defaults": msgspec.to_builtins(info.defaults),
            "limits": {
                "size_multiple": info.size_multiple,
                "min_side": info.min_side,
                "max_side": info.max_side,
                "max_sequence_length": info.max_sequence_length,
                "max_images": info.max_images if takes_images else 0,
                "n": 1 if info.makes_videos else self.limits.max_outputs,
                "max_frames": info.max_frames,
                "frames_multiple": info.frames_multiple,
                "num_inference_steps": self.limits.max_steps,
                "prompt_bytes": self.limits.max_prompt_bytes,
            },
            "uses": list(info.uses),
            "guidance": info.guidance.field if info.guidance.field in info.uses else None,
        }
