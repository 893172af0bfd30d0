import asyncio
import inspect
import json
import os
import sys
import time
from asyncio.subprocess import PIPE
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from itertools import pairwise
from pathlib import Path

import pytest
from aiohttp import web
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.bench.support import (
    GENERATIONS,
    Handler,
    VideoServer,
    at,
    draw,
    item,
    pictures_json,
    png,
    raw_server,
    send,
    serving,
    video,
)

from stepbatch.bench.load.client import Driven, Servers, drive, warm_up
from stepbatch.bench.options import TargetOptions
from stepbatch.bench.report.summary import summarize
from stepbatch.bench.results import Record
from stepbatch.demo.burst import serving as stepbatch_serving
from stepbatch.errors import OptionError, SetupError

pytestmark = pytest.mark.anyio

ROOT = Path(__file__).parents[3]
OURS = str(ROOT / "src")
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'src'}"}


@pytest.fixture(autouse=True)
async def nothing_is_left() -> AsyncIterator[None]:
    """Whatever a test does: no task of ours outlives the run."""
    yield
    coroutines = [task.get_coro() for task in asyncio.all_tasks()]
    assert [c for c in coroutines if inspect.iscoroutine(c) and c.cr_code.co_filename.startswith(OURS)] == []


def slow(seconds: float) -> tuple[Handler, list[str], list[int]]:
    """A handler that takes its time; the prompts in the order they came, and how many were there each time."""
    prompts: list[str] = []
    in_flight: list[int] = []
    now = 0

    async def handle(request: web.Request) -> web.StreamResponse:
        nonlocal now
        prompts.append((await request.json())["prompt"])
        now += 1
        in_flight.append(now)
        await asyncio.sleep(seconds)
        now -= 1
        return pictures_json(png())

    return handle, prompts, in_flight


def answering(*responses: Callable[[], web.Response]) -> tuple[Handler, list[float]]:
    """A handler that answers with these in turn, the last of them for ever; and when it was asked."""
    asked: list[float] = []

    async def handle(request: web.Request) -> web.StreamResponse:
        asked.append(time.perf_counter())
        return responses[min(len(asked), len(responses)) - 1]()

    return handle, asked


def status(code: int, message: str = "no", **headers: str) -> Callable[[], web.Response]:
    fields = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda: web.json_response({"error": {"message": message}}, status=code, headers=fields)


def fine() -> web.Response:
    return pictures_json(png())


def are_sent_in_order(records: Sequence[Record]) -> bool:
    return all(earlier.sent < later.sent for earlier, later in pairwise(records))


def outcomes(driven: Driven) -> list[str]:
    return [record.outcome for record in driven.records]


async def test_open_loop_latency_counts_from_when_a_request_should_have_been_sent() -> None:
    handle, prompts, in_flight = slow(0.05)
    async with serving(("POST", GENERATIONS, handle)) as url:
        with await send(4, at(url), times=[0.0] * 4, max_concurrency=1) as driven:
            pass
    assert max(in_flight) == 1
    assert prompts == [f"prompt {i}" for i in range(4)]
    for i, record in enumerate(driven.records):
        assert record.intended == 0.0
        assert record.latency >= 0.049 * (i + 1)  # the waits for a place are part of it
        assert record.sent >= 0.049 * i
        assert record.lag < record.sent or i == 0  # and not the client's fault


async def test_open_loop_keeps_to_its_times_however_slow_the_server_is() -> None:
    handle, prompts, in_flight = slow(0.3)
    times = [0.0, 0.02, 0.04, 0.06]
    async with serving(("POST", GENERATIONS, handle)) as url:
        with await send(4, at(url), times=times) as driven:
            pass
    assert in_flight == [1, 2, 3, 4]
    assert len(prompts) == 4
    assert [record.intended for record in driven.records] == times
    assert all(record.sent >= record.intended for record in driven.records)
    assert all(record.latency >= 0.29 for record in driven.records)
    assert are_sent_in_order(driven.records)


async def test_closed_loop_sends_when_a_place_comes_free() -> None:
    handle, prompts, in_flight = slow(0.05)
    async with serving(("POST", GENERATIONS, handle)) as url:
        with await send(6, at(url), max_concurrency=2) as driven:
            pass
    assert max(in_flight) == 2
    assert len(prompts) == 6
    assert are_sent_in_order(driven.records)
    ends = sorted(record.ended for record in driven.records)
    for record in driven.records:
        assert record.intended == 0.0 if record.index < 2 else record.intended >= ends[record.index - 2]
        assert record.latency >= 0.049
        assert record.lag == pytest.approx(record.sent - record.intended)


async def test_without_a_bound_all_should_have_been_sent_at_the_start() -> None:
    handle, prompts, in_flight = slow(0.2)
    async with serving(("POST", GENERATIONS, handle)) as url:
        ended: list[int] = []
        with await send(8, at(url), progress=ended.append) as driven:
            pass
    assert max(in_flight) == len(prompts) == 8
    assert are_sent_in_order(driven.records)
    assert {record.intended for record in driven.records} == {0.0}
    assert ended == list(range(1, 9))


async def test_a_record_tells_what_was_asked_and_an_answer_is_kept_as_it_came() -> None:
    handle, _ = answering(lambda: web.Response(text="never looked at"))
    items = [item("x", width=64, height=32, seed=3), item("y")]
    async with serving(("POST", GENERATIONS, handle)) as url:
        driven = await drive(items, None, at(url), 1, "m", [0.5, None])
    with driven:
        first, second = driven.records
        assert first.asked == items[0].asked()
        assert (first.slo_s, second.slo_s) == (0.5, None)
        assert (first.server, first.status, first.attempts) == (url, 200, 1)
        assert outcomes(driven) == ["ok", "ok"]
        assert driven.spool.read(driven.answers[1].body) == b"never looked at"


async def test_large_answers_that_come_at_the_same_time_stay_apart() -> None:
    async def handle(request: web.Request) -> web.StreamResponse:
        letter = (await request.json())["prompt"].encode()
        response = web.StreamResponse()
        await response.prepare(request)
        for _ in range(20):
            await response.write(letter * 50_000)
            await asyncio.sleep(0)
        return response

    async with serving(("POST", GENERATIONS, handle)) as url:
        with await send([item(letter) for letter in "abcdef"], at(url)) as driven:
            for index, letter in enumerate(b"abcdef"):
                assert driven.spool.read(driven.answers[index].body) == bytes([letter]) * 1_000_000


@pytest.mark.parametrize(
    ("code", "outcome"),
    [(429, "rejected"), (503, "rejected"), (408, "timeout"), (504, "timeout"), (400, "failed"), (500, "failed")],
)
async def test_what_a_status_means(code: int, outcome: str) -> None:
    handle, asked = answering(status(code, "because\n of that"))
    async with serving(("POST", GENERATIONS, handle)) as url:
        with await send(2, at(url)) as driven:
            assert outcomes(driven) == [outcome] * 2
            assert {(record.status, record.error) for record in driven.records} == {(code, "because of that")}
            assert driven.answers == {}
    assert len(asked) == 2  # by default, nothing is sent again
    summary = summarize(driven.records, driven.samples)
    assert summary.latency_mean is None
    assert summary.completed_requests == 0


async def test_a_redirection_is_no_answer() -> None:
    handle, _ = answering(lambda: web.Response(status=307, headers={"location": "/elsewhere"}))
    async with serving(("POST", GENERATIONS, handle)) as url:
        with await send(1, at(url)) as driven:
            assert driven.records[0].status == 307
            assert driven.records[0].error == "HTTP 307: redirected to /elsewhere"
            assert driven.records[0].outcome == "failed"


async def test_a_request_may_take_so_long_and_no_longer() -> None:
    handle, _, _ = slow(5.0)
    async with serving(("POST", GENERATIONS, handle)) as url:
        with await send(2, at(url, timeout=0.1)) as driven:
            assert outcomes(driven) == ["timeout"] * 2
            assert {(record.status, record.error) for record in driven.records} == {(None, "no answer within 0.1 s")}
            assert all(0.1 <= record.ended < 5 for record in driven.records)


async def test_nobody_there_is_a_failure() -> None:
    async with serving() as url:
        pass
    with await send(2, at(url)) as driven:
        assert outcomes(driven) == ["failed"] * 2
        assert driven.records[0].error == "Connection refused"


CUT = b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n" + b"x" * 500


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"\x00\x01\x02\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n",
        CUT,
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    ],
    ids=["nothing", "no-http", "half-a-head", "cut", "bad-chunk"],
)
async def test_what_is_no_whole_answer_is_a_failure(answer: bytes) -> None:
    async with raw_server(lambda number: answer) as url:
        with await send(3, at(url)) as driven:
            assert outcomes(driven) == ["failed"] * 3
            assert all(record.error for record in driven.records)


async def test_what_was_turned_away_is_sent_again_when_the_server_says() -> None:
    handle, asked = answering(status(429, retry_after="1"), status(503, retry_after_ms="20", retry_after="60"), fine)
    async with serving(("POST", GENERATIONS, handle)) as url:
        with await send(1, at(url, retries=3)) as driven:
            record = driven.records[0]
    assert (record.outcome, record.status, record.attempts) == ("ok", 200, 3)
    assert asked[1] - asked[0] >= 1.0
    assert 0.02 <= asked[2] - asked[1] < 30
    assert record.latency >= 1.0
    assert record.sent < 0.9  # the first time


async def test_the_last_answer_counts_and_the_place_is_kept() -> None:
    handle, asked = answering(status(429, retry_after_ms="50"))
    async with serving(("POST", GENERATIONS, handle)) as url:
        with await send(2, at(url, retries=2), max_concurrency=1) as driven:
            assert [(record.outcome, record.attempts) for record in driven.records] == [("rejected", 3)] * 2
            assert driven.records[1].sent >= driven.records[0].ended >= 0.1
    assert len(asked) == 6


async def test_other_failures_are_not_sent_again() -> None:
    handle, asked = answering(status(500), fine)
    async with serving(("POST", GENERATIONS, handle)) as url:
        with await send(1, at(url, retries=5)) as driven:
            assert outcomes(driven) == ["failed"]
    assert len(asked) == 1


async def test_nobody_waits_for_what_comes_too_late() -> None:
    handle, asked = answering(status(429, retry_after="60"))
    async with serving(("POST", GENERATIONS, handle)) as url:
        with await send(1, at(url, retries=5, timeout=2)) as driven:
            assert outcomes(driven) == ["rejected"]
            assert driven.records[0].ended < 2
    assert len(asked) == 1


async def test_the_load_goes_to_the_server_with_the_fewest_in_flight() -> None:
    lazy, lazy_prompts, _ = slow(0.4)
    quick, quick_prompts, _ = slow(0.01)
    async with serving(("POST", GENERATIONS, lazy)) as one, serving(("POST", GENERATIONS, quick)) as other:
        with await send(12, at(one, other), max_concurrency=2) as driven:
            by_server = Counter(record.server for record in driven.records)
    assert by_server == {one: len(lazy_prompts), other: len(quick_prompts)}
    assert by_server[other] > by_server[one]


@given(st.integers(1, 4), st.lists(st.integers(0, 9), max_size=40))
async def test_servers_differ_by_one_at_most_and_take_turns(count: int, ends: list[int]) -> None:
    servers = Servers([str(i) for i in range(count)])
    open_ones = []
    for _ in range(3 * count):
        one = servers.least()
        open_ones.append((one, one.__enter__()))
    assert [name for _, name in open_ones] == [str(i % count) for i in range(3 * count)]
    for end in ends:
        in_flight = Counter({str(i): 0 for i in range(count)})
        in_flight.update(name for _, name in open_ones)
        one = servers.least()
        name = one.__enter__()
        assert in_flight[name] == min(in_flight.values())
        open_ones.append((one, name))
        open_ones.pop(end % len(open_ones))[0].__exit__(None, None, None)


async def test_a_server_that_is_gone_does_not_get_all_requests() -> None:
    async def handle(request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(0.02)
        return fine()

    async with serving(("POST", GENERATIONS, handle)) as url:
        async with serving(("POST", GENERATIONS, handle)) as gone:
            pass
        with await send(20, at(url, gone), max_concurrency=4) as driven:
            failed = [record for record in driven.records if record.outcome == "failed"]
    assert {record.server for record in failed} == {gone}
    assert 1 <= len(failed) <= 4  # those that were under way when it was found out


async def test_headers_and_the_key_are_sent() -> None:
    seen: list[web.Request] = []

    async def handle(request: web.Request) -> web.StreamResponse:
        seen.append(request)
        return fine()

    async with serving(("POST", GENERATIONS, handle)) as url:
        with await send(1, at(url, api_key="secret", header=("X-One: 1", "X-Two: a: b"))):
            pass
    headers = seen[0].headers
    assert (headers["Authorization"], headers["X-One"], headers["X-Two"]) == ("Bearer secret", "1", "a: b")
    assert headers["Content-Type"] == "application/json"


async def test_a_client_that_stands_still_says_so() -> None:
    handle, _, _ = slow(0.01)

    async def block() -> None:
        while True:
            time.sleep(0.1)  # noqa: ASYNC251 # on purpose
            await asyncio.sleep(0.03)

    async with serving(("POST", GENERATIONS, handle)) as url:
        blocking = asyncio.create_task(block())
        with await send(40, at(url), times=[i * 0.02 for i in range(40)]) as driven:
            pass
        blocking.cancel()
    assert driven.client.lag_p99 > 0.03
    assert driven.client.lag_max >= driven.client.lag_p99
    assert driven.client.loop_lag_p99 > 0.03
    assert driven.client.bottleneck.startswith("it sent requests late")


async def test_a_client_without_connections_says_so() -> None:
    handle, _, _ = slow(0.5)
    script = (
        "import asyncio, resource, sys\n"
        "from tests.bench.support import *\n"
        "async def main():\n"
        "    resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))\n"
        "    with await send(60, at(sys.argv[1])) as driven:\n"
        "        print({(r.outcome, r.error) for r in driven.records if r.outcome != 'ok'}, driven.client.bottleneck)\n"
        "asyncio.run(main())\n"
    )
    async with serving(("POST", GENERATIONS, handle)) as url:
        command = [sys.executable, "-c", script, url]
        process = await asyncio.create_subprocess_exec(*command, stdout=PIPE, cwd=ROOT, env=ENVIRONMENT)
        said, _ = await process.communicate()
    assert said.decode().startswith("{('failed', 'Too many open files')} it could open no more connections")


async def test_a_full_disk_ends_the_run_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(**_: object) -> object:
        return open("/dev/full", "wb+", buffering=0)

    monkeypatch.setattr("tempfile.TemporaryFile", full)
    async with serving(("POST", GENERATIONS, draw)) as url:
        with pytest.raises(SetupError, match=r"can't keep answers in a temporary file .* No space left on device"):
            await send(5, at(url))


async def test_what_can_not_be_sent_is_refused_before_the_start() -> None:
    with pytest.raises(OptionError, match="--api edits"):
        await send(1, at("http://127.0.0.1:9", api="edits"))
    with pytest.raises(OptionError, match="--base-url"):
        await send(1, at("127.0.0.1:9"))


async def test_a_run_can_be_stopped_and_tells_what_came_by_then() -> None:
    quick, _, _ = slow(0.02)
    stop = asyncio.Event()
    async with serving(("POST", GENERATIONS, quick)) as url:
        enough = {3: stop.set}
        driven = await send(
            100, at(url), max_concurrency=1, stop=stop, progress=lambda ended: enough.get(ended, lambda: None)()
        )
    with driven:
        assert 3 <= len(driven.records) < 100
        assert set(outcomes(driven)) == {"ok"}


async def test_a_cancelled_run_leaves_nothing_behind() -> None:
    handle, prompts, _ = slow(60.0)
    async with serving(("POST", GENERATIONS, handle)) as url:
        task = asyncio.create_task(send(5, at(url), max_concurrency=3))
        while len(prompts) < 3:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


async def test_a_video_is_done_when_it_is_seen_to_be_made() -> None:
    server = VideoServer(video(), looks=3)
    server.busy = 2  # looks that are turned away: nothing is known then
    server.more = {"inference_time_s": 1.5}
    wanted = item("a video", task="text-to-video", width=32, height=16, num_frames=5, extra={"seconds": "4"})
    async with serving(*server.routes()) as url:
        with await send([wanted], at(url, poll_interval=0.05)) as driven:
            record, answer = driven.records[0], driven.answers[0]
            assert driven.spool.read(answer.body) == server.content
            assert json.loads(answer.told)["inference_time_s"] == 1.5
    assert record.outcome == "ok"
    assert record.latency >= 5 * 0.05
    assert server.asked == [{"model": "m", "prompt": "a video", "size": "32x16", "num_frames": 5, "seconds": "4"}]


async def test_fetching_a_video_is_in_no_latency() -> None:
    server = VideoServer(video(), looks=1)

    async def fetch(request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(0.5)
        return web.Response(body=b"late")

    routes = [*server.routes()[:2], ("GET", "/v1/videos/{id}/content", fetch)]
    async with serving(*routes) as url:
        wanted = [item(task="text-to-video")] * 2
        with await send(wanted, at(url, poll_interval=0.01), max_concurrency=1) as driven:
            first, second = driven.records
    assert second.intended - first.ended >= 0.49  # the place was kept
    assert first.latency == pytest.approx(first.ended)


@pytest.mark.parametrize(("end", "looks"), [("failed", 1), ("cancelled", 2)])
async def test_a_video_that_fails_is_a_failure(end: str, looks: int) -> None:
    server = VideoServer(b"", looks, end)
    server.more = {"error": {"code": "x", "message": "out of memory"}} if end == "failed" else {}
    async with serving(*server.routes()) as url:
        with await send([item(task="text-to-video")], at(url, poll_interval=0.01)) as driven:
            record = driven.records[0]
    assert record.outcome == "failed"
    assert record.error == ("out of memory" if end == "failed" else "the video is cancelled")


async def test_a_video_that_can_not_be_fetched_is_a_failure() -> None:
    server = VideoServer(b"gone", looks=1)
    server.content_status = 404
    async with serving(*server.routes()) as url:
        with await send([item(task="text-to-video")], at(url, poll_interval=0.01)) as driven:
            assert (driven.records[0].outcome, driven.records[0].status) == ("failed", 404)
            assert driven.records[0].error == "its content: gone"


async def test_a_video_that_is_never_made_times_out() -> None:
    server = VideoServer(b"", looks=10**9)
    async with serving(*server.routes()) as url:
        with await send([item(task="text-to-video")], at(url, poll_interval=0.01, timeout=0.2)) as driven:
            assert outcomes(driven) == ["timeout"]


@pytest.mark.parametrize("told", ["[]", "{}", '{"id": 3, "status": "queued"}', "<html>"])
async def test_what_is_no_state_of_a_video_is_a_failure(told: str) -> None:
    handle, _ = answering(lambda: web.Response(text=told))
    async with serving(("POST", "/v1/videos", handle)) as url:
        with await send([item(task="text-to-video")], at(url)) as driven:
            assert driven.records[0].error == "the answer has no id or status of a video"
            assert outcomes(driven) == ["failed"]


async def test_warm_up_goes_one_by_one_to_every_server() -> None:
    one, one_prompts, one_in_flight = slow(0.02)
    other, other_prompts, _ = slow(0.02)
    async with serving(("POST", GENERATIONS, one)) as first, serving(("POST", GENERATIONS, other)) as second:
        records = await warm_up([item("a")], at(first, second), "m")
        assert [record.server for record in records] == [first, second]
        assert (one_prompts, other_prompts) == (["a"], ["a"])
        records = await warm_up([item(name) for name in "abc"], at(first), "m")
        assert max(one_in_flight) == 1
        assert [record.outcome for record in records] == ["ok"] * 3
        assert all(record.latency >= 0.019 for record in records)
        assert await warm_up([], at(first), "m") == []


BODY = b'{"data": [{"b64_json": ""}]}'
HEAD = b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n%s\r\n"
ANSWERS = st.one_of(
    st.binary(max_size=60),
    st.builds(
        lambda code, length, header, body: HEAD % (code, length, header) + body,
        st.sampled_from([200, 200, 204, 301, 400, 408, 429, 500, 503, 504, 999]),
        st.sampled_from([0, len(BODY), len(BODY) + 5, 3]),
        st.sampled_from(
            [b"", b"Retry-After: 0\r\n", b"Retry-After: soon\r\n", b"Content-Encoding: gzip\r\n", b"a b\r\n"]
        ),
        st.sampled_from([b"", BODY, b"\xff" * len(BODY), BODY[:3]]),
    ),
    st.just(b"HTTP/1.1 100 Continue\r\n\r\n"),
)


@settings(max_examples=10)
@given(
    answers=st.lists(ANSWERS, min_size=1, max_size=6),
    count=st.integers(0, 12),
    cap=st.integers(0, 3),
    is_open=st.booleans(),
    retries=st.integers(0, 2),
)
async def test_every_request_ends_exactly_once_whatever_the_server_does(
    answers: list[bytes], count: int, cap: int, is_open: bool, retries: int
) -> None:
    times = [0.001 * i for i in range(count)] if is_open else None
    ended: list[int] = []
    async with raw_server(lambda number: answers[number % len(answers)]) as url:
        target = at(url, retries=retries, timeout=0.15)
        with await send(count, target, times, cap, progress=ended.append) as driven:
            check(driven.records, count, times)
            assert set(driven.answers) == {record.index for record in driven.records if record.outcome == "ok"}
    assert ended == list(range(1, count + 1))


def check(records: list[Record], count: int, times: list[float] | None) -> None:
    assert [record.index for record in records] == list(range(count))
    for record in records:
        assert record.intended <= record.sent <= record.ended
        assert 0 <= record.lag <= record.sent - record.intended + 1e-9
        assert times is None or record.intended == times[record.index]
        assert (record.error == "") == (record.outcome == "ok")
        assert record.attempts >= 1


async def test_a_real_server_is_driven_and_says_what_it_did(tmp_path: Path) -> None:
    with stepbatch_serving(["--backend", "fake", "--fake-step-ms", "20"], tmp_path / "log") as server:
        target = TargetOptions(host=server.host, port=server.port)
        items = [item(f"prompt {i}", width=64, height=32, num_inference_steps=4, seed=i) for i in range(6)]
        with await drive(items, None, target, 3, "fake", [None] * 6, watch_interval=0.05) as driven:
            assert outcomes(driven) == ["ok"] * 6
            summary = summarize(driven.records, driven.samples)
    assert summary.jobs_per_step is not None
    assert 1 <= summary.jobs_per_step <= 3
    assert max(sample.running or 0 for sample in driven.samples) >= 1


async def test_ctrl_c_prints_nothing_of_asyncio() -> None:
    script = (
        "import asyncio, os, signal\n"
        "from tests.bench.support import *\n"
        "async def handle(request):\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    await asyncio.sleep(60)\n"
        "async def main():\n"
        "    async with serving(('POST', GENERATIONS, handle)) as url:\n"
        "        await send(5, at(url))\n"
        "try:\n"
        "    asyncio.run(main())\n"
        "except KeyboardInterrupt:\n"
        "    print('interrupted')\n"
    )
    command = [sys.executable, "-W", "default::ResourceWarning", "-c", script]
    process = await asyncio.create_subprocess_exec(*command, stdout=PIPE, stderr=PIPE, cwd=ROOT, env=ENVIRONMENT)
    said, warned = await process.communicate()
    assert said == b"interrupted\n"
    assert warned == b""
