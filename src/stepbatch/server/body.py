"""Reading a request's body, never holding more of it than is allowed; and noticing that its sender has left."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Coroutine
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request

from stepbatch.errors import PayloadTooLarge, RequestCancelled
from stepbatch.race import done_before

T = TypeVar("T")


async def read_body(request: Request, limit: int) -> bytes:
    """The whole body; raises what ``chunks`` raises."""
    body = bytearray()
    async for chunk in chunks(request, limit):
        body += chunk
    return bytes(body)


async def chunks(request: Request, limit: int) -> AsyncGenerator[bytes, None]:
    """The body as it comes, ``limit`` bytes of it at most.

    Raises:
        PayloadTooLarge: it is longer, by its own account or as it comes.
        RequestCancelled: the client went away before its end.
    """
    too_large = PayloadTooLarge(f"the body must have at most {limit} bytes")
    length = request.headers.get("content-length", "0")
    if length.isdecimal() and (len(length) > 18 or int(length) > limit):
        raise too_large
    size = 0
    try:
        async for chunk in request.stream():
            size += len(chunk)
            if size > limit:
                raise too_large
            yield chunk
    except ClientDisconnect:
        raise RequestCancelled("the client went away") from None


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """What ``work`` returns or raises; if the client hangs up before, ``work`` is cancelled.

    Raises:
        RequestCancelled: the client went away.
    """
    done = await done_before(_gone(request), work)
    if done is None:
        raise RequestCancelled("the client went away")
    return done[0]


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
