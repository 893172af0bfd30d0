"""Promise 16: callers add no time series, forge no line of the log, and leave nothing in it that they shouldn't."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from .record import Finding
from .serving import Served

HOSTILE = "a\r\n\x1b[2J\x1b[31m{}\u2028\x00" * 3
KEY, WRONG_KEY, PROMPT = "sk-a-key-that-is-in-no-log", "sk-another-one", "an ordinary but private wish"
METHODS = ("GET", "POST", "PUT", "DELETE", "HEAD", "PATCH", "OPTIONS", "TRACE", "BREW")
ROUTES = (
    "/v1/models/{}",
    "/v1/videos/{}",
    "/v1/videos/{}/content",
    "/v1/files/{}",
    "/health",
    "/ready",
    "/{}",
    "/v1/{}",
)


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    """One that logs all that it can, as JSON."""
    server = Served(
        *("--backend", "fake", "--fake-step-ms", "1", "--fair-shares"),
        *("--log-format", "json", "--log-level", "debug", "--log-prompts"),
    )
    yield server
    server.kill()


@pytest.fixture(scope="module")
def private() -> Iterator[Served]:
    """One with a key, and the usual log, but all levels of it."""
    server = Served("--backend", "fake", "--log-level", "debug", env={"STEPBATCH_API_KEY": f"me={KEY}"})
    yield server
    server.kill()


def lines(server: Served) -> list[dict[str, Any]]:
    """Its log."""
    assert server.log.isascii()
    return [json.loads(line) for line in server.log.removesuffix("\n").split("\n")]


def within(seconds: float, condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


def series(server: Served) -> set[str]:
    """The time series that it has."""
    text = server.http.get("/metrics").text
    return {line.rpartition(" ")[0] for line in text.splitlines() if not line.startswith("#")}


def test_no_caller_adds_a_time_series(
    server: Served, size: Callable[[int, int], int], note: Callable[[Finding], None]
) -> None:
    before = series(server)
    chance, count = random.Random(16), size(300, 10_000)
    for number in range(count):
        word = f"{chance.randbytes(8).hex()}%0D%0A{chance.choice(('', '%22', '/'))}"
        headers = {"x-request-id": word, "user-agent": word, "x-forwarded-for": word}
        if number % 3 == 0:
            fields = {"prompt": f"a {word}", "user": word, "model": word}
            fields.pop(chance.choice(("model", "model", "user", "prompt")))
            server.http.post(
                "/v1/images/generations", json={**fields, "size": "16x16", "num_inference_steps": 1}, headers=headers
            )
        else:
            route = chance.choice(ROUTES).format(word)
            server.http.request(chance.choice(METHODS), f"{route}?{word}={word}", headers=headers)
    assert series(server) == before
    found = f"{len(before)} time series before and after"
    note(Finding(16, "metrics", f"{count:,} requests", "random models, prompts, users, ids, paths, methods", found))


def test_whatever_is_asked_for_is_one_line_of_json(server: Served, note: Callable[[Finding], None]) -> None:
    sent = {
        "short": HOSTILE,
        "long": HOSTILE * 200,
        "1 MB": "\r\n" * 250_000,  # of JSON: each is four bytes
        "fails": "[raise-denoise]\r\n" + HOSTILE,
    }
    statuses = {}
    for id, prompt in sent.items():
        body = {"prompt": prompt, "num_inference_steps": 1, "size": "16x16"}
        statuses[id] = server.http.post("/v1/images/generations", json=body, headers={"x-request-id": id}).status_code
    server.http.get("/v1/models/%1b[31mforged", headers={"x-request-id": "path"})
    server.http.get("/%1b[31m", headers={"x-request-id": 'odd" id\\'})
    assert within(10, lambda: json.dumps('odd" id\\') in server.log)  # a line follows its answer
    logged = lines(server)
    answered = {line["request_id"]: line for line in logged if line["logger"] == "stepbatch.access"}
    for id, prompt in sent.items():
        assert (answered[id]["status"], answered[id]["prompt"]) == (statuses[id], prompt[:2000])
    assert statuses == {"short": 200, "long": 200, "1 MB": 400, "fails": 500}
    assert set(answered["short"]["timings"]) == {"queue", "encode", "denoise", "decode"}
    assert answered["path"]["path"] == "/v1/models/{model:path}"
    assert answered['odd" id\\']["path"] is None
    for line in answered.values():
        assert line["method"]
        assert line["seconds"] >= 0
        assert line["bytes"] >= 0
    (failed,) = (line for line in logged if "exception" in line)
    assert (failed["process"], failed["level"]) == ("engine", "ERROR")
    assert "asked to by [raise-denoise]" in failed["exception"]
    assert all({"time", "level", "logger", "message", "process"} <= line.keys() for line in logged)
    found = "one JSON object a line, 2,000 characters of a prompt at most; no path as it was written"
    note(Finding(16, "log, JSON", f"{len(logged):,} lines", "prompts of CR, LF, ANSI escapes, 1 MB", found))


def test_neither_prompts_nor_keys_are_in_the_log(private: Served, note: Callable[[Finding], None]) -> None:
    fields = {"prompt": PROMPT, "negative_prompt": PROMPT, "num_inference_steps": 1, "size": "16x16"}
    told = []
    for key in (KEY, WRONG_KEY, f"{KEY}x"):
        for headers in ({"authorization": f"Bearer {key}"}, {"authorization": key}, {"x-api-key": key, "cookie": key}):
            for body in (fields, {**fields, "prompt": f"{PROMPT} [raise-denoise]"}, {**fields, "promt": 1}):
                answer = private.http.post("/v1/images/generations", json=body, headers=headers)
                told.append((answer.status_code, answer.text))
            for path in (
                f"/{key}",
                f"/health?api_key={key}",
                f"/v1/models/{PROMPT}?key={key}",
                "/metrics",
                "/v1/models",
            ):
                answer = private.http.get(path, headers=headers)
                told.append((answer.status_code, answer.text.replace(f"there is no /{key}", "")))
    assert {status for status, _ in told} >= {200, 400, 401, 404, 500}
    for text in (*(text for _, text in told), private.log):
        assert not any(secret in text for secret in (KEY, WRONG_KEY))
    assert PROMPT not in private.log
    assert within(10, lambda: private.log.count("stepbatch.access: request") == len(told))
    assert all(line.isprintable() for line in private.log.removesuffix("\n").split("\n"))
    found = "neither prompts nor keys are in the log, or in an answer"
    note(Finding(16, "log, secrets", f"{len(told)} requests, --log-level debug", "right and wrong keys", found))
