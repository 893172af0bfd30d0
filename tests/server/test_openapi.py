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

from stepbatch.errors import REQUEST_ERRORS
from stepbatch.server.fields import EDIT_FIELDS, FIELDS, IGNORED_OPENAI, IGNORED_OTHERS
from stepbatch.server.openapi import document

from .support import RunningServer, StubEngine, call, make_app

DOCS = Path(__file__).parents[2] / "docs" / "api.md"


def test_whatever_is_sent_gets_an_answer_as_documented(server: RunningServer) -> None:
    schema: Any = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    for result in schema.get_all_operations():
        fuzz(result.ok())


def fuzz(operation: Any) -> None:
    @settings(max_examples=15, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(case=operation.as_strategy())
    def check(case: Any) -> None:
        if isinstance(case.body, dict) and "num_inference_steps" in case.body:
            case.body["num_inference_steps"] = 1  # a legal wish for a thousand steps would only take long
        if isinstance(case.body, dict) and "image" in case.body:
            case.body["image"] = [file(image())]  # else none would come further than to its decoding
        case.call_and_validate(checks=[not_a_server_error, status_code_conformance, response_schema_conformance])

    check()


def test_every_route_is_documented() -> None:
    routes: Any = make_app(StubEngine()).routes
    paths = {route.path.replace("{model:path}", "{model}") for route in routes}
    assert paths == set(document()["paths"])


def test_the_document_is_served(http: httpx.Client) -> None:
    assert http.get("/openapi.json").json() == document()


NAMES = [*FIELDS, *EDIT_FIELDS, *IGNORED_OPENAI, *IGNORED_OTHERS, *REQUEST_ERRORS, *document()["paths"]]


@pytest.mark.parametrize("name", NAMES)
def test_the_manual_has_it(name: str) -> None:
    assert f"`{name}`" in DOCS.read_text()


def test_the_manual_has_every_figure() -> None:
    text = call(make_app(StubEngine()), "GET", "/metrics").text
    names = {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")}
    for name in names:
        assert name.endswith("_created") or f"`{name}" in DOCS.read_text(), name
