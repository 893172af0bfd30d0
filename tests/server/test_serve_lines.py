"""Command lines with which others serve these models, as they are; the weights are random, and few."""

from __future__ import annotations

import re
import signal
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import httpx
import pytest
from tests.forked import MODELS, Forked

from stepbatch.bench.servers import Server

NAMES = ["Qwen/Qwen-Image-2512", "Tongyi-MAI/Z-Image-Turbo", "black-forest-labs/FLUX.1-dev"]
LINE = "serve --model-path {model} --backend diffusers --num-gpus 1 --port 0 --dit-layerwise-offload true"
BATCHED = "--dynamic-batch-max-size 8 --dynamic-batch-delay-ms 300"  # a busy machine sends four over some time
SHRUNK = "--load-format dummy --dummy-size small"
BURST = 4


@pytest.fixture
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    command = [sys.executable, "-m", "stepbatch", *request.param.split(), *SHRUNK.split()]
    files = tmp_path / "log", tmp_path / "out"
    process = Forked(command, *files, modules=MODELS)
    try:
        server = Server(cast(Any, process), "", *files)
        server.wait_until_ready(60)
        yield server.base_url
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
    finally:
        process.kill()


def draw(url: str, seed: int) -> dict[str, Any]:
    body = {"prompt": "a cat " * (seed + 1), "size": "64x64", "num_inference_steps": 2, "seed": seed}
    answer = httpx.post(f"{url}/v1/images/generations", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    return dict(answer.json()["data"][0])


def calls(url: str) -> tuple[int, int]:
    """How many calls there were, and how many jobs they had."""
    metrics = httpx.get(f"{url}/metrics").text
    found = dict(re.findall(r"^stepbatch:jobs_per_step_(count|sum)(?:\{.*\})? ([\d.]+)$", metrics, re.MULTILINE))
    return int(float(found["count"])), int(float(found["sum"]))


def burst(url: str) -> None:
    with ThreadPoolExecutor(BURST) as pool:
        pictures = list(pool.map(lambda seed: draw(url, seed), range(BURST)))
    assert len({picture["b64_json"] for picture in pictures}) == BURST


@pytest.mark.parametrize("url", [LINE.format(model=model) for model in NAMES], indirect=True, ids=NAMES)
def test_a_burst_is_answered(url: str) -> None:
    burst(url)
    assert calls(url)[1] == BURST


@pytest.mark.parametrize("url", [f"{LINE.format(model=model)} {BATCHED}" for model in NAMES], indirect=True, ids=NAMES)
def test_a_burst_shares_calls(url: str) -> None:
    draw(url, 100)  # the first call warms up
    burst(url)
    made, jobs = calls(url)
    assert jobs == 1 + BURST
    assert made < 1 + BURST
