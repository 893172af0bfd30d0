"""``Idempotency-Key``: a request that comes again, as its answer was lost, is answered again, not worked on again."""

from __future__ import annotations

import asyncio
import hashlib
import re
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from python_multipart.multipart import parse_options_header
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Receive

from stepbatch.errors import IdempotencyKeyReused, InternalError, InvalidValue, RequestCancelled, RequestError
from stepbatch.server.body import Room, chunks, unless_gone
from stepbatch.server.logs import note

HEADER = "Idempotency-Key"
REPLAYED = "idempotent-replayed"
MAX_BYTES = 256 << 20  # of all answers together; the oldest go first
ENTRY_BYTES = 2048  # that an answer takes beside its body, about

_KEY = re.compile(r"[ -~]{1,255}")

Route = Callable[[Request], Awaitable[Response]]
Name = tuple[str, str | None, str]  # route, name of the API key, Idempotency-Key


class BodyDigest:
    """What tells bodies apart, as their bytes come. The boundary of a form, which clients make up, is left out.

    Args:
        content_type: The header.
    """

    def __init__(self, content_type: str | None) -> None:
        kind, options = parse_options_header(content_type)
        self._boundary = options.get(b"boundary", b"") if kind == b"multipart/form-data" else b""
        self._hash = hashlib.sha256(bool(self._boundary).to_bytes())
        self._tail = b""  # what a boundary may begin in

    def add(self, chunk: bytes) -> None:
        if not self._boundary:
            self._hash.update(chunk)
            return
        *parts, tail = (self._tail + chunk).split(self._boundary)
        for part in parts:
            self._hash.update(part)
        sure = max(0, len(tail) + 1 - len(self._boundary))
        self._hash.update(tail[:sure])
        self._tail = tail[sure:]

    def value(self) -> bytes:
        """Of the whole body, once."""
        self._hash.update(self._tail)
        return self._hash.digest()


@dataclass(frozen=True, eq=False)
class _Kept:
    """An answer that may be asked for again."""

    digest: bytes  # of the body that it answers
    content: bytes
    media_type: str | None
    expires: float  # seconds on the clock

    @property
    def size(self) -> int:
        return len(self.content) + ENTRY_BYTES

    def again(self) -> Response:
        return Response(self.content, media_type=self.media_type, headers={REPLAYED: "true"})


@dataclass(eq=False)
class _Working:
    """A request that is being read or worked on."""

    digest: bytes | None = None  # once its body is there
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    outcome: _Kept | RequestError = field(default_factory=lambda: InternalError("the request ended without an answer"))


class Idempotency:
    """The answers to requests with a key, each kept for ``seconds``, at most ``max_bytes`` together.

    Only answers that are no errors are kept. What is worked on under a key is finished though its client is gone.

    Args:
        seconds: How long an answer is kept.
        max_body_bytes: The largest body of a request.
        max_bytes: Over this, the oldest answers go before their time.
        clock: Seconds that only grow.
    """

    def __init__(
        self,
        seconds: float,
        max_body_bytes: int,
        max_bytes: int = MAX_BYTES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.seconds = seconds
        self.max_body_bytes = max_body_bytes
        self.max_bytes = max_bytes
        self.clock = clock
        self.size = 0  # bytes held
        self._working: dict[Name, _Working] = {}
        self._kept: OrderedDict[Name, _Kept] = OrderedDict()  # in order of expiry, as all live equally long

    def once(self, route: Route) -> Route:
        """The same route, which works only once on what comes with the same key and body.

        It raises what the route does, and what it raised for the request that this one repeats; and

            InvalidValue: the key is too long, or has other characters than may be.
            IdempotencyKeyReused: the key came with another body.
            RequestCancelled: the client went away, or sent the request again before this one was there.
        """

        async def answer(request: Request) -> Response:
            key = _key(request)
            if key is None:
                return await route(request)
            name = (request.scope["path"], request.scope["state"].get("api_key_name"), key)
            self._evict()
            working = self._working.get(name)
            if name in self._kept or (working and working.digest):
                return await self._repeat(request, name)
            return await self._work(route, request, name)

        return answer

    async def _work(self, route: Route, request: Request, name: Name) -> Response:
        """Answer, and keep the answer. If another works under the same name, its body isn't there yet: it yields."""
        self._working[name] = working = _Working()
        try:
            response = await route(Request(request.scope, self._reading(request, name, working)))
            working.outcome = self._keep(name, working, response)
            return response
        except RequestError as error:
            working.outcome = error
            raise
        finally:
            if self._working.get(name) is working:
                del self._working[name]
            working.ended.set()

    def _reading(self, request: Request, name: Name, working: _Working) -> Receive:
        """What a request's body is read from: it is told apart as it comes. Behind it, nobody goes away."""
        digest = BodyDigest(request.headers.get("content-type"))

        async def receive() -> Message:
            message = await request.receive()
            if message["type"] == "http.request":
                digest.add(message.get("body", b""))
                if not message.get("more_body", False):
                    if self._working.get(name) is not working:
                        raise RequestCancelled(f"the request was sent again, with the same {HEADER}")
                    working.digest = digest.value()
            elif working.digest:
                await asyncio.Event().wait()  # until the work is done, which cancels whoever waits here
            return message

        return receive

    async def _repeat(self, request: Request, name: Name) -> Response:
        """The answer to the same request as before, which may be on its way."""
        first = self._kept.get(name) or self._working[name]
        digest = BodyDigest(request.headers.get("content-type"))
        with Room(self.max_body_bytes).share() as share:  # of its own, as nothing of the body is kept
            async for chunk in chunks(request, self.max_body_bytes, share):
                digest.add(chunk)
        if digest.value() != first.digest:
            raise IdempotencyKeyReused(f"the {HEADER} came with another body before", HEADER)
        if isinstance(first, _Working):
            await unless_gone(request, first.ended.wait())
        outcome = first if isinstance(first, _Kept) else first.outcome
        if isinstance(outcome, RequestError):
            raise outcome
        note(request, replayed=True)
        return outcome.again()

    def _keep(self, name: Name, working: _Working, response: Response) -> _Kept:
        assert working.digest
        kept = _Kept(working.digest, bytes(response.body), response.media_type, self.clock() + self.seconds)
        self._kept[name] = kept
        self.size += kept.size
        self._evict()
        return kept

    def _evict(self) -> None:
        now = self.clock()
        while self._kept:
            name, oldest = next(iter(self._kept.items()))
            if oldest.expires > now and self.size <= self.max_bytes:
                break
            self.size -= oldest.size
            del self._kept[name]


def _key(request: Request) -> str | None:
    keys = request.headers.getlist(HEADER)
    if not keys:
        return None
    if len(keys) > 1 or not _KEY.fullmatch(keys[0]):
        raise InvalidValue(f"{HEADER} must be given once, with 1 to 255 printable ASCII characters", HEADER)
    return keys[0]
