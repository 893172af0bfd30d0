"""Promise 10: whatever is sent gets an answer of the one shape, which says nothing of the server's insides, or none."""

from __future__ import annotations

import http.client
import json
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import requests
from hypothesis import HealthCheck, Phase, given, settings
from tests.pictures import file, image

import stepbatch
from stepbatch.config import LimitsConfig
from stepbatch.server.fields import EDITS, GENERATIONS, IGNORED_OPENAI, IGNORED_OTHERS, ROUTES, VIDEOS
from stepbatch.server.openapi import document

from .hostile import Attacker, Hostile, send
from .record import Finding
from .serving import Served, descriptors

KINDS = {"pictures": (GENERATIONS, EDITS, "image"), "videos": (VIDEOS, VIDEOS, "input_reference")}
SETTLE_SECONDS, STEADY = 30.0, 10
HALF_LATE = 0.05  # seconds that need no second look
INSIDES = re.compile(  # what no answer may have: places of this installation, tracebacks, addresses of objects
    "|".join(
        [
            *(re.escape(f"{path}/") for path in (Path(stepbatch.__file__).parents[1], sys.prefix, Path.home())),
            r"Traceback|File \\?\"|site-packages|\.py\b|line \d+, in|\b0x[0-9a-f]{6,}|object at ",
        ]
    )
)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def server(kind: str, tmp_path: Path) -> Iterator[Served]:
    """A server whose temporary and other files are all in one folder."""
    flags = ["--fake-videos", "--video-dir", str(tmp_path / "videos")] if kind == "videos" else []
    (tmp_path / "tmp").mkdir()
    server = Served("--fake-step-ms", "1", *flags, env={"TMPDIR": str(tmp_path / "tmp")})
    yield server
    server.kill()


class Asker:
    """Sends requests and holds every answer against what is promised of all.

    Args:
        looks: How often it asks at most, where the loop was late: a busy machine is to blame for once, but not always.
    """

    def __init__(self, server: Served, looks: int) -> None:
        self.server = server
        self.looks = looks
        self.statuses = Counter[int]()  # 0 where the connection was closed without an answer
        self.worst = (0.0, "")  # seconds that a request held up the event loop, and which

    def generated(self, count: int) -> None:
        """Send requests that are made from the OpenAPI document, right ones and wrong ones."""
        import schemathesis  # here, because it takes a second or two

        schema: Any = schemathesis.openapi.from_dict(document(LimitsConfig()))
        operations = [result.ok() for result in schema.get_all_operations()]
        with requests.Session() as session:
            for operation in operations:
                self._generate(operation, session, max(1, count // len(operations)))

    def made_up(self, kind: str, count: int) -> None:
        """Send requests that are wrong on purpose, each on a connection of its own."""
        route, form_route, name = KINDS[kind]
        attacker = Attacker(7, route, form_route, name, [*ROUTES[form_route], *IGNORED_OPENAI, *IGNORED_OTHERS])
        for number in range(count):
            hostile = attacker.next()
            where = f"{number}: {hostile.kind}: {hostile.data[:300]!r}"
            self._watch(where, partial(self._send, where, hostile))

    def _generate(self, operation: Any, session: requests.Session, count: int) -> None:
        phases, checks = [Phase.generate], list(HealthCheck)

        @settings(
            max_examples=count, deadline=None, derandomize=True, database=None, phases=phases,
            suppress_health_check=checks,
        )  # fmt: skip
        @given(case=operation.as_strategy())
        def ask(case: Any) -> None:
            modest(case.body)
            self._watch(f"{operation.path}: {case.body!r:.300}", partial(self._call, case, session))

        ask()

    def _call(self, case: Any, session: requests.Session) -> None:
        answer = case.call(base_url=self.server.url, session=session)
        headers = {name: values[0] for name, values in answer.headers.items()}
        check(str(case.operation.path), answer.status_code, headers, answer.content)
        self.statuses[answer.status_code] += 1

    def _send(self, where: str, hostile: Hostile) -> None:
        answers = send(int(self.server.url.rpartition(":")[2]), hostile)
        assert answers or not hostile.whole, where
        for answer, body in answers:
            check(where, answer.status, answer.headers, body, hostile.method == "HEAD")
        self.statuses[answers[-1][0].status if answers else 0] += 1

    def _watch(self, where: str, ask: Callable[[], None]) -> None:
        ask()
        late = self.server.metric("event_loop_lag_seconds")
        for _ in range(1, self.looks):
            if late < HALF_LATE:
                break
            ask()
            late = min(late, self.server.metric("event_loop_lag_seconds"))
        self.worst = max(self.worst, (late, where))


def test_whatever_is_sent(
    kind: str,
    server: Served,
    tmp_path: Path,
    size: Callable[[int, int], int],
    soak: bool,
    note: Callable[[Finding], None],
) -> None:
    count = size(*{"pictures": (150, 7000), "videos": (80, 4700)}[kind])
    valid = {"prompt": "a cat", "size": "16x16"}
    for _ in range(3):
        assert server.http.post(KINDS[kind][0], json=valid).status_code == 200
    forget_videos(server, kind)
    before, asker = settled(server, tmp_path), Asker(server, looks=size(1, 20))
    if soak:  # the short form is tests/server/test_openapi.py's
        asker.generated(count // 3)
    asker.made_up(kind, count - count // 3 if soak else count)
    forget_videos(server, kind)
    assert settled(server, tmp_path) == before
    assert server.metric("engine_restarts_total") == 0
    assert server.http.post(KINDS[kind][0], json=valid).status_code == 200
    assert server.log == ""  # no exception, nor a warning that any client can cause
    assert asker.worst[0] < (0.1 if soak else 5.0), asker.worst
    found = f"no 5xx, nothing leaked; event loop at most {1000 * asker.worst[0]:.0f} ms late"
    answers = ", ".join(f"{number:,} x {status or 'closed'}" for status, number in sorted(asker.statuses.items()))
    note(Finding(10, f"fuzz, {kind}", f"{asker.statuses.total():,} requests", answers, found))


def modest(body: Any) -> None:
    """A legal wish for much would only take long."""
    if not isinstance(body, dict):
        return
    body |= {"num_inference_steps": 1, "size": "16x16"}
    for name in ("timeout", "width", "height", "n", "num_frames", "seconds"):
        body.pop(name, None)
    for name in {"image", "input_reference"} & body.keys():
        body[name] = [file(image())] if name == "image" else file(image())


def settled(server: Served, folder: Path) -> tuple[float, int, list[str]]:
    """Tasks, descriptors and files, once they stay the same."""
    found: list[tuple[float, int, list[str]]] = []
    deadline = time.monotonic() + SETTLE_SECONDS
    while time.monotonic() < deadline and (len(found) < STEADY or found[-STEADY:] != [found[-1]] * STEADY):
        files = sorted(str(path) for path in folder.rglob("*"))
        found.append((server.metric("event_loop_tasks"), descriptors(server.pid), files))
        time.sleep(0.05)
    return found[-1]


def check(
    where: str,
    status: int,
    headers: http.client.HTTPMessage | Mapping[str, str],
    body: bytes,
    head: bool = False,
) -> None:
    """Hold an answer against what is promised of all."""
    text = body.decode()
    assert headers["x-request-id"], where
    if "/v1/model_info" not in where:
        assert not INSIDES.search(text), (where, text)
    if status == 200 or status == 206:
        return
    assert headers["content-type"] == "application/json", (where, text)
    assert 400 <= status < 500 or '"deadline_exceeded"' in text, (where, status, text)
    if head:
        return
    assert len(body) < 2000, where
    error = json.loads(text)
    assert set(error) == {"error"}, (where, text)
    assert set(error["error"]) == {"message", "type", "param", "code"}, (where, text)


def forget_videos(server: Served, kind: str) -> None:
    if kind != "videos":
        return
    deadline = time.monotonic() + SETTLE_SECONDS
    while time.monotonic() < deadline:
        ids = [video["id"] for video in server.http.get(VIDEOS, params={"limit": 100}).json()["data"]]
        for id in ids:
            server.http.delete(f"{VIDEOS}/{id}")
        if not ids:
            return
    raise AssertionError("there are always more videos")
