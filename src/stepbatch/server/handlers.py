"""Errors as answers: the one body that every refusal and failure has, whatever raised it."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match

from stepbatch.engine.admission import LONGEST_RETRY
from stepbatch.errors import InternalError, MethodNotAllowed, NotFound, PayloadTooLarge, RequestError
from stepbatch.server.logs import note

log = logging.getLogger(__name__)


def error_body(error: RequestError) -> bytes:
    """OpenAI's shape, as JSON."""
    # What callers sent may be quoted in it, lone surrogates included; those are no valid JSON text.
    clean = {name: value and value.encode("utf-8", "replace").decode() for name, value in error.fields.items()}
    return json.dumps({"error": clean}).encode()


def error_response(error: RequestError, headers: Mapping[str, str] | None = None) -> Response:
    """The answer for an error, with what clients are told about trying again."""
    response = Response(error_body(error), status_code=error.status, headers=headers, media_type="application/json")
    if error.should_retry is not None:
        response.headers["x-should-retry"] = str(error.should_retry).lower()
    if error.retry_after is not None:
        soonest = min(error.retry_after, LONGEST_RETRY - error.retry_spread)
        response.headers["retry-after"] = str(soonest + random.randint(0, error.retry_spread))
    return response


def install(app: FastAPI) -> None:
    """Answer every exception of ``app`` in the one shape."""
    app.add_exception_handler(RequestError, _request_error)
    app.add_exception_handler(HTTPException, _http_exception)
    app.add_exception_handler(Exception, _unhandled)


async def _request_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    return _answer(request, error)


async def _http_exception(request: Request, error: Exception) -> Response:
    """What the framework refuses by itself: unknown routes and methods."""
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        return _answer(request, NotFound(f"there is no {_path(request)}"))
    if error.status_code == 405:
        headers = {"allow": ", ".join(_methods(request))}
        return _answer(request, MethodNotAllowed(f"{_path(request)} has no {request.method[:32]}"), headers)
    if error.status_code == 413:
        return _answer(request, PayloadTooLarge(str(error.detail)))
    if error.status_code < 500:
        return _answer(request, RequestError(str(error.detail)))
    return _answer(request, InternalError("internal error"))


async def _unhandled(request: Request, error: Exception) -> Response:
    """A fault of ours. The framework raises it again afterwards, so that it's logged in full."""
    request_id = request.scope["state"]["request_id"]
    log.error("request %s: %s", request_id, type(error).__name__)
    message = f"internal error; the server's log has more under {request_id}"
    return _answer(request, InternalError(message), {"x-request-id": request_id})


def _answer(request: Request, error: RequestError, headers: Mapping[str, str] | None = None) -> Response:
    note(request, code=error.code)
    return error_response(error, headers)


def _path(request: Request) -> str:
    path: str = request.scope["path"]
    return path[:200]


def _methods(request: Request) -> list[str]:
    found: set[str] = set()
    app: Any = request.app
    for route in app.routes:
        match, _ = route.matches(request.scope)
        if match is not Match.NONE:
            found |= set(route.methods or ())
    return sorted(found)
