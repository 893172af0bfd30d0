from __future__ import annotations

import asyncio
import json
import socket
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import pytest
import uvicorn
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send
from uvicorn.server import ServerState

from stepbatch.config import LimitsConfig
from stepbatch.server import protocol
from stepbatch.server.protocol import LINGER_BYTES, MOST_LINGERING, PIECE, InPieces, Protocol
from stepbatch.server.request_id import RequestIdMiddleware

Client = tuple[asyncio.StreamReader, asyncio.StreamWriter]
LARGE = 8 << 20  # bytes of an answer, more than the kernel holds for a connection
PATIENT: dict[str, Any] = {"header_seconds": 30.0, "body_seconds": 30.0, "write_seconds": 30.0}


@dataclass
class Site:
    """A server of one application, which counts: how many bodies were whole, how many answers were given up."""

    port: int = 0
    sock: Any = None  # that listens
    state: ServerState = field(default_factory=ServerState)
    lingering: set[Protocol] = field(default_factory=set)
    whole: int = 0
    given_up: int = 0
    large: bytes = bytes(LARGE)
    clients: list[Client] = field(default_factory=list)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        if scope["path"] == "/early":
            await Response("no")(scope, receive, send)
            return
        if scope["path"] == "/large":
            await Response(self.large)(scope, receive, send)
            if (await receive())["type"] == "http.disconnect":
                self.given_up += 1
            return
        try:
            size = len(await request.body())
            self.whole += 1
        except ClientDisconnect:
            self.given_up += 1
            return
        await Response(str(size))(scope, receive, send)


@asynccontextmanager
async def serving(keep_alive: int = 5, **limits: Any) -> AsyncIterator[Site]:
    site = Site()
    config = uvicorn.Config(
        RequestIdMiddleware(site), log_config=None, lifespan="off", access_log=False, timeout_keep_alive=keep_alive
    )

    def connect() -> Protocol:
        given = LimitsConfig(**{**PATIENT, **limits})
        return Protocol(given, site.lingering, config=config, server_state=site.state, app_state={})

    server = await asyncio.get_running_loop().create_server(connect, "127.0.0.1", 0)
    site.sock = server.sockets[0]
    site.port = site.sock.getsockname()[1]
    try:
        yield site
    finally:
        for _, writer in site.clients:
            writer.transport.abort()
        server.close()
        for connection in list(site.state.connections):
            connection.shutdown()
        await until(lambda: not site.state.tasks)


async def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


async def say(site: Site, text: bytes) -> Client:
    sock = socket.create_connection(("127.0.0.1", site.port))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)  # else the kernel reads ahead, megabytes of it
    reader, writer = await asyncio.open_connection(sock=sock)
    site.clients.append((reader, writer))
    writer.write(text)
    return reader, writer


async def end(client: Client) -> bytes:
    """All that a client is told until the server hangs up, which it has to."""
    async with asyncio.timeout(20):
        said = await client[0].read()
    client[1].close()
    return said


async def heard(client: Client) -> bytes:
    """The same of one that may be hung up on without a word."""
    try:
        return await end(client)
    except ConnectionError:
        return b""


async def answer(client: Client) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body."""
    reader, _ = client
    async with asyncio.timeout(20):
        lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")[:-2]
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines[1:])}
        return int(lines[0].split()[1]), headers, await reader.readexactly(int(headers["content-length"]))


async def refused(client: Client, status: int, code: str) -> dict[str, str]:
    """Check that a client is told of an error in the one shape, and hung up on; the headers."""
    got, headers, body = await answer(client)
    assert (got, json.loads(body)["error"]["code"]) == (status, code)
    assert headers["content-type"] == "application/json"
    assert headers["connection"] == "close"
    assert headers["x-request-id"]
    assert await end(client) == b""
    return headers


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        await test()

    asyncio.run(main())


POST = b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 10\r\n"


@pytest.mark.parametrize("said", [b"G", b"GET / HTTP/1.1\r\nhost: x\r\n", POST])
def test_a_head_that_does_not_come_in_time_is_refused(said: bytes) -> None:
    async def test() -> None:
        async with serving(header_seconds=0.2) as site:
            assert await refused(await say(site, said), 408, "request_timeout")
            await until(lambda: not site.state.connections)

    run(test)


def test_who_says_nothing_is_hung_up_on_without_a_word() -> None:
    async def test() -> None:
        async with serving(header_seconds=0.2) as site:
            assert await end(await say(site, b"")) == b""

    run(test)


def test_bytes_that_trickle_in_do_not_help() -> None:
    async def test() -> None:
        async with serving(header_seconds=0.3) as site:
            client = await say(site, b"GET / HTTP/1.1\r\nx: ")

            async def trickle() -> None:
                while True:
                    client[1].write(b"x")
                    await asyncio.sleep(0.02)

            trickling = asyncio.ensure_future(trickle())
            assert b" 408 " in await end(client)
            trickling.cancel()

    run(test)


def test_a_second_head_has_its_own_time_and_an_idle_connection_is_uvicorn_s_affair() -> None:
    async def test() -> None:
        async with serving(header_seconds=0.5) as site:
            client = await say(site, POST + b"\r\n0123456789")
            assert (await answer(client))[2] == b"10"
            await asyncio.sleep(0.7)  # idle for longer than a head may take
            client[1].write(POST + b"\r\n01234567")
            await asyncio.sleep(0.7)
            client[1].write(b"89")
            assert (await answer(client))[2] == b"10"
            client[1].write(b"POST")
            await refused(client, 408, "request_timeout")

    run(test)


@pytest.mark.parametrize("head", [POST + b"\r\n0123", POST[:-20] + b"transfer-encoding: chunked\r\n\r\n4\r\n0123\r\n"])
def test_a_body_that_does_not_come_in_time_is_refused_by_the_request_s_own_name(head: bytes) -> None:
    async def test() -> None:
        async with serving(body_seconds=0.2) as site:
            named = head.replace(b"host: x\r\n", b"host: x\r\nx-request-id: mine\r\n")
            headers = await refused(await say(site, named), 408, "request_timeout")
            assert headers["x-request-id"] == "mine"
            await until(lambda: site.given_up == 1 and not site.state.tasks)

    run(test)


def test_a_body_of_a_head_request_has_its_time_too() -> None:
    async def test() -> None:
        async with serving(body_seconds=0.2) as site:
            said = await end(await say(site, POST.replace(b"POST", b"HEAD") + b"\r\n0123"))
            assert b" 408 " in said
            assert said.endswith(b"\r\n\r\n")

    run(test)


def test_a_large_body_may_take_longer() -> None:
    async def test() -> None:
        async with serving(body_seconds=0.4) as site:
            size = 10 * (1 << 16)
            client = await say(site, POST.replace(b"10", b"%d" % size) + b"\r\n")
            for _ in range(10):
                await asyncio.sleep(0.1)
                client[1].write(bytes(1 << 16))
            assert (await answer(client))[2] == b"%d" % size

    run(test)


@pytest.mark.parametrize("trickle", [b"", b"x"])
def test_what_has_come_of_a_body_buys_no_time(trickle: bytes) -> None:
    async def test() -> None:
        async with serving(body_seconds=0.3) as site:
            size = 60 * (1 << 16)  # a minute's worth
            client = await say(site, POST.replace(b"10", b"%d" % size) + b"\r\n" + bytes(size - 1000))
            going_on = asyncio.ensure_future(refused(client, 408, "request_timeout"))
            async with asyncio.timeout(10):
                while not going_on.done():
                    client[1].write(trickle)
                    await asyncio.sleep(0.02)
            assert await going_on

    run(test)


def test_what_is_left_of_a_body_after_its_answer_has_an_end() -> None:
    async def test() -> None:
        async with serving(body_seconds=0.4, max_upload_bytes=1024) as site:
            client = await say(
                site, POST.replace(b"POST /", b"POST /large").replace(b"10", b"%d" % (1 << 40)) + b"\r\n"
            )
            assert len((await answer(client))[2]) == LARGE

            async def go_on() -> None:
                while True:
                    client[1].write(bytes(1 << 16))
                    await client[1].drain()
                    await asyncio.sleep(0.01)

            with pytest.raises(ConnectionError):
                async with asyncio.timeout(20):
                    await go_on()

    run(test)


@pytest.mark.parametrize("every", [0.01, 0.3])
def test_a_body_that_is_answered_before_its_end_is_not_read_for_long(every: float) -> None:
    async def test() -> None:
        async with serving() as site:
            head = POST.replace(b"POST /", b"POST /early").replace(b"10", b"%d" % (1 << 40))
            client = await say(site, head + b"\r\n")
            assert (await answer(client))[0] == 200
            (connection,) = site.state.connections
            assert isinstance(connection, Protocol)
            began = asyncio.get_running_loop().time()

            async def go_on() -> None:
                while True:
                    client[1].write(bytes(1 << 16))
                    await client[1].drain()
                    await asyncio.sleep(every)

            with pytest.raises(ConnectionError):
                await asyncio.wait_for(go_on(), 20)
            assert connection._connection.body_bytes < 2 * LINGER_BYTES
            assert asyncio.get_running_loop().time() - began < 5

    run(test)


def test_who_has_no_answer_is_told_that_the_server_ends() -> None:
    async def test() -> None:
        async with serving() as site:
            head = POST.replace(b"host: x\r\n", b"host: x\r\nx-request-id: mine\r\n")
            client, other = await say(site, head + b"\r\n0123"), await say(site, POST + b"\r\n0123456789")
            assert (await answer(other))[0] == 200
            await until(lambda: site.whole == 1 and len(site.state.tasks) == 1)
            for connection in list(site.state.connections):
                assert isinstance(connection, Protocol)
                connection.refuse_unanswered()
            headers = await refused(client, 503, "engine_unavailable")
            assert headers["x-request-id"] == "mine"
            assert 1 <= int(headers["retry-after"]) <= 120
            other[1].write(POST + b"\r\n0123456789")
            assert (await answer(other))[0] == 200

    run(test)


MALFORMED = {
    "no http": (b"\x16\x03\x01\r\n\r\n", 400, "invalid_request"),
    "a chunk that is none": (POST[:-20] + b"transfer-encoding: chunked\r\n\r\nx\r\n", 400, "invalid_request"),
    "an early chunk that is none": (
        POST[:-20] + b"expect: 100-continue\r\ntransfer-encoding: chunked\r\n\r\nx\r\n",
        400,
        "invalid_request",
    ),
    "tiny chunks": (
        POST[:-20] + b"transfer-encoding: chunked\r\n\r\n" + 1100 * b"1\r\nx\r\n",
        400,
        "invalid_request",
    ),
    "headers in one go": (POST + b"x: " + 2000 * b"x" + b"\r\n\r\n0123456789", 431, "headers_too_large"),
    "many headers": (POST + 200 * b"x: x\r\n" + b"\r\n0123456789", 431, "headers_too_large"),
    "an endless header": (POST + b"x: " + 2000 * b"x", 431, "headers_too_large"),
    "an endless line": (b"GET /" + 2000 * b"x", 431, "headers_too_large"),
}


@pytest.mark.parametrize(("said", "status", "code"), MALFORMED.values(), ids=MALFORMED)
def test_what_is_no_request_is_refused_in_the_one_shape(said: bytes, status: int, code: str) -> None:
    async def test() -> None:
        async with serving(max_header_bytes=1024) as site:
            await refused(await say(site, said), status, code)
            await until(lambda: not site.state.tasks)
            assert site.whole == 0

    run(test)


def test_chunks_may_be_small_where_they_are_few_or_many_where_they_are_large() -> None:
    async def test() -> None:
        async with serving() as site:
            head = POST[:-20] + b"transfer-encoding: chunked\r\n\r\n"
            small, large = 1000 * b"1\r\nx\r\n", 2000 * (b"100\r\n" + bytes(256) + b"\r\n")
            assert (await answer(await say(site, head + small + b"0\r\n\r\n")))[2] == b"1000"
            assert (await answer(await say(site, head + large + b"0\r\n\r\n")))[2] == b"512000"

    run(test)


def test_headers_may_be_as_long_as_is_said() -> None:
    async def test() -> None:
        async with serving(max_header_bytes=1024) as site:
            head = POST + b"x: "
            head += (1024 - len(head) - 4) * b"x" + b"\r\n\r\n"
            assert (await answer(await say(site, head + b"0123456789")))[0] == 200
            assert (await answer(await say(site, head.replace(b"x: ", b"x: x") + b"0123456789")))[0] == 431

    run(test)


def test_one_connection_too_many_is_told_so_and_there_is_room_again() -> None:
    async def test() -> None:
        async with serving(max_connections=2) as site:
            held = [await say(site, b"") for _ in range(2)]
            await until(lambda: len(site.state.connections) == 2)
            headers = await refused(await say(site, POST + b"\r\n0123456789"), 503, "too_many_connections")
            assert int(headers["retry-after"]) >= 1
            assert site.whole == 0
            held[0][1].close()
            await until(lambda: len(site.state.connections) == 1)
            assert (await answer(await say(site, POST + b"\r\n0123456789")))[0] == 200

    run(test)


def test_of_many_too_many_few_linger() -> None:
    async def test() -> None:
        async with serving(max_connections=1) as site:
            await say(site, b"")
            await until(lambda: len(site.state.connections) == 1)
            clients = [await say(site, b"") for _ in range(MOST_LINGERING + 20)]
            await until(lambda: len(site.lingering) == MOST_LINGERING)
            said = [await heard(client) for client in clients]
            assert sum(b" 503 " in words for words in said) == MOST_LINGERING
            assert said.count(b"") == 20
            await until(lambda: not site.lingering)

    run(test)


def test_who_is_refused_and_does_not_hang_up_is_hung_up_on() -> None:
    async def test() -> None:
        async with serving(header_seconds=0.1) as site:
            client = await say(site, b"GET")
            await until(lambda: len(site.state.connections) == 1)
            await until(lambda: not site.state.connections)
            assert b" 408 " in await heard(client)

    run(test)


def test_who_does_not_read_an_answer_is_hung_up_on_and_costs_no_copy_of_it() -> None:
    async def test() -> None:
        async with serving(write_seconds=2) as site:
            tracemalloc.start()
            head = b"GET /large HTTP/1.1\r\nhost: x\r\n"
            held = [await say(site, head + keep + b"\r\n") for keep in 10 * [b"", b"connection: close\r\n"]]
            await until(lambda: len(site.state.tasks) == 20)
            await asyncio.sleep(0.1)
            _, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
            peak -= sum(len(reader._buffer) for reader, _ in held)  # type: ignore[attr-defined]  # the clients' own
            assert peak < LARGE
            await until(lambda: not site.state.connections and not site.state.tasks)
            assert site.given_up == 20

    run(test)


def test_who_reads_slowly_gets_it_all() -> None:
    async def test() -> None:
        async with serving(write_seconds=0.5) as site:
            site.large = bytes(range(256)) * (LARGE // 256)
            reader, _ = await say(site, b"GET /large HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
            said = b""
            for _ in range(8):
                await asyncio.sleep(0.1)
                said += await reader.readexactly(LARGE // 10)
            said += await reader.read()
            assert said.partition(b"\r\n\r\n")[2] == site.large

    run(test)


def test_who_reads_a_piece_now_and_then_is_hung_up_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "ANSWER_RATE", 1 << 20)

    async def test() -> None:
        async with serving(write_seconds=0.6) as site:
            site.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 14)
            sock = socket.create_connection(("127.0.0.1", site.port))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 14)
            sock.setblocking(False)
            sock.send(b"GET /large HTTP/1.1\r\nhost: x\r\n\r\n")
            read = 0
            with sock, suppress(ConnectionError):
                while read < LARGE:
                    await asyncio.sleep(0.1)
                    with suppress(BlockingIOError):
                        read += len(sock.recv(PIECE // 2))  # so that each piece is gone in time
            assert 2 * PIECE < read < LARGE

    run(test)


@pytest.mark.parametrize("size", [0, 1, PIECE, PIECE + 1, 3 * PIECE])
@pytest.mark.parametrize("more", [False, True])
def test_answers_are_the_same_in_pieces(size: int, more: bool) -> None:
    body = bytes(range(256)) * (size // 256 + 1)
    sent: list[Any] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": body[:size], "more_body": more})

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(InPieces(app)({"type": "http"}, send, send))  # type: ignore[arg-type]
    assert [message["type"] for message in sent] == ["http.response.start", *["http.response.body"] * (len(sent) - 1)]
    pieces = sent[1:]
    assert b"".join(piece["body"] for piece in pieces) == body[:size]
    assert all(len(piece["body"]) <= PIECE for piece in pieces)
    assert [piece["more_body"] for piece in pieces] == [True] * (len(pieces) - 1) + [more]


def test_an_answer_before_the_body_leaves_no_connection_for_ever() -> None:
    async def test() -> None:
        async with serving(keep_alive=1) as site:
            client = await say(site, b"POST /early HTTP/1.1\r\nhost: x\r\ncontent-length: 10\r\n\r\n")
            assert (await answer(client))[0] == 200
            client[1].write(b"0123456789")  # late
            client[1].write(b"GET /early HTTP/1.1\r\nhost: x\r\n\r\n")  # it can be used again
            assert (await answer(client))[0] == 200
            client[1].write(b"POST /early HTTP/1.1\r\nhost: x\r\ncontent-length: 10\r\n\r\n")
            assert (await answer(client))[0] == 200
            client[1].write(b"0123456789")
            assert await end(client) == b""

    run(test)
