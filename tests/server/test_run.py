"""Whole runs of the server in a process of its own."""

from __future__ import annotations

import json
import re
import resource
import signal
import socket
import sqlite3
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.forked import Forked

from stepbatch.errors import SetupError
from stepbatch.server.run import MOST_DESCRIPTORS, _allow_descriptors, bind

from .support import RunningServer, within

SCRIPT = """
import sys, warnings
from stepbatch.config import EngineConfig, HttpConfig, ModelConfig, ServerConfig, VideosConfig
from stepbatch.server.run import run_server
warnings.simplefilter("error")
drain, step, folder = float(sys.argv[1]), float(sys.argv[2]), sys.argv[3]
server = ServerConfig(http=HttpConfig(port=0, drain_seconds=drain), videos=VideosConfig(video_dir=folder))
model = ModelConfig(backend="fake", fake_step_ms=step, fake_videos=True)
sys.exit(run_server(server, EngineConfig(model=model)))
"""


class Run:
    """A server process and its address; its videos are in ``videos`` in a folder."""

    def __init__(self, drain: float, step_ms: float, folder: Path) -> None:
        command = [sys.executable, "-c", SCRIPT, str(drain), str(step_ms), str(folder / "videos")]
        self.log, out = folder / f"{time.monotonic_ns()}.log", folder / f"{time.monotonic_ns()}.out"
        self.process = Forked(command, self.log, out)
        assert within(60, lambda: self.process.poll() is not None or "\n" in out.read_text())
        self.line = out.read_text()
        self.url = (self.line.split() or [""])[-1]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    """Starts servers of videos that share a folder."""
    runs: list[Run] = []

    def start(drain: float = 20.0, step_ms: float = 20.0) -> Run:
        runs.append(Run(drain, step_ms, tmp_path))
        return runs[-1]

    yield start
    for run in runs:
        run.process.kill()


def ask(run: Run, steps: int, until: str = "in_progress") -> str:
    """Ask for a video and wait until it is so far; its id."""
    id: str = httpx.post(f"{run.url}/v1/videos", json={"prompt": "a cat", "num_inference_steps": steps}).json()["id"]
    assert within(20, lambda: look(run, id)["status"] == until)
    return id


def look(run: Run, id: str) -> dict[str, Any]:
    video: dict[str, Any] = httpx.get(f"{run.url}/v1/videos/{id}").json()
    return video


def test_a_server_that_is_killed_leaves_what_is_made_and_fails_the_rest(start: Callable[..., Run]) -> None:
    run, other = start(), start()
    assert run.line.startswith("stepbatch serves fake on http://127.0.0.1:")
    made, running, theirs = ask(run, 1, "completed"), ask(run, 1000), ask(other, 100)
    content = httpx.get(f"{run.url}/v1/videos/{made}/content").content
    run.process.kill()
    run.process.wait()
    assert look(other, running)["error"]["code"] == "server_died"  # seen by who is left
    run = start()
    assert look(run, made)["status"] == "completed"
    assert httpx.get(f"{run.url}/v1/videos/{made}/content").content == content
    failed = look(run, running)
    assert (failed["status"], failed["error"]["code"]) == ("failed", "server_died")
    assert httpx.get(f"{run.url}/v1/videos/{running}/content").status_code == 404
    assert within(20, lambda: look(run, theirs)["status"] == "completed")  # the other's life went on
    listed = httpx.get(f"{run.url}/v1/videos").json()["data"]
    assert [video["id"] for video in listed] == [theirs, running, made]


def test_a_signal_lets_videos_finish(start: Callable[..., Run]) -> None:
    run = start()
    id = ask(run, 100)
    run.process.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    refused = httpx.post(f"{run.url}/v1/videos", json={"prompt": "a dog"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_unavailable")
    assert run.process.wait(20) == 0
    run = start()
    assert look(run, id)["status"] == "completed"
    assert httpx.get(f"{run.url}/v1/videos/{id}/content").status_code == 200


def test_a_video_that_does_not_finish_in_time_has_failed(start: Callable[..., Run], tmp_path: Path) -> None:
    run = start(drain=0.2)
    id = ask(run, 1000)
    run.process.send_signal(signal.SIGTERM)
    assert run.process.wait(5) == 0
    database = sqlite3.connect(tmp_path / "videos" / "videos.sqlite3")
    ((status, error),) = database.execute("SELECT status, error FROM videos WHERE id = ?", (id,))
    database.close()
    assert (status, json.loads(error)["code"]) == ("failed", "engine_unavailable")


def test_a_second_signal_leaves_it_to_the_next_server(start: Callable[..., Run]) -> None:
    run = start(drain=60.0)
    id = ask(run, 1000)
    for _ in range(2):
        run.process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
    assert run.process.wait(5) == 1
    assert look(start(), id)["status"] == "failed"


def test_a_folder_that_can_not_be_used_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "videos").touch()
    run = Run(1.0, 1.0, tmp_path)
    assert run.process.wait() == 1
    assert "SetupError: --video-dir: can't keep videos in" in run.log.read_text()


def test_a_port_in_use_is_one_clear_line(server: RunningServer) -> None:
    port = int(server.url.rsplit(":", 1)[1])
    with pytest.raises(SetupError, match=f"can't listen on 127.0.0.1:{port}: the port is in use"):
        bind("127.0.0.1", port)


@pytest.mark.parametrize("host", ["256.0.0.1", "a..b", "x" * 64])
def test_an_unknown_host_is_one_clear_line(host: str) -> None:
    with pytest.raises(SetupError, match=rf"can't listen on {re.escape(host)}:1: "):
        bind(host, 1)


@pytest.mark.parametrize(
    ("soft", "hard", "wanted"),
    [(1024, 1 << 20, MOST_DESCRIPTORS), (1024, 4096, 4096), (1024, resource.RLIM_INFINITY, MOST_DESCRIPTORS)],
)
def test_descriptors_are_had_for_those_who_are_refused_too(
    soft: int, hard: int, wanted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    now: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (soft, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda kind, limits: now.append(limits))
    _allow_descriptors(2000)
    assert now == [(wanted, hard)]


def test_a_port_can_be_taken_again_at_once() -> None:
    with bind("127.0.0.1", 0) as first:
        first.listen()
        address = first.getsockname()
        with socket.create_connection(address) as connection:
            peer, _ = first.accept()
            peer.close()
            connection.recv(1)
    with bind(*address) as again:
        assert again.getsockname() == address
