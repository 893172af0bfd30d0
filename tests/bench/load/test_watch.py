import asyncio
from pathlib import Path

import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st
from tests.bench.support import GENERATIONS, Handler, at, pictures_json, png, send, serving

from stepbatch.bench.load.watch import ask_servers, meet_servers, model_name, read_metrics
from stepbatch.bench.options import TargetOptions
from stepbatch.demo.burst import serving as stepbatch_serving

pytestmark = pytest.mark.anyio

PAGE = b"""# HELP vllm:num_requests_running x
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model="a }b"} 2.0
vllm:num_requests_running{engine="1",model="a }b"} 3.0
# TYPE sgl_num_requests_waiting gauge
sgl_num_requests_waiting 7
# TYPE stepbatch:jobs_per_step histogram
stepbatch:jobs_per_step_bucket{le="1.0"} 4.0
stepbatch:jobs_per_step_count 5.0
stepbatch:jobs_per_step_sum 12.5
stepbatch:jobs_per_step_created 1.7e9
a_peak_memory_mb{gpu="0"} 100
a_peak_memory_mb{gpu="1"} 1e3
num_requests_running_total 99
"""


def metrics(*pages: bytes) -> tuple[Handler, list[int]]:
    """A handler that answers with these in turn, the last for ever; a list that grows each time."""
    asked: list[int] = []

    async def handle(request: web.Request) -> web.StreamResponse:
        asked.append(len(asked))
        return web.Response(body=pages[min(len(asked), len(pages)) - 1])

    return handle, asked


async def wait(request: web.Request) -> web.StreamResponse:
    await asyncio.sleep(0.3)
    return pictures_json(png())


def test_figures_are_found_by_the_ends_of_their_names() -> None:
    assert read_metrics(PAGE) == {
        "running": 5.0,
        "waiting": 7.0,
        "jobs_sum": 12.5,
        "steps": 5.0,
        "peak_memory_mb": 1000.0,
    }
    assert read_metrics(b"num_requests_running 1\nnum_requests_waiting NaN") == {"running": 1.0}
    assert read_metrics(b'sglang:num_running_reqs{a=""} 2\nsglang:num_queue_reqs 3') == {"running": 2.0, "waiting": 3.0}
    assert read_metrics(b"") == {}
    assert read_metrics(b"<html>num_requests_running\nnum_requests_running x\n</html>") == {}


@given(
    st.binary()
    | st.lists(st.sampled_from([*PAGE.split(b"\n"), b"{", b'num_requests_running{a="', b"\xff 1"])).map(b"\n".join)
)
def test_any_page_is_read(page: bytes) -> None:
    assert set(read_metrics(page)) <= {"running", "waiting", "jobs_sum", "steps", "peak_memory_mb"}


async def test_servers_are_looked_at_before_during_and_after_the_run() -> None:
    handle, asked = metrics(b"num_requests_running 0\n", PAGE)
    async with serving(("POST", GENERATIONS, wait), ("GET", "/metrics", handle)) as url:
        with await send(1, at(url), watch_interval=0.07) as driven:
            samples = driven.samples
    assert len(samples) == len(asked) >= 3
    assert [sample.at for sample in samples] == sorted(sample.at for sample in samples)
    assert samples[0].at == 0.0
    assert samples[-1].at >= driven.records[0].ended
    assert samples[0].running == 0.0
    assert samples[0].steps is None
    assert (samples[1].running, samples[1].jobs_sum) == (5.0, 12.5)
    assert {sample.server for sample in samples} == {url}


async def test_servers_without_metrics_are_left_alone() -> None:
    handle, asked = metrics(PAGE)
    calls: list[str] = []

    async def missing(request: web.Request) -> web.StreamResponse:
        calls.append(request.path)
        return web.Response(status=404)

    with_metrics = (("POST", GENERATIONS, wait), ("GET", "/metrics", handle))
    async with serving(*with_metrics) as one, serving(("POST", GENERATIONS, wait), ("GET", "/metrics", missing)) as two:
        with await send(2, at(one, two), watch_interval=0.05) as driven:
            assert {sample.server for sample in driven.samples} == {one}
    assert len(calls) == 1
    assert len(asked) >= 3


async def test_a_server_that_is_busy_is_asked_again() -> None:
    asked = 0

    async def handle(request: web.Request) -> web.StreamResponse:
        nonlocal asked
        asked += 1
        if asked == 1:
            assert request.transport is not None
            request.transport.abort()
        return web.Response(status=503) if asked == 2 else web.Response(body=PAGE)

    async with serving(("POST", GENERATIONS, wait), ("GET", "/metrics", handle)) as url:
        with await send(1, at(url), watch_interval=0.03) as driven:
            assert len(driven.samples) >= 1
            assert driven.records[0].outcome == "ok"


async def test_what_a_server_says_of_itself(tmp_path: Path) -> None:
    with stepbatch_serving(["--backend", "fake", "--served-model-name", "org/m"], tmp_path / "log") as server:
        (said,) = await ask_servers(TargetOptions(host=server.host, port=server.port))
    assert said["base_url"] == f"http://{server.host}:{server.port}"
    assert said["models"]["data"][0]["id"] == "org/m"
    assert said["model_info"]["pipeline"] == "FakePipeline"
    assert model_name(said) == "org/m"


async def test_servers_are_asked_once_they_are_up_and_requests_name_the_first_ones_model() -> None:
    asked: list[str] = []

    def serves(model: str) -> Handler:
        async def answer(request: web.Request) -> web.StreamResponse:
            asked.append(request.path)
            if request.path == "/health":
                return web.Response(status=503 if len(asked) == 1 else 200)
            return web.json_response({"data": [{"id": model}]})

        return answer

    async with (
        serving(("GET", "/{any:.*}", serves("org/a"))) as one,
        serving(("GET", "/{any:.*}", serves("org/b"))) as two,
    ):
        met = await meet_servers(at(one, two))
        named = await meet_servers(at(one, two, model="mine"))
    assert asked[:4] == ["/health", "/health", "/health", "/v1/models"]  # the first is asked until it is up
    assert [(server["base_url"], server["model"]) for server in met] == [(one, "org/a"), (two, "org/a")]
    assert [server["model"] for server in named] == ["mine", "mine"]


async def test_only_what_is_said_in_json_is_kept() -> None:
    async def page(request: web.Request) -> web.StreamResponse:
        return web.Response(text="<html>")

    async def info(request: web.Request) -> web.StreamResponse:
        return web.json_response({"model_path": "org/other"})

    async with serving(("GET", "/v1/models", page), ("GET", "/v1/model_info", info)) as one, serving() as two:
        first, second = await ask_servers(at(one, two))
    assert first == {"base_url": one, "model_info": {"model_path": "org/other"}}
    assert second == {"base_url": two}
    assert (model_name(first), model_name(second)) == ("org/other", "default")


@pytest.mark.parametrize(
    "said",
    [
        {},
        {"models": []},
        {"models": {"data": []}},
        {"models": {"data": ["x"]}},
        {"models": {"data": [{"id": 3}]}},
        {"model_info": [1]},
    ],
)
def test_a_model_has_a_name_in_any_case(said: dict[str, object]) -> None:
    assert model_name(said) == "default"
