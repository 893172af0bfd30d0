from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import response_schema_conformance, status_code_conformance
from tests.pictures import file, image

from stepbatch.config import LimitsConfig
from stepbatch.errors import REQUEST_ERRORS
from stepbatch.server.fields import IGNORED_OPENAI, IGNORED_OTHERS, ROUTES
from stepbatch.server.openapi import document

from .support import RunningServer, StubEngine, call, make_app, within

DOCS = Path(__file__).parents[2] / "docs" / "api.md"


@pytest.mark.parametrize("name", ["server", "video_server"])
def test_whatever_is_sent_gets_an_answer_as_documented(name: str, request: pytest.FixtureRequest) -> None:
    server: RunningServer = request.getfixturevalue(name)
    schema: Any = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    operations = [result.ok() for result in schema.get_all_operations()]
    assert {operation.path for operation in operations} == set(document(LimitsConfig())["paths"]) - {"/openapi.json"}
    for operation in operations:
        fuzz(operation)


def test_a_video_that_has_ended_is_as_documented(video_server: RunningServer) -> None:
    videos = f"{video_server.url}/v1/videos"
    ids = {}
    for prompt, status in (("a cat", "completed"), ("[nan]", "failed")):
        ids[status] = httpx.post(videos, json={"prompt": prompt, "num_inference_steps": 1}).json()["id"]
        assert within(10, lambda: httpx.get(f"{videos}/{ids[status]}").json()["status"] == status)  # noqa: B023
    schema: Any = schemathesis.openapi.from_url(f"{video_server.url}/openapi.json")
    checks = [status_code_conformance, response_schema_conformance]
    for path in ("/v1/videos/{video_id}", "/v1/videos/{video_id}/content"):
        for status, id in ids.items():
            answer = schema[path]["GET"].Case(path_parameters={"video_id": id}).call_and_validate(checks=checks)
            assert answer.status_code == (404 if path.endswith("content") and status == "failed" else 200)
    schema["/v1/videos"]["GET"].Case(query={"limit": 2}).call_and_validate(checks=checks)


def fuzz(operation: Any) -> None:
    @settings(max_examples=10, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(case=operation.as_strategy())
    def check(case: Any) -> None:
        if isinstance(case.body, dict) and "num_inference_steps" in case.body:
            case.body["num_inference_steps"] = 1  # a legal wish for a thousand steps would only take long
        if isinstance(case.body, dict):
            case.body.pop("timeout", None)  # whoever has no time gets 504, and rightly
        if isinstance(case.body, dict) and "image" in case.body:
            case.body["image"] = [file(image())]  # else none would come further than to its decoding
        if isinstance(case.body, dict) and "input_reference" in case.body and case.media_type != "application/json":
            case.body["input_reference"] = file(image())
        checks = [not_a_server_error, status_code_conformance, response_schema_conformance]
        assert case.call_and_validate(checks=checks).status_code < 500

    check()


def test_every_route_is_documented() -> None:
    routes: Any = make_app(StubEngine(), docs=True).routes
    paths = {route.path.replace("{model:path}", "{model}") for route in routes}
    assert paths == set(document(LimitsConfig())["paths"])


def test_the_document_is_served(http: httpx.Client) -> None:
    assert http.get("/openapi.json").json() == document(LimitsConfig())


FIELDS = dict.fromkeys(name for fields in ROUTES.values() for name in fields)
NAMES = [*FIELDS, *IGNORED_OPENAI, *IGNORED_OTHERS, *REQUEST_ERRORS, *document(LimitsConfig())["paths"]]


@pytest.mark.parametrize("name", NAMES)
def test_the_manual_has_it(name: str) -> None:
    assert f"`{name}`" in DOCS.read_text()


def test_the_manual_has_every_figure() -> None:
    text = call(make_app(StubEngine()), "GET", "/metrics").text
    names = {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")}
    for name in names:
        assert name.endswith("_created") or f"`{name}" in DOCS.read_text(), name
