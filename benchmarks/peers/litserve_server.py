"""diffusers behind LitServe, which brings requests together that are waiting when a call ends.

Run with: python benchmarks/peers/litserve_server.py --model-path DIR [--port 8000]

LitServe's worker takes up to 8 requests that came within the batch's timeout; those of them that may share a call do,
one call after another, and all are answered when the last is done: so its batches work. HTTP is served by another
process. Pictures are compressed in the worker, after the batch: ``encode_response`` is the place that the framework has
for it. There is one worker, as with the others, and its queues are the default ones, which are meant for up to 100
requests a second. The limit of 30 seconds a request is lifted: under load, waiting takes longer.
"""

from collections.abc import Sequence
from typing import Any

import litserve
from fastapi import Response
from shared import MAX_PICTURES, ROUTE, Body, answer, arguments, draw_all, load


class Images(litserve.LitAPI):
    """The route; each method is LitServe's."""

    def __init__(self, model_path: str, threads: int, wait: float) -> None:
        super().__init__(max_batch_size=MAX_PICTURES, batch_timeout=wait, api_path=ROUTE)
        self.settings = model_path, threads

    def setup(self, device: str) -> None:
        self.pipeline = load(*self.settings)

    def decode_request(self, request: Body) -> Body:
        return request

    def predict(self, x: Sequence[Body]) -> list[Any]:
        return draw_all(self.pipeline, x)

    def encode_response(self, output: Any) -> Response:
        if isinstance(output, Exception):  # one that is raised here would end the whole batch
            return Response(str(output), 400)
        return Response(answer(output), media_type="application/json")


if __name__ == "__main__":
    options = arguments(__doc__)
    api = Images(options.model_path, options.num_threads, options.batch_wait)
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=1, timeout=False)
    server.run(host=options.host, port=options.port, log_level="warning", generate_client_file=False)
