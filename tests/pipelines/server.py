"""The real server on one of the checkpoints, asked as clients ask it."""

from __future__ import annotations

import base64
import io
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import httpx
import numpy as np
from PIL import Image
from tests.pictures import file
from tests.pipelines.asked import pil
from tests.server.conftest import running as running_here

from stepbatch import GenerationRequest, ModelConfig
from stepbatch.bench.servers import running
from stepbatch.config import BatchingConfig

DELAY_MS = 400  # that a request waits for company: long enough for a burst to come in on a busy machine
WIDTH = 4  # of a call
SECONDS = 60  # that an answer may take

TEXTS = (
    "prompt", "negative_prompt", "num_inference_steps", "guidance_scale", "true_cfg_scale", "max_sequence_length",
    "strength", "num_frames", "fps", "seed", "n",
)  # fmt: skip


@dataclass(frozen=True)
class Serving:
    """A server that is up."""

    http: httpx.Client

    def ask(self, request: GenerationRequest) -> np.ndarray:
        """What comes of a request: 8 bits each, ``[F, H, W, 3]``; of several outputs, one after another."""
        answer = self.post(request)
        assert answer.status_code == 200, answer.text
        if request.num_frames is not None:
            return self._video(answer.json()["id"], request)
        assert answer.json()["seeds"][0] == request.seed
        return np.stack([_picture(item["b64_json"]) for item in answer.json()["data"]])

    def post(self, request: GenerationRequest) -> httpx.Response:
        """The answer to a request on the route that is for it."""
        texts = {name: value for name in TEXTS if (value := getattr(request, name)) is not None}
        if request.num_frames is not None:
            del texts["n"]
        if request.width is not None:
            texts["size"] = f"{request.width}x{request.height}"
        video = request.num_frames is not None
        if not request.images:
            return self.http.post("/v1/videos" if video else "/v1/images/generations", json=texts)
        images = [("input_reference" if video else "image", file(pil(image))) for image in request.images]
        files = [*images, ("mask", file(pil(request.mask)))] if request.mask else images
        forms = {name: str(value) for name, value in texts.items()}
        uploads = [(name, (f"{name}.png", data, "image/png")) for name, data in files]
        return self.http.post("/v1/videos" if video else "/v1/images/edits", data=forms, files=uploads)

    def ask_all(self, wanted: Sequence[GenerationRequest]) -> list[np.ndarray]:
        """All at once."""
        with ThreadPoolExecutor(len(wanted)) as pool:
            return list(pool.map(self.ask, wanted))

    def metric(self, name: str) -> float:
        """One of the server's figures."""
        found = re.search(rf"^stepbatch:{name} (\S+)$", self.http.get("/metrics").text, re.MULTILINE)
        assert found is not None, name
        return float(found[1])

    def calls(self) -> tuple[int, int]:
        """How many calls there have been, and how many jobs in them."""
        return int(self.metric("jobs_per_step_count")), int(self.metric("jobs_per_step_sum"))

    def within(self, seconds: float, condition: Callable[[], bool]) -> bool:
        """Whether a condition comes true in time."""
        deadline = time.monotonic() + seconds
        while not condition() and time.monotonic() < deadline:
            time.sleep(0.02)
        return condition()

    def _video(self, id: str, request: GenerationRequest) -> np.ndarray:
        def state() -> dict[str, Any]:
            return dict(self.http.get(f"/v1/videos/{id}").json())

        assert self.within(SECONDS, lambda: state()["status"] in ("completed", "failed"))
        assert state()["status"] == "completed", state()
        content = self.http.get(f"/v1/videos/{id}/content").content
        with av.open(io.BytesIO(content)) as container:
            assert container.streams.video[0].average_rate == request.fps
        return read_mp4(content)


@contextmanager
def serving(model: Path, folder: Path, *flags: str) -> Iterator[Serving]:
    """The server, as a user starts it."""
    batching = f"--num-threads 1 --dynamic-batch-max-size {WIDTH} --dynamic-batch-delay-ms {DELAY_MS}".split()
    command = [sys.executable, "-m", "stepbatch", "serve", "--model-path", str(model), "--backend", "diffusers"]
    with running([*command, "--port", "{port}", *batching, *flags], folder / "log") as server:
        with httpx.Client(base_url=server.base_url, timeout=SECONDS) as http:
            yield Serving(http)


@contextmanager
def serving_here(model: Path, width: int, videos: Path) -> Iterator[Serving]:
    """The server in a thread of this process."""
    asked = ModelConfig(model_path=str(model), backend="diffusers", num_threads=1)
    batching = BatchingConfig(dynamic_batch_max_size=width, dynamic_batch_delay_ms=DELAY_MS)
    with running_here(asked, batching, video_dir=str(videos)) as server:
        with httpx.Client(base_url=server.url, timeout=SECONDS) as http:
            yield Serving(http)


def read_mp4(content: bytes) -> np.ndarray:
    """Its frames."""
    with av.open(io.BytesIO(content)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def _picture(data: str) -> np.ndarray:
    with Image.open(io.BytesIO(base64.b64decode(data))) as picture:
        assert picture.mode == "RGB"
        return np.asarray(picture)
