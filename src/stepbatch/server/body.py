"""Reading a request's body, never holding more of it than is allowed; and noticing that its sender has left."""

from __future__ import annotations

import threading
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request

from stepbatch.errors import Overloaded, PayloadTooLarge, RequestCancelled
from stepbatch.race import done_before

T = TypeVar("T")

FREE_BYTES = 1 << 16  # of each body, that take no room: all that uploads take leaves a text its place


class Room:
    """Memory for what clients have sent, all of them together, until it is answered.

    Args:
        size: Bytes.
        free: Bytes of each body that take no room. What they come to is bounded by how many clients may be connected.
        later: In how many seconds who is refused should come again.
    """

    def __init__(self, size: int, free: int = 0, later: Callable[[], int] = lambda: 1) -> None:
        self.size = size
        self.free = free
        self._later = later
        self.taken = 0  # bytes
        self._lock = threading.Lock()  # bodies come in on the event loop; what they are decoded to, in a thread

    @contextmanager
    def share(self) -> Iterator[Share]:
        """A request's; what it has taken is free again at the end, and what it takes later isn't counted."""
        share = Share(self)
        try:
            yield share
        finally:
            with self._lock:
                self.taken -= share.taken
                share.ended = True

    def take(self, share: Share, size: int) -> None:
        with self._lock:
            if share.ended:
                return
            if share.taken + size > self.size:
                raise PayloadTooLarge(f"a request and its images, decoded, must have at most {self.size} bytes")
            if self.taken + size > self.size:
                raise Overloaded("too many uploads are being worked on", retry_after=self._later())
            self.taken += size
            share.taken += size


class Share:
    """What a request has taken of the room."""

    def __init__(self, room: Room) -> None:
        self.room = room
        self.taken = 0  # bytes
        self.ended = False

    def take(self, size: int) -> None:
        """Take so many bytes more.

        Raises:
            PayloadTooLarge: there is not so much room, even for this request alone.
            Overloaded: others have what there is.
        """
        self.room.take(self, size)


async def read_body(request: Request, limit: int, share: Share) -> bytes:
    """The whole body; raises what ``chunks`` raises."""
    body = bytearray()
    async for chunk in chunks(request, limit, share):
        body += chunk
    return bytes(body)


async def chunks(request: Request, limit: int, share: Share) -> AsyncGenerator[bytes, None]:
    """The body as it comes, ``limit`` bytes of it at most, all but what is free taken from the room.

    Raises:
        PayloadTooLarge: it is longer, by its own account or as it comes.
        Overloaded: there is no room for it.
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
            share.take(min(len(chunk), max(0, size - share.room.free)))
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
