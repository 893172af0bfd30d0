"""diffusers behind FastAPI with a lock: one request at a time, as most people begin.

Run with: python benchmarks/peers/fastapi_lock.py --model-path DIR [--port 8000]

The event loop stays free: a call runs in a thread, those who wait for the lock cost nothing, and a picture is
compressed while the next request is drawn. Requests wait in the order in which they came.
"""

from __future__ import annotations

import asyncio
from typing import Any

import uvicorn
from fastapi import FastAPI, HTTPException, Response
from shared import ROUTE, Body, answer, arguments, draw, load


def create_app(pipeline: Any) -> FastAPI:
    """The application around a loaded pipeline."""
    app, lock = FastAPI(), asyncio.Lock()

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.post(ROUTE)
    async def generations(body: Body) -> Response:
        async with lock:
            try:
                [pictures] = await asyncio.to_thread(draw, pipeline, [body])
            except ValueError as error:
                raise HTTPException(400, str(error)) from error
        return Response(await asyncio.to_thread(answer, pictures), media_type="application/json")

    return app


if __name__ == "__main__":
    options = arguments(__doc__)
    app = create_app(load(options.model_path, options.num_threads))
    uvicorn.run(app, host=options.host, port=options.port, log_level="warning")
