"""diffusers behind Ray Serve with ``@serve.batch``, which brings requests together that are waiting when a call ends.

Run with: python benchmarks/peers/ray_server.py --model-path DIR [--port 8000]

One replica with a FastAPI application. Up to 8 requests that came within the batch's timeout are one batch; those of
them that may share a call do, one call after another, and all are answered when the last is done: so its batches work.
Calls run in a thread, so the replica's event loop takes requests in meanwhile, and pictures are compressed in threads
while the next batch is drawn. ``max_ongoing_requests`` is raised from 5, with which no batch would ever be full.
"""

import asyncio
import os
import signal
import sys
import tempfile
import threading
from typing import Any

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # before the import, which looks at it

import ray
from fastapi import FastAPI, HTTPException, Response
from ray import serve
from shared import MAX_PICTURES, ROUTE, Body, answer, arguments, draw_all, load

app = FastAPI()


@serve.deployment(num_replicas=1, max_ongoing_requests=1000)
@serve.ingress(app)
class Images:
    """The replica."""

    def __init__(self, model_path: str, threads: int, wait: float) -> None:
        self.pipeline = load(model_path, threads)
        self.draw.set_batch_wait_timeout_s(wait)

    @serve.batch(max_batch_size=MAX_PICTURES)
    async def draw(self, bodies: list[Body]) -> list[Any]:
        return await asyncio.to_thread(draw_all, self.pipeline, bodies)

    @app.get("/health")
    async def health(self) -> dict[str, str]:
        return {"status": "ok"}

    @app.post(ROUTE)
    async def generations(self, body: Body) -> Response:
        drawn = await self.draw(body)
        if isinstance(drawn, Exception):
            raise HTTPException(400, str(drawn))
        return Response(await asyncio.to_thread(answer, drawn), media_type="application/json")


def main() -> None:
    """Serve until SIGTERM or SIGINT, and take the cluster along."""
    options = arguments(__doc__)
    with tempfile.TemporaryDirectory() as folder:
        ray.init("local", include_dashboard=False, log_to_driver=False, _temp_dir=folder)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit())
        try:
            serve.start(http_options={"host": options.host, "port": options.port})
            serve.run(Images.bind(options.model_path, options.num_threads, options.batch_wait))
            threading.Event().wait()
        finally:
            ray.shutdown()


if __name__ == "__main__":
    main()
