from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
from starlette.types import Message, Receive, Scope, Send

from stepbatch.errors import Overloaded
from stepbatch.server.answers import Answers, CountAnswers

from .support import DrawingEngine, assert_error, make_app
from .test_body import HeldEngine


def test_answers_take_room_while_they_are_made_and_sent() -> None:
    answers = Answers(10, lambda: 7)
    with answers.promise(6):
        answers.check()
        with answers.sending(b"1234"):
            assert answers.taken == 10
            with pytest.raises(Overloaded) as caught:
                answers.check()
            assert caught.value.retry_after == 7
        answers.check()
    assert answers.taken == 0


def test_what_was_let_in_is_not_lost_though_there_is_no_room_left() -> None:
    answers = Answers(10)
    with answers.promise(9), answers.sending(b"12345"):
        assert answers.taken == 14


def test_the_same_bytes_are_there_once_however_many_they_are_sent_to() -> None:
    answers, content = Answers(10), bytes(5)
    with answers.sending(content):
        with answers.sending(content):
            assert answers.taken == 5
        assert answers.taken == 5
        with answers.sending(b"other"):
            assert answers.taken == 10
    assert answers.taken == 0


def test_an_answer_takes_room_until_it_is_sent_or_its_client_gone() -> None:
    answers = Answers(10)
    going: list[int] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"12345", "more_body": False})

    async def send(message: Message) -> None:
        going.append(answers.taken)
        if message["type"] == "http.response.body":
            await asyncio.Event().wait()

    async def run() -> None:
        sending = asyncio.ensure_future(CountAnswers(app, answers)({"type": "http"}, send, send))  # type: ignore[arg-type]
        await asyncio.sleep(0.01)
        assert going == [0, 5]
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)
        assert answers.taken == 0

    asyncio.run(run())


def test_who_comes_while_answers_have_all_the_room_is_refused() -> None:
    engine = HeldEngine()
    app = make_app(engine, max_answers_mb=1)
    body = {"prompt": "a cat", "size": "640x640"}  # 1.2 MiB

    async def run() -> None:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:

            async def ask(**fields: Any) -> httpx.Response:
                return await client.post("/v1/images/generations", json=body | fields)

            first = asyncio.ensure_future(ask())
            while not engine.requests:
                await asyncio.sleep(0.01)
            async with asyncio.timeout(20):
                refused = await ask(size="64x64")
            assert_error(refused, 429, "overloaded")
            assert int(refused.headers["retry-after"]) >= 1
            unread = await client.post("/v1/images/generations", content=b"no JSON")
            assert_error(unread, 429, "overloaded")
            assert (await client.get("/health")).status_code == 200
            engine.go.set()
            assert (await first).status_code == 200
            assert (await ask()).status_code == 200
            assert 'stepbatch:requests_total{code="overloaded"} 2.0' in (await client.get("/metrics")).text

    asyncio.run(run())


def test_one_that_is_larger_than_the_room_is_made_alone() -> None:
    app = make_app(DrawingEngine(), max_answers_mb=1)

    async def run() -> None:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            answer = await client.post("/v1/images/generations", json={"prompt": "a cat", "size": "1024x1024"})
            assert answer.status_code == 200

    asyncio.run(run())
