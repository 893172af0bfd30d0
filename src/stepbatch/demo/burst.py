"""Two dozen different requests, a server to send them to, and what came of it."""

from __future__ import annotations

import base64
import http.client
import io
import json
import math
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from stepbatch.config import API_KEY_VARIABLE
from stepbatch.errors import SetupError

START_SECONDS = 300.0  # until the server has loaded its model
ANSWER_SECONDS = 600.0


@dataclass(frozen=True)
class Wish:
    """One request of the burst."""

    prompt: str
    width: int  # pixels
    height: int  # pixels
    steps: int
    guidance: float
    seed: int

    def body(self) -> dict[str, Any]:
        """As the server takes it."""
        return {
            "prompt": self.prompt,
            "size": f"{self.width}x{self.height}",
            "num_inference_steps": self.steps,
            "guidance_scale": self.guidance,
            "seed": self.seed,
        }


BURST = (
    Wish("a small red star on a white background", 128, 128, 8, 1.5, 1),
    Wish("a green ring above a purple square on a yellow background", 192, 256, 16, 1.5, 2),
    Wish("a large blue heart on an orange background", 160, 160, 10, 1.0, 3),
    Wish("a yellow triangle to the left of a red circle on a black background", 256, 160, 20, 1.2, 4),
    Wish("a white cross on a blue background", 144, 192, 12, 1.0, 5),
    Wish("a small orange diamond below a large black square on a white background", 176, 240, 18, 1.5, 6),
    Wish("a large purple star on a yellow background", 224, 176, 9, 2.0, 7),
    Wish("a large red ring to the right of a small blue heart on a white background", 240, 144, 14, 1.2, 8),
    Wish("a black circle on a green background", 128, 176, 6, 1.0, 9),
    Wish("a white star above a yellow cross on a purple background", 160, 224, 20, 1.5, 10),
    Wish("a large orange triangle on a black background", 256, 256, 12, 1.0, 11),
    Wish("a blue square to the left of a green diamond on a white background", 208, 128, 16, 1.5, 12),
    Wish("a small purple ring on a white background", 192, 192, 8, 0.0, 13),
    Wish("a red heart above a black circle on a yellow background", 144, 208, 18, 1.2, 14),
    Wish("a large green cross on a red background", 176, 128, 10, 1.5, 15),
    Wish("a large yellow star to the right of a white ring on a blue background", 256, 192, 20, 1.5, 16),
    Wish("a blue diamond on a yellow background", 128, 256, 7, 0.5, 17),
    Wish("a small red square below a large green triangle on a white background", 192, 224, 15, 1.0, 18),
    Wish("a large white heart on a purple background", 208, 208, 4, 1.5, 19),
    Wish("an orange circle to the left of a purple cross on a black background", 224, 144, 18, 1.2, 20),
    Wish("a large black ring on an orange background", 160, 128, 9, 0.0, 21),
    Wish("a purple diamond above a blue star on a white background", 176, 256, 20, 0.8, 22),
    Wish("a green heart on a white background", 144, 144, 12, 2.5, 23),
    Wish("a large red triangle to the right of a yellow square on a blue background", 240, 176, 16, 1.5, 24),
)


@dataclass(frozen=True, eq=False)
class Answer:
    """What came of a wish: a picture, or the error's message."""

    wish: Wish
    seconds: float  # from sending to the last byte
    picture: Image.Image | None
    error: str = ""


@dataclass(frozen=True)
class Figures:
    """What a burst was like for its callers; latencies of those that were answered."""

    requests: int
    failed: int
    seconds: float
    requests_per_second: float
    latency_mean: float
    latency_p50: float
    latency_p99: float
    jobs_per_step: float

    def to_json(self) -> dict[str, float]:
        return {name: round(value, 4) for name, value in asdict(self).items()}


class Server:
    """A running server, by address."""

    def __init__(self, host: str, port: int) -> None:
        self.host = host
        self.port = port

    def ask(self, wish: Wish) -> Answer:
        """Send a wish and wait for its picture."""
        began = time.monotonic()
        try:
            status, data = self._call("POST", "/v1/images/generations", json.dumps(wish.body()))
            body = json.loads(data)
        except (OSError, http.client.HTTPException, ValueError) as error:
            return Answer(wish, time.monotonic() - began, None, str(error) or type(error).__name__)
        seconds = time.monotonic() - began
        if status != 200:
            return Answer(wish, seconds, None, body["error"]["message"])
        picture = Image.open(io.BytesIO(base64.b64decode(body["data"][0]["b64_json"])))
        return Answer(wish, seconds, picture.convert("RGB"))

    def steps(self) -> tuple[float, float]:
        """Jobs that took part in denoising steps, summed over the steps; and how many steps there were.

        Raises:
            SetupError: the server is gone.
        """
        try:
            text = self._call("GET", "/metrics")[1].decode()
        except (OSError, http.client.HTTPException) as error:
            raise SetupError(f"the server does not answer: {str(error) or type(error).__name__}") from error
        values = dict(re.findall(r"^stepbatch:jobs_per_step_(sum|count) ([0-9.e+]+)$", text, re.MULTILINE))
        return float(values["sum"]), float(values["count"])

    def _call(self, method: str, path: str, body: str | None = None) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection(self.host, self.port, timeout=ANSWER_SECONDS)
        try:
            connection.request(method, path, body, {"content-type": "application/json"})
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()


@contextmanager
def serving(flags: Sequence[str], log: Path) -> Iterator[Server]:
    """A server of the package on a free port, in a process of its own, for as long as the context lasts.

    Raises:
        SetupError: it didn't start.
    """
    command = [sys.executable, "-m", "stepbatch", "serve", "--port", "0", "--log-level", "warning", *flags]
    # it is for this machine alone, and has no use for the keys of another server
    environment = {name: value for name, value in os.environ.items() if name != API_KEY_VARIABLE}
    with log.open("w") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()  # comes when the model is loaded, or ends when the process does
        address = re.search(r"http://([0-9.]+):([0-9]+)", line)
        if address is None:
            lines = log.read_text().splitlines()
            raise SetupError(f"the server did not start: {lines[-1] if lines else 'it said nothing'}")
        yield Server(address[1], int(address[2]))
    finally:
        process.terminate()
        process.communicate(timeout=START_SECONDS)


def send(server: Server, wishes: Sequence[Wish]) -> tuple[list[Answer], Figures]:
    """Send all wishes at once and wait for every answer."""
    server.ask(wishes[0])  # the first request of a process pays for what is set up once
    jobs_before, steps_before = server.steps()
    began = time.monotonic()
    with ThreadPoolExecutor(len(wishes)) as pool:
        answers = list(pool.map(server.ask, wishes))
    seconds = time.monotonic() - began
    jobs, steps = server.steps()
    return answers, figures(answers, seconds, (jobs - jobs_before) / max(1.0, steps - steps_before))


def figures(answers: Sequence[Answer], seconds: float, jobs_per_step: float) -> Figures:
    """Sum up a burst that took ``seconds``."""
    latencies = sorted(answer.seconds for answer in answers if answer.picture is not None)
    return Figures(
        requests=len(answers),
        failed=len(answers) - len(latencies),
        seconds=seconds,
        requests_per_second=len(latencies) / seconds,
        latency_mean=statistics.fmean(latencies) if latencies else 0.0,
        latency_p50=statistics.median(latencies) if latencies else 0.0,
        latency_p99=latencies[math.ceil(0.99 * len(latencies)) - 1] if latencies else 0.0,
        jobs_per_step=jobs_per_step,
    )
