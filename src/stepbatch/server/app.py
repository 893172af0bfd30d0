"""The HTTP application: its routes, and what each answers from."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
from fastapi import FastAPI
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from stepbatch.config import ServerConfig
from stepbatch.engine.client import AsyncEngine
from stepbatch.errors import EngineUnavailable
from stepbatch.request import MAX_OUTPUTS, MAX_STEPS
from stepbatch.server import handlers
from stepbatch.server.files import FileStore
from stepbatch.server.generate import ImageRoutes
from stepbatch.server.images import Threads
from stepbatch.server.metrics import Metrics
from stepbatch.server.openapi import document
from stepbatch.server.request_id import RequestIdMiddleware
from stepbatch.server.schema import EDITS, GENERATIONS, check_model


def create_app(engine: AsyncEngine, config: ServerConfig) -> FastAPI:
    """The application for a started engine. It takes over ``engine.on_message``."""
    files, metrics, threads = FileStore(config.url_ttl_seconds), Metrics(engine), Threads()
    engine.on_message = metrics.on_message
    images = ImageRoutes(engine, files, metrics, threads, config)
    pages = Pages(engine, files, metrics)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        threads.close()

    # No generated documents: /openapi.json comes from our own tables, and the pages to browse it load remote scripts.
    app = FastAPI(
        title="stepbatch", openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False, lifespan=lifespan
    )
    handlers.install(app)
    app.add_middleware(RequestIdMiddleware)
    for path, route in ((GENERATIONS, images.generations), (EDITS, images.edits)):
        app.add_api_route(path, route, methods=["POST"], response_model=None)
    for path, page in (
        ("/v1/files/{name}", pages.file),
        ("/v1/models", pages.models),
        ("/v1/models/{model:path}", pages.model),
        ("/v1/model_info", pages.model_info),
        ("/health", pages.health),
        ("/ready", pages.ready),
        ("/metrics", pages.prometheus),
        ("/openapi.json", pages.openapi),
    ):
        app.add_api_route(path, page, methods=["GET", "HEAD"], response_model=None)
    return app


class Pages:
    """Everything that is only looked at."""

    def __init__(self, engine: AsyncEngine, files: FileStore, metrics: Metrics) -> None:
        self.engine = engine
        self.files = files
        self.metrics = metrics
        self.created = int(time.time())

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        check_model(request.path_params["model"], self.engine.info)
        return JSONResponse(self._model())

    async def model_info(self, request: Request) -> Response:
        info = msgspec.to_builtins(self.engine.info)
        return JSONResponse({"model_path": self.engine.info.path, **info})

    async def health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok"})

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
        return JSONResponse(document())

    def _model(self) -> dict[str, Any]:
        info = self.engine.info
        takes_images = set(info.tasks) != {"text-to-image"}
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
                "n": MAX_OUTPUTS,
                "num_inference_steps": MAX_STEPS,
            },
            "uses": list(info.uses),
            "guidance": info.guidance.field if info.guidance.field in info.uses else None,
        }
