"""One checkpoint under all kinds of requests at once: who shares a call, who hangs up, and whose fault is whose."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from tests.pipelines.asked import asked_of, picture, requests
from tests.pipelines.bursts import DIFFERENT, ROUNDED, apart, least_apart, load, reference
from tests.pipelines.checkpoints import UNKNOWN
from tests.pipelines.conftest import Checkpoints
from tests.pipelines.server import WIDTH, Serving, serving

from stepbatch import GenerationRequest

# diffusers' own: some of its noise schedules hand torch's tensors to numpy
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

KIND = "stable-diffusion"
BY_IMAGE = "stable-diffusion, image-to-image"
LONG = 800  # steps: of a call that takes ten seconds or more
SOON = 3.0  # seconds: less than half of what such a call takes


@pytest.fixture(scope="module")
def folder(checkpoint: Checkpoints) -> Path:
    return checkpoint(KIND)


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory, forked_models: None) -> Iterator[Serving]:
    with serving(folder, tmp_path_factory.mktemp("server")) as started:
        yield started


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> Any:
    return load(folder)


def mixed() -> list[tuple[str, GenerationRequest]]:
    """Pairs that may share a call: two sizes, two numbers of steps, from a prompt alone or from an image."""
    found = []
    for asked, size, steps in itertools.product((KIND, BY_IMAGE), ((64, 48), (40, 64)), (2, 3)):
        for request in requests(asked, 2):
            seed = 100 + len(found)
            images = tuple(picture(image.width, image.height, seed) for image in request.images)
            fields = {"width": size[0], "height": size[1], "num_inference_steps": steps, "seed": seed, "images": images}
            found.append((asked, replace(request, **fields)))
    return found


@pytest.mark.parametrize("asked", asked_of(KIND))
def test_a_burst_gets_what_each_gets_alone(server: Serving, asked: str) -> None:
    wanted = requests(asked, WIDTH)
    calls, jobs = server.calls()
    together = server.ask_all(wanted)
    assert server.calls() == (calls + 1, jobs + WIDTH)
    alone = [server.ask(request) for request in wanted]
    assert server.calls() == (calls + 1 + WIDTH, jobs + 2 * WIDTH)
    assert max(apart(ours, one) for ours, one in zip(together, alone, strict=True)) <= ROUNDED
    assert least_apart(together) > DIFFERENT


def test_what_may_share_a_call_does_and_nothing_else(server: Serving, folder: Path, pipeline: Any) -> None:
    wanted = mixed()
    wanted = wanted[::2] + wanted[1::2]  # so that those that may share a call are apart
    calls, jobs = server.calls()
    drawn = server.ask_all([request for _, request in wanted])
    assert server.calls() == (calls + len(wanted) // 2, jobs + len(wanted))
    for (asked, request), ours in zip(wanted, drawn, strict=True):
        assert apart(ours, reference(asked, pipeline, request, folder)) <= ROUNDED


def test_outputs_of_one_request_share_a_call(server: Serving, folder: Path, pipeline: Any) -> None:
    request = replace(requests(KIND)[1], n=WIDTH, seed=50)
    calls, jobs = server.calls()
    drawn = server.ask(request)
    assert server.calls() == (calls + 1, jobs + WIDTH)
    for i, ours in enumerate(drawn):
        one = replace(request, n=1, seed=50 + i)
        assert apart(ours[None], reference(KIND, pipeline, one, folder)) <= ROUNDED


def send(server: Serving, request: GenerationRequest) -> HTTPConnection:
    """Ask for a picture, and don't wait; whoever closes the connection hangs up."""
    assert server.http.base_url.port is not None
    connection = HTTPConnection(server.http.base_url.host, server.http.base_url.port)
    names = ("prompt", "negative_prompt", "num_inference_steps", "guidance_scale", "seed")
    body = {name: getattr(request, name) for name in names} | {"size": f"{request.width}x{request.height}"}
    connection.request("POST", "/v1/images/generations", json.dumps(body), {"content-type": "application/json"})
    return connection


def run(server: Serving, count: int) -> bool:
    """Whether so many requests run, or will soon."""
    return server.within(10.0, lambda: server.metric("num_requests_running") == count)


def test_a_call_that_nobody_waits_for_any_more_stops_soon(server: Serving, folder: Path, pipeline: Any) -> None:
    leaving = [send(server, replace(request, num_inference_steps=LONG)) for request in requests(KIND, 2)]
    assert run(server, 2)
    for connection in leaving:
        connection.close()
    began = time.monotonic()
    assert run(server, 0)
    request = requests(KIND)[2]
    assert apart(server.ask(request), reference(KIND, pipeline, request, folder)) <= ROUNDED
    assert time.monotonic() - began < 2 * SOON


def test_one_that_hangs_up_leaves_the_others_in_peace(server: Serving, folder: Path, pipeline: Any) -> None:
    leaves, stays = (replace(request, num_inference_steps=40) for request in requests(KIND, 2))
    calls, _ = server.calls()
    leaving = send(server, leaves)
    with ThreadPoolExecutor(1) as pool:
        drawing = pool.submit(server.ask, stays)
        assert run(server, 2)
        leaving.close()
        drawn = drawing.result()
    assert server.calls()[0] == calls + 1
    assert apart(drawn, reference(KIND, pipeline, stays, folder)) <= ROUNDED


def test_one_that_the_pipeline_cannot_draw_fails_alone(server: Serving, folder: Path, pipeline: Any) -> None:
    wanted = requests(KIND)
    wanted[1] = replace(wanted[1], prompt=f"a {UNKNOWN} thing")
    answers: dict[int, httpx.Response] = {}
    threads = [
        threading.Thread(target=lambda i=i, request=request: answers.update({i: server.post(request)}))
        for i, request in enumerate(wanted)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    bad = answers.pop(1)
    assert (bad.status_code, bad.json()["error"]["code"]) == (500, "generation_failed")
    assert [answer.status_code for answer in answers.values()] == [200] * 3
    again = server.ask_all([wanted[i] for i in (0, 2, 3)])
    for ours, i in zip(again, (0, 2, 3), strict=True):
        assert apart(ours, reference(KIND, pipeline, wanted[i], folder)) <= ROUNDED


@pytest.mark.parametrize("field", ["prompt", "negative_prompt"])
def test_an_over_long_prompt_is_refused_at_the_door(server: Serving, field: str) -> None:
    calls = server.calls()
    answer = server.post(replace(requests(KIND)[0], **{field: "boats " * 100}))
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["code"], error["param"]) == ("invalid_value", field)
    assert "77" in error["message"] or "75" in error["message"]
    assert server.calls() == calls


@pytest.mark.parametrize(
    ("field", "value"),
    [("size", "60x48"), ("true_cfg_scale", 2.0), ("num_frames", 5), ("max_sequence_length", 20), ("flow_shift", 2.0)],
)
def test_what_the_pipeline_has_no_use_for_is_refused_by_name(server: Serving, field: str, value: object) -> None:
    answer = server.http.post("/v1/images/generations", json={"prompt": "a cat", field: value})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == field


def test_defaults_are_the_pipelines_own(server: Serving) -> None:
    [model] = server.http.get("/v1/models").json()["data"]
    assert model["id"] == KIND
    drawn = server.ask(GenerationRequest(prompt="a cat", seed=1, num_inference_steps=1))
    assert drawn.shape == (1, 64, 64, 3)
    assert np.ptp(drawn) > 100
