"""A line in the log for every request: what was asked for, what was answered, and how long it took."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from stepbatch.logs import event

MAX_PROMPT = 2000  # characters of a prompt that are logged
MAX_METHOD = 32  # likewise, of a method: those that there are have seven at most

log = logging.getLogger("stepbatch.access")


def note(request: Request, **fields: Any) -> None:
    """Add fields to the line that is logged once the request has been answered."""
    request.scope["state"].setdefault("logged", {}).update(fields)


def note_prompt(request: Request, values: Mapping[str, Any]) -> None:
    """Note the prompts among a request's fields, right or wrong; they are logged only where that was asked for."""
    prompts = {name: values.get(name) for name in ("prompt", "negative_prompt")}
    request.scope["state"]["prompts"] = {
        name: value[:MAX_PROMPT] for name, value in prompts.items() if isinstance(value, str)
    }


class AccessLog:
    """An application, with a line logged for each of its answers, and for each request that got none.

    Routes are logged as they were declared: what a caller puts into a path, or into a query, is not.
    """

    def __init__(self, app: ASGIApp, prompts: bool) -> None:
        self.app = app
        self.prompts = prompts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not log.isEnabledFor(logging.INFO):
            await self.app(scope, receive, send)
            return
        began = time.monotonic()
        status, size = None, 0

        async def send_and_count(message: Message) -> None:
            nonlocal status, size
            if message["type"] == "http.response.start":
                status = message["status"]
            elif scope["method"] != "HEAD":  # its body is not sent
                size += len(message.get("body", b""))
            await send(message)

        try:
            await self.app(scope, receive, send_and_count)
        finally:
            state, route = scope.get("state", {}), scope.get("route")
            event(
                log,
                "request",
                method=scope["method"][:MAX_METHOD],
                path=route.path if route else None,
                status=status,
                seconds=round(time.monotonic() - began, 6),
                bytes=size,
                **state.get("logged", {}),
                **(state.get("prompts", {}) if self.prompts else {}),
            )
