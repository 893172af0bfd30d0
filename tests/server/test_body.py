from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
from PIL import Image
from starlette.requests import Request
from tests.pictures import file

from stepbatch.engine.messages import Output
from stepbatch.errors import Overloaded, PayloadTooLarge
from stepbatch.server.body import Room, read_body

from .support import DrawingEngine, assert_error, call, make_app


def receiving(*chunks: bytes) -> Callable[[], Any]:
    left = list(chunks)

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": left.pop(0), "more_body": bool(left)}

    return receive


def blank(side: int) -> bytes:
    return file(Image.new("L", (side, side)))


def read(room: Room, *chunks: bytes, limit: int = 100) -> bytes:
    with room.share() as share:
        return asyncio.run(read_body(Request({"type": "http", "headers": []}, receiving(*chunks)), limit, share))


def test_a_body_takes_room_while_it_is_worked_on() -> None:
    room = Room(10)
    assert read(room, b"12345", b"67890") == b"1234567890"
    assert room.taken == 0
    with room.share() as share:
        share.take(6)
        assert room.taken == 6
        with pytest.raises(Overloaded):
            read(room, b"123", b"45")
        assert room.taken == 6
        assert read(room, b"1234") == b"1234"
    assert room.taken == 0


def test_what_never_fits_is_told_apart_from_what_does_not_fit_now() -> None:
    room = Room(10)
    with room.share() as share:
        share.take(1)
        with pytest.raises(PayloadTooLarge):
            read(room, b"12345678901")
        share.take(9)
        with pytest.raises(PayloadTooLarge):
            share.take(1)


def test_the_beginning_of_a_body_takes_no_room() -> None:
    room = Room(10, free=4, later=lambda: 7)
    with room.share() as share:
        share.take(10)
        assert read(room, b"123", b"4") == b"1234"
        with pytest.raises(Overloaded) as caught:
            read(room, b"123", b"45")
        assert caught.value.retry_after == 7
    with room.share() as share:
        share.take(3)
        read(room, b"123", b"45678901")  # seven of them take what is left
        with pytest.raises(Overloaded):
            read(room, b"123456789012")


def test_what_is_taken_after_the_end_is_not_counted() -> None:
    room = Room(10)
    with room.share() as share:
        share.take(3)
    share.take(5)
    assert room.taken == 0


def test_a_route_takes_room_for_what_images_decode_to() -> None:
    def ask(side: int, *masks: bytes) -> Any:
        files = [("image", ("x", blank(side))), *(("mask", ("x", mask)) for mask in masks)]
        return call(app, "POST", "/v1/images/edits", data={"prompt": "a cat", "size": "64x64"}, files=files)

    app = make_app(DrawingEngine(), max_uploads_mb=1)
    assert ask(576).status_code == 200  # 0.95 MiB
    for _ in range(2):  # the first leaves nothing behind
        assert_error(ask(608), 413, "payload_too_large")  # 1.06 MiB
    assert_error(ask(576, blank(576)), 413, "payload_too_large")


@dataclass
class HeldEngine(DrawingEngine):
    """One that answers when it is told to."""

    go: asyncio.Event = field(default_factory=asyncio.Event)

    async def outputs(self) -> list[Output]:
        await self.go.wait()
        return await super().outputs()


def test_what_others_have_is_refused_for_now_but_a_prompt_is_not() -> None:
    engine = HeldEngine()
    app = make_app(engine, max_uploads_mb=1)

    async def run() -> None:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:

            def ask() -> Awaitable[httpx.Response]:
                files = {"image": ("x", blank(576))}
                return client.post("/v1/images/edits", data={"prompt": "a cat", "size": "64x64"}, files=files)

            first = asyncio.ensure_future(ask())
            while not engine.requests:
                await asyncio.sleep(0.01)
            assert_error(await ask(), 429, "overloaded")
            text = 60_000 * b" " + json.dumps({"prompt": "a cat", "size": "64x64"}).encode()  # there is less room
            second = asyncio.ensure_future(client.post("/v1/images/generations", content=text))
            while len(engine.requests) < 2:
                assert not second.done()
                await asyncio.sleep(0.01)
            engine.go.set()
            assert ((await first).status_code, (await second).status_code) == (200, 200)
            assert (await ask()).status_code == 200

    asyncio.run(run())
