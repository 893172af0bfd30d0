"""A client's connection: uvicorn's HTTP, with deadlines for those that are slow, and our shape for every error.

What is refused here reaches no application: what isn't HTTP, comes too slowly, has too long headers, or is one
connection too many. Answers go out in pieces, each when the one before is gone, so that a client that doesn't read
keeps no copy of its answer here.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import struct
from collections.abc import Callable
from contextlib import suppress
from http import HTTPStatus
from typing import Any, NoReturn, cast

import h11
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from stepbatch import logs
from stepbatch.config import LimitsConfig
from stepbatch.errors import EngineUnavailable, HeadersTooLarge, RequestError, RequestTimeout, TooManyConnections
from stepbatch.server.handlers import error_response
from stepbatch.server.request_id import new_request_id

PIECE = 1 << 16  # bytes of an answer that are written at once
READ_BYTES = 1 << 12  # at once: asyncio's 256 KiB can be so many headers, or chunks of a byte, that all others wait
READ_BODY_BYTES = 1 << 16  # of a body that isn't in chunks, which takes no reading
BODY_RATE = 1 << 16  # bytes of a body, a second, at which it never runs into its deadline
ANSWER_RATE = BODY_RATE // 2  # below which an answer does; at twice as much it doesn't, though the kernel goes by leaps
MAX_CHUNKS = 1024  # of a chunked body, and one more for each
SMALL_CHUNK = 256  # bytes of it: to read one of a byte takes as long as one of thousands
LINGER_SECONDS = 1.0  # for a client that was refused to hang up, as it may lose the answer if we do first
LINGER_BYTES = 1 << 20  # that are read, and thrown away, of a body that is answered before its end
MOST_LINGERING = 64  # clients beyond those that may be connected; more are hung up on without a word
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER's: what the kernel still holds for the client goes too

log = logging.getLogger(__name__)


class Protocol(H11Protocol):
    """One connection.

    Args:
        limits: How much may come, and how slowly.
        lingering: The connections, of all, that were one too many and are still open.
        options: uvicorn's.
    """

    def __init__(self, limits: LimitsConfig, lingering: set[Protocol], **options: Any) -> None:
        super().__init__(**options)
        self.limits = limits
        self._lingering = lingering
        self.conn = self._connection = _Connection(limits.max_header_bytes, self._on_event)
        self.app = InPieces(self.app)
        self._refused = False
        self._reading: asyncio.TimerHandle | None = None  # the deadline for what is to come in
        self._writing: asyncio.TimerHandle | None = None  # and for what is to be taken
        self._body_mark = 0  # bytes of the body, since which its deadline runs
        self._answered_at: int | None = None  # likewise: where it was when its answer was complete
        self._stalled = 0.0  # on the loop's clock: since when the client takes nothing
        self._waited = 0.0  # seconds that the client has let us wait
        self._taken_mark = 0  # bytes that were sent, since which that is counted

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        full = len(self.connections) >= self.limits.max_connections
        super().connection_made(transport)
        self._read_at_once(READ_BYTES)
        transport.set_write_buffer_limits(high=0)  # writing is paused while anything at all is held back
        if full:
            self.connections.discard(self)
            self._refuse_one_too_many()
        else:
            self._await_head()

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        if self.conn.their_state is h11.IDLE and self._reading is None:
            self._await_head()
        super().data_received(data)
        if self._answered_at is not None and self._connection.body_bytes - self._answered_at > LINGER_BYTES:
            self.transport.close()
        if self._is_idle:  # after the body of a request that was answered before: uvicorn no longer counts
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    @property
    def _is_idle(self) -> bool:
        """Whether nothing is read or answered, and nobody watches how long that lasts."""
        watched = self._reading is not None or self.timeout_keep_alive_task is not None
        return self.conn.states == {h11.CLIENT: h11.IDLE, h11.SERVER: h11.IDLE} and not watched and not self._refused

    def connection_lost(self, exc: Exception | None) -> None:
        self._lingering.discard(self)
        self._await_nothing()
        self._nothing_to_take()
        super().connection_lost(exc)

    def shutdown(self) -> None:
        if self._refused or self.transport.is_closing():
            return  # it is on its way out
        super().shutdown()

    def send_400_response(self, msg: str) -> None:
        self._refuse(self._connection.fault or RequestError(msg))

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stalled = self.loop.time()
        self._writing = self.loop.call_later(self.limits.write_seconds - self._waited, self._not_taken)

    def resume_writing(self) -> None:
        self._nothing_to_take()
        self._waited += self.loop.time() - self._stalled
        if self._connection.sent_bytes - self._taken_mark >= ANSWER_RATE * self.limits.write_seconds:
            self._begin_to_take()
        super().resume_writing()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.conn.states == {h11.CLIENT: h11.SEND_BODY, h11.SERVER: h11.DONE}:
            self._await_nothing()
            self._answered_at = self._connection.body_bytes
            self._reading = self.loop.call_later(LINGER_SECONDS, self.transport.close)

    def refuse_unanswered(self) -> None:
        """Answer a request that has no answer yet, because the server is about to end."""
        if self.cycle is not None and not self.cycle.response_started and not self._refused:
            self._refuse(EngineUnavailable("the server is shutting down"))

    def _refuse_one_too_many(self) -> None:
        if len(self._lingering) >= MOST_LINGERING:
            self._refused = True
            self._reset()
            return
        self._lingering.add(self)
        self._refuse(TooManyConnections("too many clients are connected"))

    def _read_at_once(self, most: int) -> None:
        cast(Any, self.transport).max_size = most

    def _on_event(self, event: h11.Event) -> None:
        if isinstance(event, h11.Request):
            if not any(name == b"transfer-encoding" for name, _ in event.headers):
                self._read_at_once(READ_BODY_BYTES)
            self._await_body()
            self._begin_to_take()
        elif isinstance(event, h11.Data):
            some = self._connection.body_bytes - self._body_mark >= BODY_RATE * self.limits.body_seconds
            if some and self._answered_at is None:
                self._await_body()
        elif isinstance(event, h11.EndOfMessage):
            self._await_nothing()
            self._answered_at = None
            self._read_at_once(READ_BYTES)

    def _await_head(self) -> None:
        self._reading = self.loop.call_later(self.limits.header_seconds, self._head_is_late)

    def _await_body(self) -> None:
        """Wait for the body's end, or so much more of it that it may go on."""
        self._await_nothing()
        self._body_mark = self._connection.body_bytes
        self._reading = self.loop.call_later(self.limits.body_seconds, self._body_is_late)

    def _begin_to_take(self) -> None:
        """Count anew how long the client lets us wait."""
        self._waited, self._taken_mark = 0.0, self._connection.sent_bytes

    def _await_nothing(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
            self._reading = None

    def _nothing_to_take(self) -> None:
        if self._writing is not None:
            self._writing.cancel()
            self._writing = None

    def _head_is_late(self) -> None:
        if self.conn.trailing_data[0]:
            self._refuse(RequestTimeout(f"the headers must be there in {self.limits.header_seconds:g} s"))
        else:  # there is no request that could be answered
            self.transport.close()

    def _body_is_late(self) -> None:
        seconds = f"{self.limits.body_seconds:g} s, or {BODY_RATE >> 10} KiB of it for each of them"
        self._refuse(RequestTimeout(f"the body must be there in {seconds}"))

    def _not_taken(self) -> None:
        logs.event(log, "closed: the client does not read its answer")
        self._reset()

    def _refuse(self, error: RequestError) -> None:
        """Answer with an error, unless an answer has begun, and hang up when the client has, or a little later."""
        self._await_nothing()
        self._unset_keepalive_if_required()
        logs.event(log, "refused before any application", code=error.code)
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.close()
            return
        self._refused = True
        self._reading = self.loop.call_later(LINGER_SECONDS, self._reset)
        self._answer(error)
        self.flow.resume_reading()  # to see it hang up
        with suppress(OSError):  # it has done so already
            self.transport.write_eof()

    def _answer(self, error: RequestError) -> None:
        request_id = new_request_id()
        if self.cycle is not None and not self.cycle.response_complete:
            request_id = self.scope["state"].get("request_id", request_id)
            self.cycle.disconnected = True  # what the application answers goes nowhere
            self.cycle.waiting_for_100_continue = False
            self.cycle.message_event.set()
        response = error_response(error, {"x-request-id": request_id, "connection": "close"})
        body = b"" if self._connection.method == b"HEAD" else bytes(response.body)
        reason = HTTPStatus(error.status).phrase.encode()
        head = h11.Response(status_code=error.status, headers=response.raw_headers, reason=reason)
        for event in (head, h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")

    def _reset(self) -> None:
        """Hang up at once, and forget what the client hasn't taken."""
        with suppress(OSError):
            self.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        self.transport.abort()


class _Connection(h11.Connection):
    """h11's, which tells what comes, and what is wrong with it.

    Args:
        max_header_bytes: h11 holds only what comes bit by bit to it; here it is for heads that come whole, too.
        on_event: Called with each event, before uvicorn has it.
    """

    def __init__(self, max_header_bytes: int, on_event: Callable[[h11.Event], None]) -> None:
        super().__init__(h11.SERVER, max_header_bytes)
        self.max_header_bytes = max_header_bytes
        self.on_event = on_event
        self.fault: RequestError | None = None  # in our words, where next_event has raised
        self.body_bytes = 0  # so far
        self.sent_bytes = 0  # of all answers
        self._chunks = 0  # of the body
        self.method = b""  # of the request that is read or answered

    def next_event(self) -> Any:
        try:
            event = super().next_event()
        except h11.RemoteProtocolError as error:
            if error.error_status_hint == 431:
                self.fault = self._too_large()
            raise
        if isinstance(event, h11.Request):
            self.method, self.body_bytes, self._chunks = event.method, 0, 0
            if _head_bytes(event) > self.max_header_bytes:
                self._raise(self._too_large())
        elif isinstance(event, h11.Data):
            self.body_bytes += len(event.data)
            self._chunks += event.chunk_start
            if self._chunks > MAX_CHUNKS + self.body_bytes / SMALL_CHUNK:
                self._raise(RequestError("the body comes in too many, too small chunks"))
        if isinstance(event, h11.Event):
            self.on_event(event)
        return event

    def send_with_data_passthrough(self, event: h11.Event) -> list[bytes] | None:
        data = super().send_with_data_passthrough(event)
        self.sent_bytes += sum(map(len, data or ()))
        return data

    def start_next_cycle(self) -> None:
        super().start_next_cycle()
        self.method = b""

    def _raise(self, fault: RequestError) -> NoReturn:
        self.fault = fault
        raise h11.RemoteProtocolError(fault.message)

    def _too_large(self) -> RequestError:
        return HeadersTooLarge(f"the request line and headers must have at most {self.max_header_bytes} bytes")


def _head_bytes(request: h11.Request) -> int:
    """How long a request line and its headers are, as they are usually written."""
    line = len(request.method) + len(request.target) + len(b"  HTTP/1.1\r\n\r\n")
    return line + sum(len(name) + len(value) + len(b": \r\n") for name, value in request.headers)


class InPieces:
    """An application whose answers are sent in pieces of at most 64 KiB.

    uvicorn waits before it sends, not after: of an answer in one piece, all that the client doesn't read at once would
    be copied, and stay until it does.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_in_pieces(message: Message) -> None:
            body = message.get("body", b"")
            if len(body) <= PIECE:
                await send(message)
                return
            for start in range(0, len(body), PIECE):
                more = message.get("more_body", False) or start + PIECE < len(body)
                await send({**message, "body": body[start : start + PIECE], "more_body": more})

        await self.app(scope, receive, send_in_pieces)
