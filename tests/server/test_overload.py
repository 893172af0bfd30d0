"""More than the server can do, and what it does then, over HTTP."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, Literal

import httpx
import openai
import pytest
from tests.pictures import file, image

from stepbatch.config import AdmissionConfig, BatchingConfig, ModelConfig
from stepbatch.engine.cost import Costs, StepCost
from stepbatch.server.fields import EDITS, GENERATIONS, VIDEOS

from .conftest import running
from .support import RunningServer, assert_error, within
from .test_metrics import read

pytestmark = pytest.mark.anyio

STEP, STEPS, WIDEST = 0.02, 20, 4  # seconds, whoever is in it
CAPACITY = WIDEST / (STEPS * STEP)  # requests a second
LONG = 150  # steps

Policy = Literal["fcfs", "srpt", "deadline"]


@contextmanager
def serving(
    videos: Path | None = None, policy: Policy = "fcfs", fair: bool = False, **bounds: Any
) -> Iterator[RunningServer]:
    """A server whose engine takes a fixed time for a step, and knows it."""
    model = ModelConfig(backend="fake", fake_step_ms=1000 * STEP, fake_videos=videos is not None)
    batching = BatchingConfig(dynamic_batch_max_size=WIDEST, scheduling_policy=policy, fair_shares=fair)
    settings = {"video_dir": str(videos)} if videos else {}
    with running(model, batching, AdmissionConfig(**bounds), **settings) as server:
        server.engine.admission.learn(Costs(known=True, step=StepCost(host=STEP)))
        yield server


@asynccontextmanager
async def client(server: RunningServer) -> AsyncIterator[httpx.AsyncClient]:
    limits = httpx.Limits(max_connections=1000, max_keepalive_connections=1000)
    async with httpx.AsyncClient(base_url=server.url, timeout=60, limits=limits) as client:
        yield client


async def ask(client: httpx.AsyncClient, steps: int = STEPS, **fields: Any) -> tuple[httpx.Response, float]:
    """An answer, and the seconds until it came."""
    began = time.perf_counter()
    body = {"prompt": "a cat", "size": "16x16", "num_inference_steps": steps, **fields}
    return await client.post(GENERATIONS, json=body), time.perf_counter() - began


@asynccontextmanager
async def busy(server: RunningServer, count: int, **fields: Any) -> AsyncIterator[httpx.AsyncClient]:
    """While the engine has so many long requests."""
    async with client(server) as http:
        tasks = [asyncio.create_task(ask(http, LONG, **fields)) for _ in range(count)]
        while len(server.engine._handles) < count:
            await asyncio.sleep(0.01)
        try:
            yield http
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def test_past_the_tipping_point_the_server_does_all_it_can() -> None:
    """Three times what it can do, for some seconds. The margins are for a busy machine."""
    seconds, queue = 4.0, 1.0
    with serving(max_queue_seconds=queue) as server:
        async with client(server) as http:
            await ask(http)
            began, tasks = time.monotonic(), list[asyncio.Task[tuple[httpx.Response, float]]]()
            while (elapsed := time.monotonic() - began) < seconds:
                while len(tasks) < elapsed * 3 * CAPACITY:
                    tasks.append(asyncio.create_task(ask(http)))
                await asyncio.sleep(0.005)
            answers = await asyncio.gather(*tasks)
            took = time.monotonic() - began
        made = sorted(took for response, took in answers if response.status_code == 200)
        refused = sorted(took for response, took in answers if response.status_code == 429)
        assert len(made) + len(refused) == len(answers)
        assert len(made) / took > 0.75 * CAPACITY
        assert len(refused) > 0.4 * len(answers)
        assert refused[len(refused) // 2] < 0.05
        assert made[int(0.99 * len(made))] < 2 * (queue + STEPS * STEP)
        assert server.engine.admission.backlog == 0


async def test_a_refusal_says_when_to_come_again() -> None:
    with serving(max_queue_seconds=1) as server:
        async with busy(server, 1, n=8) as http:  # 6 s of work
            response, took = await ask(http)
            assert_error(response, 429, "overloaded")
            assert 3 <= int(response.headers["retry-after"]) <= 8
            assert response.headers["x-should-retry"] == "true"
            assert took < 0.5
            figures = read((await http.get("/metrics")).text)
            assert figures['stepbatch:refused_total{reason="queue_seconds"}'] >= 1
            assert figures['stepbatch:requests_total{code="overloaded"}'] >= 1
            assert 3 < figures["stepbatch:backlog_seconds"] < 7


async def test_an_edit_is_refused_before_it_is_read() -> None:
    with serving(max_queue_seconds=1) as server:
        async with busy(server, 1, n=8) as http:
            response = await http.post(
                EDITS, content=b"no form at all", headers={"content-type": "multipart/form-data"}
            )
            assert_error(response, 429, "overloaded")
            picture = {"image": ("x.png", file(image(size=(256, 256))))}
            began = time.perf_counter()
            assert_error(await http.post(EDITS, files=picture, data={"prompt": "a cat"}), 429, "overloaded")
            assert time.perf_counter() - began < 0.5


async def test_the_number_that_waits_is_bounded_too() -> None:
    with serving(max_queue_requests=3) as server:
        async with client(server) as http:
            answers = await asyncio.gather(*(ask(http, 40) for _ in range(30)))
        codes = Counter(response.status_code for response, _ in answers)
        assert set(codes) == {200, 429}
        assert codes[200] < 15
        assert server.engine.admission.refused["queue_requests"] == codes[429]


async def test_a_deadline_that_can_not_be_met_is_told_at_once() -> None:
    with serving() as server:
        async with busy(server, 8) as http:
            alone, took = await ask(http, LONG, timeout=1)
            message = assert_error(alone, 504, "deadline_exceeded", "timeout")
            assert "even alone" in message
            assert alone.headers["x-should-retry"] == "false"
            assert "retry-after" not in alone.headers
            assert took < 0.5
            loaded, took = await ask(http, timeout=1.0)
            assert_error(loaded, 429, "overloaded", "timeout")
            assert 1 <= int(loaded.headers["retry-after"]) <= 8
            assert took < 0.5
            assert server.engine.admission.refused["deadline"] == 2


async def test_what_passes_its_deadline_before_it_begins_is_dropped() -> None:
    with serving() as server:
        server.engine.admission.learn(Costs())  # the door knows nothing, so it lets in whatever comes
        async with busy(server, 4) as http:
            response, took = await ask(http, timeout=0.5)
            assert_error(response, 504, "deadline_exceeded")
            assert took < 2.5


async def test_the_answer_says_what_was_predicted() -> None:
    with serving() as server:
        async with client(server) as http:
            answers = await asyncio.gather(*(ask(http, 20) for _ in range(12)))
        predicted = sorted(response.json()["predicted"]["total"] for response, _ in answers)
        assert predicted[0] >= 20 * STEP
        assert predicted[-1] >= 3 * 20 * STEP
        for response, took in answers:
            body = response.json()
            assert body["predicted"]["queue"] < body["predicted"]["total"]
            assert 0.3 < body["predicted"]["total"] / took < 3
        figures = read(httpx.get(f"{server.url}/metrics").text)
        assert figures["stepbatch:prediction_ratio_count"] == 12


async def test_one_user_who_floods_does_not_hold_up_another() -> None:
    with serving(policy="fcfs", fair=True) as server:
        async with busy(server, 30, user="flood") as http:  # 22 s of work
            response, took = await ask(http, 20, user="one")
            assert response.status_code == 200
            assert response.json()["ignored"] == ["priority"] * 0
            assert took < 8  # the steps of four of the others' requests, at most
            ended = 30 - len(server.engine._handles)
            assert ended <= 2 * WIDEST


async def test_priority_goes_first_where_it_counts() -> None:
    with serving(policy="deadline") as server:
        async with busy(server, 30) as http:
            response, took = await ask(http, 20, priority=5)
            assert response.json()["ignored"] == []
            assert took < 3


async def test_fields_without_effect_are_listed() -> None:
    with serving() as server:
        async with client(server) as http:
            response, _ = await ask(http, priority=1, user=5, timeout=30)
            assert set(response.json()["ignored"]) == {"priority", "user"}
            response, _ = await ask(http, priority="high")
            assert_error(response, 400, "invalid_value", "priority")


def test_openais_client_waits_and_comes_again() -> None:
    with serving(max_queue_seconds=0.2) as server, ThreadPoolExecutor(1) as threads:
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            generate = client.images.generate
            first = threads.submit(lambda: generate(prompt="a cat", n=WIDEST, extra_body={"num_inference_steps": 60}))
            assert within(5, lambda: len(server.engine._handles) == 1)
            with pytest.raises(openai.RateLimitError) as refused:
                generate(prompt="a cat")
            assert (refused.value.code, refused.value.type) == ("overloaded", "rate_limit_error")
            assert int(refused.value.response.headers["retry-after"]) >= 1
            assert not first.done()
            again = client.with_options(max_retries=2).images.generate(prompt="a cat")
            assert again.data
            assert first.result().data
        assert server.engine.admission.refused["queue_seconds"] >= 2


def test_a_refused_video_leaves_no_record(tmp_path: Path) -> None:
    with serving(tmp_path, max_queue_seconds=1) as server:
        with httpx.Client(base_url=server.url, timeout=20) as http:
            body = {"prompt": "a cat", "num_inference_steps": LONG, "size": "16x16", "num_frames": 1}
            kept = [http.post(VIDEOS, json=body) for _ in range(2)]
            assert [response.status_code for response in kept] == [200, 200]
            assert kept[1].json()["predicted"]["total"] >= LONG * STEP
            assert_error(http.post(VIDEOS, json=body), 429, "overloaded")
            late = http.post(VIDEOS, json=body | {"timeout": 0.1})
            assert late.status_code in (429, 504)
            assert len(http.get(VIDEOS).json()["data"]) == 2
