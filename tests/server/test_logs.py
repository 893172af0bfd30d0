from __future__ import annotations

import asyncio
import logging
from typing import Any

import httpx
import pytest

from stepbatch.server.logs import MAX_PROMPT, AccessLog

from .support import DrawingEngine, StubEngine, make_app

POST = ("POST", "/v1/images/generations")


def logged(
    caplog: pytest.LogCaptureFixture, engine: StubEngine, method: str, path: str, prompts: bool = False, **options: Any
) -> dict[str, Any]:
    """The fields of the line that is logged for a request."""

    async def run() -> None:
        transport = httpx.ASGITransport(AccessLog(make_app(engine), prompts), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            await client.request(method, path, **options)

    with caplog.at_level(logging.INFO, "stepbatch.access"):
        asyncio.run(run())
    (record,) = (record for record in caplog.records if record.name == "stepbatch.access")
    fields: dict[str, Any] = record.__dict__["fields"]
    return fields


def test_a_request_is_logged_with_its_answer(caplog: pytest.LogCaptureFixture) -> None:
    fields = logged(caplog, DrawingEngine(), *POST, json={"prompt": "a cat"})
    assert fields["seconds"] > 0
    assert fields["bytes"] > 100
    assert fields["timings"] == {"queue": 0.0, "encode": 0.0, "denoise": 0.0, "decode": 0.0}
    kept = {name: value for name, value in fields.items() if name not in ("seconds", "bytes", "timings")}
    assert kept == {"method": "POST", "path": "/v1/images/generations", "status": 200}


@pytest.mark.parametrize(
    ("method", "path", "expected"),
    [
        ("GET", "/v1/models/a%0Ab?c=d", ("GET", None, 404, "not_found")),
        ("GET", "/v1/models/a%1Bb", ("GET", "/v1/models/{model:path}", 404, "model_not_found")),
        ("PUT", "/health", ("PUT", "/health", 405, "method_not_allowed")),
        ("X" * 500, "/nothing", ("X" * 32, None, 404, "not_found")),
        (*POST, ("POST", "/v1/images/generations", 400, "invalid_json")),
    ],
)
def test_what_a_caller_makes_up_is_not_logged(
    caplog: pytest.LogCaptureFixture, method: str, path: str, expected: tuple[Any, ...]
) -> None:
    fields = logged(caplog, DrawingEngine(), method, path)
    assert (fields["method"], fields["path"], fields["status"], fields["code"]) == expected


def test_a_fault_of_ours_is_logged_as_what_was_answered(caplog: pytest.LogCaptureFixture) -> None:
    fields = logged(caplog, StubEngine(error=ZeroDivisionError("x")), *POST, json={"prompt": "a cat"})
    assert (fields["status"], fields["code"]) == (500, "internal_error")


def test_an_answer_to_head_has_no_bytes(caplog: pytest.LogCaptureFixture) -> None:
    assert logged(caplog, DrawingEngine(), "HEAD", "/v1/models")["bytes"] == 0


@pytest.mark.parametrize("prompts", [False, True])
def test_prompts_are_logged_only_where_that_was_asked_for(caplog: pytest.LogCaptureFixture, prompts: bool) -> None:
    body = {"prompt": "a\r\n" * 5000, "negative_prompt": "b", "n": 99}
    fields = logged(caplog, DrawingEngine(), *POST, prompts, json=body)
    assert fields["status"] == 400  # what is wrong is logged too
    expected = {"prompt": body["prompt"][:MAX_PROMPT], "negative_prompt": "b"} if prompts else {}
    assert {name: value for name, value in fields.items() if "prompt" in name} == expected
