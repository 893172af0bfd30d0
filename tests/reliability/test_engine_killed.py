"""The engine process is killed, again and again, while requests are in flight."""

from __future__ import annotations

import os
import random
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from .inside import is_own
from .record import Finding
from .serving import Served, descriptors, run_first, until, until_not_ready

FLIGHT = 32
FLAGS = ("--fake-step-ms", "10", "--dynamic-batch-max-size", "8")
LONG = 1000  # steps: longer than any of these tests
BROKEN = """
import os, sys
if "stepbatch.engine.process" in sys.orig_argv and os.path.exists({flag!r}):
    os._exit(3)
"""


@pytest.fixture
def crowd() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(FLIGHT) as threads:
        yield threads


@dataclass(frozen=True)
class Tried:
    """The server that all tests here share."""

    server: Served
    startup: float  # seconds
    descriptors: int  # that it had open then
    broken: Path  # once it is there, no engine process starts any more


@pytest.fixture(scope="module")
def tried(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tried]:
    folder, began = tmp_path_factory.mktemp("first"), time.monotonic()
    broken = folder / "broken"
    server = Served(*FLAGS, env=run_first(folder, BROKEN.format(flag=str(broken))))
    try:
        yield Tried(server, time.monotonic() - began, descriptors(server.pid), broken)
    finally:
        server.kill()


class Watch:
    """Asks ``/health`` all the time."""

    def __init__(self, server: Served) -> None:
        self.server = server
        self.answers: list[tuple[int, str]] = []  # status, and what it says of the engine
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _run(self) -> None:
        with httpx.Client(base_url=self.server.url, timeout=30) as http:
            while not self._end.wait(0.02):
                answer = http.get("/health")
                self.answers.append((answer.status_code, answer.json().get("engine", "")))


@dataclass(frozen=True)
class Kill:
    """What was seen of a kill; seconds from it on."""

    ready: float  # when the last who was told that all is ready asked for it
    noticed: float  # when somebody was told that it isn't
    back: float  # when it was ready again


def kill(server: Served) -> Kill:
    """Kill the engine process, and wait until there is another."""
    os.kill(server.engine_pid(), signal.SIGKILL)
    ready, noticed = until_not_ready(server)
    return Kill(ready, noticed, noticed + until(lambda: server.http.get("/ready").status_code == 200))


def ask(server: Served, crowd: ThreadPoolExecutor, **fields: object) -> Future[httpx.Response]:
    asking = crowd.submit(server.generate, num_inference_steps=LONG, **fields)
    until(lambda: server.metric("num_requests_running") == 1)
    return asking


def two(server: Served, answers: list[httpx.Response], seed: int) -> None:
    """Ask for a picture, and for another as soon as it is there; see that they are right."""
    for each in (seed, seed + 1):
        answer = server.generate(prompt=f"picture {each}", seed=each, num_inference_steps=3 + each % 6)
        answers.append(answer)
        assert answer.status_code == 200, answer.text
        assert answer.json()["seeds"] == [each]
        assert is_own(answer, f"picture {each}")


def test_every_request_gets_its_picture_though_the_engine_is_killed(
    tried: Tried, crowd: ThreadPoolExecutor, size: Callable[[int, int], int], note: Callable[[Finding], None]
) -> None:
    server = tried.server
    rounds, chance = size(3, 50), random.Random(1)
    flying: list[int] = []  # how many were, when the engine was killed
    kills: list[Kill] = []
    with Watch(server) as watch:
        for round_ in range(rounds):
            answers: list[httpx.Response] = []
            asking = [crowd.submit(two, server, answers, 2 * (FLIGHT * round_ + i)) for i in range(FLIGHT)]
            answered = chance.randrange(FLIGHT // 2)
            until(lambda answers=answers, answered=answered: len(answers) >= answered)
            time.sleep(chance.uniform(0.0, 0.1))  # at no moment in particular
            flying.append(min(FLIGHT, 2 * FLIGHT - len(answers)))
            kills.append(kill(server))
            for one in asking:
                one.result()
            assert len(answers) == 2 * FLIGHT
    assert statistics.median(flying) == FLIGHT
    noticed, back = max(one.noticed for one in kills), max(one.back for one in kills)
    assert max(one.ready for one in kills) < 1.0
    assert back < tried.startup + 2.0
    assert server.metric("engine_restarts_total") == rounds
    assert {status for status, _ in watch.answers} == {200}
    assert {engine for _, engine in watch.answers} == {"ready", "restarting"}
    server.disconnect()
    until(lambda: descriptors(server.pid) <= tried.descriptors + 2)
    figure = (
        f"{2 * rounds * FLIGHT:,} of {2 * rounds * FLIGHT:,} answered once, with their own picture; {min(flying)} to "
        f"{max(flying)} in flight when it was killed; /ready 503 within {noticed:.2f} s, 200 within {back:.1f} s "
        f"(start-up {tried.startup:.1f} s); /health 200 throughout"
    )
    note(Finding(1, "engine killed", f"{FLIGHT} in flight", f"kill -9, {rounds} times", figure))


def test_what_was_running_twice_is_told_to_wait(tried: Tried, crowd: ThreadPoolExecutor) -> None:
    server = tried.server
    asking = ask(server, crowd)
    kill(server)
    until(lambda: server.metric("num_requests_running") == 1)  # once more, alone
    assert not asking.done()
    began = time.monotonic()
    kill(server)
    answer = asking.result()
    assert time.monotonic() - began < 5.0
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_died")
    assert answer.headers["x-should-retry"] == "false"
    assert 1 <= int(answer.headers["retry-after"]) <= 120


def test_an_engine_that_can_not_be_started_again_is_no_secret(
    tried: Tried, crowd: ThreadPoolExecutor, note: Callable[[Finding], None]
) -> None:
    server = tried.server
    asking = ask(server, crowd)
    tried.broken.touch()
    began = time.monotonic()
    os.kill(server.engine_pid(), signal.SIGKILL)
    answer = asking.result()
    seconds = time.monotonic() - began
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_unavailable")
    assert 1 <= int(answer.headers["retry-after"]) <= 120
    for path in ("/health", "/ready"):
        assert server.http.get(path).status_code == 503
    assert server.generate().status_code == 503
    assert server.process.poll() is None
    server.signal(signal.SIGTERM)
    assert server.process.wait(10) == 0
    figure = f"503 with Retry-After after {seconds:.1f} s; /ready and /health 503 from then on"
    note(Finding(1, "engine can't be started", "1 running", "kill -9, then three failed starts", figure))
