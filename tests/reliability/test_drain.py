"""A server that is told to stop finishes what it has begun."""

from __future__ import annotations

import json
import signal
import socket
import sqlite3
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import httpx
import pytest

from .inside import is_own
from .record import Finding
from .serving import Served, address, listens, run_first, until, until_not_ready

FLIGHT = 16
LONG = 1000  # steps: longer than any of these tests


@pytest.fixture
def crowd() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(FLIGHT) as threads:
        yield threads


def ask(server: Served, crowd: ThreadPoolExecutor, count: int, steps: int) -> list[Future[httpx.Response]]:
    """So many requests, all of which it has taken in."""
    asking = [crowd.submit(server.generate, prompt=f"{i}", num_inference_steps=steps) for i in range(count)]
    until(lambda: server.metric("num_requests_running") + server.metric("num_requests_waiting") == count)
    return asking


def test_all_that_is_in_flight_is_finished(
    serve: Callable[..., Served],
    crowd: ThreadPoolExecutor,
    size: Callable[[int, int], int],
    note: Callable[[Finding], None],
) -> None:
    rounds, drain = size(1, 20), 30.0
    refusing: list[float] = []
    finishing: list[float] = []
    for round_ in range(rounds):
        number = signal.SIGINT if round_ % 2 else signal.SIGTERM
        server = serve("--fake-step-ms", "20", "--drain-seconds", str(drain), "--dynamic-batch-max-size", "8")
        asking = ask(server, crowd, FLIGHT, 60)
        server.signal(number)
        began = time.monotonic()
        told_ready, told_not = until_not_ready(server)
        assert told_ready < 1.0
        refusing.append(told_not)
        assert server.http.get("/health").json() == {"status": "ok", "engine": "stopping"}
        refused = server.generate()
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_unavailable")
        assert 1 <= int(refused.headers["retry-after"]) <= 120
        assert server.process.wait(drain) == 0, server.log
        finishing.append(time.monotonic() - began)
        for i, answer in enumerate(one.result() for one in asking):
            assert answer.status_code == 200, answer.text
            assert is_own(answer, f"{i}")
    figure = (
        f"{rounds * FLIGHT} of {rounds * FLIGHT} finished, exit 0 after {max(finishing):.1f} s of {drain:g}; "
        f"not ready, and new ones 503, after {max(refusing):.2f} s"
    )
    note(Finding(12, "drain", f"{FLIGHT} in flight", f"SIGTERM or SIGINT, {rounds} times", figure))


def test_a_second_signal_ends_it(
    serve: Callable[..., Served], crowd: ThreadPoolExecutor, note: Callable[[Finding], None]
) -> None:
    server = serve("--fake-step-ms", "20", "--drain-seconds", "60")
    asking = ask(server, crowd, FLIGHT, LONG)
    server.signal(signal.SIGTERM)
    until(lambda: server.http.get("/ready").status_code == 503)
    server.signal(signal.SIGTERM)
    began = time.monotonic()
    assert server.process.wait(5.0) == 1
    seconds = time.monotonic() - began
    assert all(one.exception() or one.result().status_code == 503 for one in asking)
    figure = f"exit 1 after {seconds:.1f} s"
    note(Finding(12, "a second signal", f"{FLIGHT} in flight", "SIGTERM twice", figure))


def test_a_second_signal_waits_for_no_connection_either(serve: Callable[..., Served]) -> None:
    server = serve()
    with socket.create_connection(address(server.url)) as client:
        client.sendall(b"POST /v1/images/generations HTTP/1.1\r\nhost: localhost\r\ncontent-length: 99\r\n\r\n{")
        until(lambda: server.http.get("/ready").status_code == 200)
        server.signal(signal.SIGTERM)  # nothing is in flight: it waits for the rest of the body alone
        until(lambda: not listens(server.url))
        server.signal(signal.SIGTERM)
        assert server.process.wait(5.0) == 1


def test_who_is_still_sending_is_told_so(serve: Callable[..., Served]) -> None:
    server = serve()
    with socket.create_connection(address(server.url)) as client:
        head = b"POST /v1/images/generations HTTP/1.1\r\nhost: localhost\r\nx-request-id: mine\r\n"
        client.sendall(head + b"content-length: 99\r\n\r\n{")
        until(lambda: server.http.get("/ready").status_code == 200)  # it is taken in before this
        server.signal(signal.SIGTERM)
        client.settimeout(10)
        said = b""
        while data := client.recv(1 << 16):
            said += data
    lines, _, body = said.decode().partition("\r\n\r\n")
    assert lines.startswith("HTTP/1.1 503 ")
    headers = dict(line.lower().split(": ", 1) for line in lines.split("\r\n")[1:])
    assert (headers["x-request-id"], headers["content-type"]) == ("mine", "application/json")
    assert 1 <= int(headers["retry-after"]) <= 120
    assert json.loads(body)["error"]["code"] == "engine_unavailable"
    assert server.process.wait(10) == 0
    assert "Traceback" not in server.log


SLOW_FILES = """
import sys, time
if "stepbatch" in sys.orig_argv:
    from stepbatch import video_files
    video_files.write_mp4 = lambda path, output, fps: path.write_bytes(b"begun") and time.sleep(60)
"""


def writing(serve: Callable[..., Served], folder: Path, change: str, *flags: str) -> tuple[Served, str]:
    """A server that is writing a video, which takes it a minute, and the video's id."""
    videos = ("--backend", "fake", "--log-level", "warning", "--fake-videos", "--video-dir", str(folder / "videos"))
    server = serve(*videos, *flags, env=run_first(folder, SLOW_FILES + change))
    id: str = server.http.post("/v1/videos", json={"prompt": "a cat", "num_inference_steps": 2}).json()["id"]
    until(lambda: list((folder / "videos" / "files").glob(f"{id}*")))
    return server, id


def test_a_video_that_is_written_for_too_long_is_given_up(
    serve: Callable[..., Served], tmp_path: Path, soak: bool, note: Callable[[Finding], None]
) -> None:
    change = "" if soak else "    from stepbatch.server import video_jobs\n    video_jobs.WRITING_SECONDS = 0.5\n"
    server, id = writing(serve, tmp_path, change, "--drain-seconds", "1")
    began = time.monotonic()
    server.signal(signal.SIGTERM)
    assert server.process.wait(30.0) == 0, server.log
    seconds = time.monotonic() - began
    assert seconds >= (6.0 if soak else 1.5)
    assert not list((tmp_path / "videos" / "files").iterdir())
    with closing(sqlite3.connect(tmp_path / "videos" / "videos.sqlite3")) as database:
        ((status, error),) = database.execute("SELECT status, error FROM videos WHERE id = ?", (id,))
    assert (status, json.loads(error)["code"]) == ("failed", "engine_unavailable")
    load, figure = "a video that is being written for a minute", f"exit 0 after {seconds:.1f} s, drain being 1; no file"
    note(Finding(12, "drain, video", load, "SIGTERM", figure))


def test_a_second_signal_waits_for_no_thread_either(
    serve: Callable[..., Served], tmp_path: Path, soak: bool, note: Callable[[Finding], None]
) -> None:
    hurry = "" if soak else "    from stepbatch.server import run\n    run.HURRY_SECONDS = 0.5\n"
    server, _ = writing(serve, tmp_path, hurry)
    began = time.monotonic()
    server.signal(signal.SIGTERM)
    until(lambda: not listens(server.url))
    server.signal(signal.SIGTERM)
    assert server.process.wait(15.0) == 1
    seconds = time.monotonic() - began
    if soak:
        assert seconds < 5.0
        note(
            Finding(
                12, "a second signal", "a video that is being written", "SIGTERM twice", f"exit 1 after {seconds:.1f} s"
            )
        )


def test_what_does_not_finish_in_time_is_told_so(serve: Callable[..., Served], crowd: ThreadPoolExecutor) -> None:
    server = serve("--fake-step-ms", "20", "--drain-seconds", "0.3")
    asking = ask(server, crowd, FLIGHT, LONG)
    server.signal(signal.SIGINT)
    assert server.process.wait(10) == 0
    for answer in (one.result() for one in asking):
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_unavailable")
