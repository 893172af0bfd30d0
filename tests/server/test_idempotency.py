from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.requests import Request
from starlette.responses import Response

from stepbatch.errors import (
    GenerationFailed,
    IdempotencyKeyReused,
    InternalError,
    InvalidValue,
    Overloaded,
    PayloadTooLarge,
    RequestCancelled,
    RequestError,
)
from stepbatch.server.body import Room, read_body, unless_gone
from stepbatch.server.idempotency import ENTRY_BYTES, REPLAYED, BodyDigest, Idempotency

pytestmark = pytest.mark.anyio

LIMIT = 1000  # bytes of a body


class Clock:
    """Seconds that stand still unless told otherwise."""

    def __init__(self) -> None:
        self.now = 7.0

    def __call__(self) -> float:
        return self.now


class Client:
    """One request: its body comes as it is sent, and then the client stays until it hangs up."""

    def __init__(self, key: str | None, *body: bytes, path: str = "/v1/x", name: str | None = None) -> None:
        self.messages: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        for chunk in body:
            self.send(chunk)
        headers = [(b"idempotency-key", key.encode())] if key is not None else []
        state = {"request_id": "r"} | ({"api_key_name": name} if name else {})
        scope = {"type": "http", "path": path, "headers": headers, "state": state}
        self.request = Request(scope, self.messages.get)

    def send(self, chunk: bytes, more: bool = True) -> None:
        self.messages.put_nowait({"type": "http.request", "body": chunk, "more_body": more})

    def finish(self) -> Client:
        self.send(b"", more=False)
        return self

    def hang_up(self) -> None:
        self.messages.put_nowait({"type": "http.disconnect"})


class Work:
    """A route that reads its body and answers with it, in capitals, once it may; it counts how often it did."""

    def __init__(self, **options: Any) -> None:
        self.clock = Clock()
        self.idempotency = Idempotency(100.0, LIMIT, clock=self.clock, **options)
        self.route = self.idempotency.once(self._answer)
        self.done: list[bytes] = []
        self.begun = asyncio.Event()
        self.may_end = asyncio.Event()
        self.may_end.set()
        self.error: Exception | None = None

    async def _answer(self, request: Request) -> Response:
        with Room(LIMIT).share() as share:
            body = await read_body(request, LIMIT, share)
        self.begun.set()
        await unless_gone(request, self.may_end.wait())
        self.done.append(body)
        if self.error:
            raise self.error
        return Response(body.upper(), media_type="application/json")

    async def ask(self, key: str | None = "k", body: bytes = b"cat", **more: Any) -> tuple[bytes, bool]:
        """An answer, and whether it was given before."""
        response = await self.route(Client(key, body, **more).finish().request)
        assert (response.status_code, response.media_type) == (200, "application/json")
        return bytes(response.body), response.headers.get(REPLAYED) == "true"


@pytest.fixture
async def work() -> Work:
    return Work()


async def test_what_comes_again_is_answered_again_and_not_worked_on(work: Work) -> None:
    assert await work.ask() == (b"CAT", False)
    for _ in range(3):
        assert await work.ask() == (b"CAT", True)
    assert work.done == [b"cat"]


async def test_without_a_key_everything_is_worked_on(work: Work) -> None:
    assert [await work.ask(None), await work.ask(None)] == [(b"CAT", False)] * 2
    assert len(work.done) == 2
    assert work.idempotency.size == 0


async def test_keys_of_other_routes_and_callers_are_others(work: Work) -> None:
    for more in ({}, {"path": "/v1/y"}, {"name": "a"}, {"name": "b"}, {"key": "l"}):
        assert await work.ask(**more) == (b"CAT", False)
        assert await work.ask(**more) == (b"CAT", True)
    assert len(work.done) == 5


async def test_a_key_of_another_body_is_refused(work: Work) -> None:
    await work.ask()
    with pytest.raises(IdempotencyKeyReused) as refused:
        await work.ask(body=b"dog")
    assert (refused.value.status, refused.value.param) == (422, "Idempotency-Key")
    with pytest.raises(PayloadTooLarge):
        await work.ask(body=bytes(LIMIT + 1))
    assert await work.ask() == (b"CAT", True)


@pytest.mark.parametrize("key", ["", "k" * 256, "k\x7f", "schl\u00fcssel", "a\tb"])
async def test_a_key_has_1_to_255_printable_characters(work: Work, key: str) -> None:
    with pytest.raises(InvalidValue) as refused:
        await work.ask(key)
    assert refused.value.param == "Idempotency-Key"
    assert await work.ask("~" * 255 + "") == (b"CAT", False)


async def test_a_key_comes_once(work: Work) -> None:
    client = Client("k", b"cat").finish()
    client.request.scope["headers"].append((b"idempotency-key", b"k"))
    with pytest.raises(InvalidValue):
        await work.route(client.request)


async def test_who_comes_meanwhile_waits_for_the_same_answer(work: Work) -> None:
    work.may_end.clear()
    first = asyncio.create_task(work.ask())
    await work.begun.wait()
    others = [asyncio.create_task(work.ask()) for _ in range(3)]
    with pytest.raises(IdempotencyKeyReused):
        await work.ask(body=b"dog")  # is told at once
    assert not any(other.done() for other in others)
    work.may_end.set()
    assert await first == (b"CAT", False)
    assert await asyncio.gather(*others) == [(b"CAT", True)] * 3
    assert work.done == [b"cat"]


async def test_the_work_goes_on_though_its_client_is_gone(work: Work) -> None:
    work.may_end.clear()
    client = Client("k", b"cat").finish()
    first = asyncio.create_task(work.route(client.request))
    await work.begun.wait()
    client.hang_up()
    again = asyncio.create_task(work.ask())
    await asyncio.sleep(0)
    work.may_end.set()
    assert await again == (b"CAT", True)
    assert (await first).body == b"CAT"
    assert work.done == [b"cat"]


async def test_without_a_key_it_does_not(work: Work) -> None:
    work.may_end.clear()
    client = Client(None, b"cat").finish()
    first = asyncio.create_task(work.route(client.request))
    await work.begun.wait()
    client.hang_up()
    with pytest.raises(RequestCancelled):
        await first


async def test_who_waits_and_leaves_holds_nothing_up(work: Work) -> None:
    work.may_end.clear()
    first = asyncio.create_task(work.ask())
    await work.begun.wait()
    client = Client("k", b"cat").finish()
    waiting = asyncio.create_task(work.route(client.request))
    client.hang_up()
    with pytest.raises(RequestCancelled):
        await waiting
    work.may_end.set()
    assert await first == (b"CAT", False)


async def test_a_body_that_was_cut_off_is_not_waited_for(work: Work) -> None:
    cut = Client("k", b"c")
    first = asyncio.create_task(work.route(cut.request))
    await asyncio.sleep(0)
    assert await work.ask() == (b"CAT", False)
    cut.send(b"at", more=False)  # it was there after all, too late
    with pytest.raises(RequestCancelled, match="sent again"):
        await first
    assert await work.ask() == (b"CAT", True)
    assert work.done == [b"cat"]


async def test_an_upload_whose_client_goes_away_is_cancelled(work: Work) -> None:
    cut = Client("k", b"c")
    cut.hang_up()
    with pytest.raises(RequestCancelled):
        await work.route(cut.request)
    assert await work.ask() == (b"CAT", False)


@pytest.mark.parametrize(
    "error", [GenerationFailed("no"), Overloaded("no"), InvalidValue("no", "n"), ZeroDivisionError()]
)
async def test_errors_are_told_to_who_waits_and_not_kept(work: Work, error: Exception) -> None:
    work.may_end.clear()
    work.error = error
    first = asyncio.create_task(work.ask())
    await work.begun.wait()
    other = asyncio.create_task(work.ask())
    await asyncio.sleep(0)
    work.may_end.set()
    told = await asyncio.gather(first, other, return_exceptions=True)
    assert told[0] is error
    assert told[1] is error if isinstance(error, RequestError) else isinstance(told[1], InternalError)
    assert len(work.done) == 1
    work.error = None
    assert await work.ask() == (b"CAT", False)


async def test_answers_are_kept_for_a_while(work: Work) -> None:
    await work.ask()
    work.clock.now += 99.9
    assert await work.ask() == (b"CAT", True)
    await work.ask("l")
    work.clock.now += 0.1
    assert await work.ask() == (b"CAT", False)
    assert await work.ask("l") == (b"CAT", True)
    work.clock.now += 1000
    await work.ask(None)
    await work.ask("m")
    assert work.idempotency.size == ENTRY_BYTES + 3


async def test_the_oldest_go_first_and_what_is_too_large_is_not_kept() -> None:
    work = Work(max_bytes=3 * (ENTRY_BYTES + 100))
    for key in "abcd":
        await work.ask(key, bytes(100))
        assert work.idempotency.size <= work.idempotency.max_bytes
    assert [(await work.ask(key, bytes(100)))[1] for key in "dcb"] == [True] * 3
    assert await work.ask("a", bytes(100)) == (bytes(100), False)
    tiny = Work(max_bytes=ENTRY_BYTES)
    assert [await tiny.ask(), await tiny.ask()] == [(b"CAT", False)] * 2
    assert tiny.idempotency.size == 0


def digest(body: bytes, boundary: bytes, cuts: Iterator[int]) -> bytes:
    found = BodyDigest(f"multipart/form-data; boundary={boundary.decode()}" if boundary else "application/json")
    at = 0
    for cut in sorted(cuts):
        found.add(body[at:cut])
        at = cut
    found.add(body[at:])
    return found.value()


def form(boundary: bytes, *parts: bytes) -> bytes:
    return b"".join(b"--" + boundary + b"\r\n\r\n" + part + b"\r\n" for part in parts) + b"--" + boundary + b"--\r\n"


bodies = st.lists(st.binary(max_size=20), max_size=3)
cuts = st.lists(st.integers(0, 200), max_size=5)


@given(bodies, cuts, st.sampled_from([b"", b"x", b"aa", b"aba", b"0123456789"]))
def test_a_body_is_the_same_however_it_comes(parts: list[bytes], cuts: list[int], boundary: bytes) -> None:
    body = form(boundary or b"aba", *parts)
    assert digest(body, boundary, iter(cuts)) == digest(body, boundary, iter(()))


@given(bodies, bodies)
def test_forms_are_the_same_with_another_boundary(parts: list[bytes], others: list[bytes]) -> None:
    one, two = b"0d7b1c4e55aa", b"9c3e11f0ab27d"
    assert digest(form(one, *parts), one, iter(())) == digest(form(two, *parts), two, iter(()))
    same = digest(form(one, *parts), one, iter(())) == digest(form(two, *others), two, iter(()))
    assert same == (parts == others)
