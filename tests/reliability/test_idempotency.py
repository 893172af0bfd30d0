"""Promise 20: a request that is sent again, as its connection was lost, is made once, and answered."""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import Callable
from contextlib import suppress

import openai
import pytest

from .record import Finding
from .serving import Served, until

pytestmark = pytest.mark.anyio

STEPS = 20  # of 20 ms
KEYS = {"anna": "a-key-of-anna-s-own", "bob": "a-key-of-bob-s-own"}


class Cutter:
    """Between clients and a server: it loses each request's first connection, somewhere on the way."""

    def __init__(self, server: Served, seed: int) -> None:
        self.host, port = server.url.removeprefix("http://").split(":")
        self.port = int(port)
        self.random = random.Random(seed)
        self.open: set[asyncio.Task[None]] = set()
        self.lost = {"while it was worked on": 0, "within the answer": 0}

    def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._pass_on(reader, writer))
        self.open.add(task)
        task.add_done_callback(self.open.discard)

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, of one request."""
        upstream, to_server = await asyncio.open_connection(self.host, self.port)
        head = await reader.readuntil(b"\r\n\r\n")
        to_server.write(head)
        sending = asyncio.create_task(pump(reader, to_server))
        try:
            if b"x-stainless-retry-count: 0" not in head.lower():
                await pump(upstream, writer)
            elif self.random.random() < 0.5:
                await asyncio.sleep(self.random.uniform(0, 0.02 * STEPS))
                self.lost["while it was worked on"] += 1
            else:
                writer.write((await upstream.read(1 << 16))[:100])
                await writer.drain()
                self.lost["within the answer"] += 1
        finally:
            sending.cancel()
            for end in (writer, to_server):
                end.transport.abort()  # at once, as when a cable is pulled
            await asyncio.gather(sending, writer.wait_closed(), to_server.wait_closed(), return_exceptions=True)


async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(ConnectionError):
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()


def client(url: str, name: str) -> openai.AsyncOpenAI:
    """OpenAI's, with a connection for each request."""
    headers = {"connection": "close"}
    return openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=KEYS[name], default_headers=headers, timeout=60)


async def generate(made: openai.AsyncOpenAI, key: str, prompt: str) -> tuple[str, int, bool]:
    """A picture, its seed, which the server has chosen, and whether the answer was given before."""
    response = await made.images.with_raw_response.generate(
        prompt=prompt,
        size="64x64",
        extra_headers={"Idempotency-Key": key},
        extra_body={"num_inference_steps": STEPS},
    )
    answer = response.parse()
    assert answer.data
    again = response.headers.get("idempotent-replayed") == "true"
    return answer.data[0].b64_json or "", answer.to_dict()["seeds"][0], again


def ended(server: Served) -> dict[str, int]:
    """How many requests the server has worked on, by how that ended."""
    text = server.http.get("/metrics").text
    found = re.findall(r'^stepbatch:requests_total\{code="(\w+)"\} (\S+)$', text, re.MULTILINE)
    return {code: int(float(count)) for code, count in found if float(count)}


async def test_a_request_whose_connection_is_lost_is_made_once(
    serve: Callable[..., Served], size: Callable[[int, int], int], note: Callable[[Finding], None]
) -> None:
    count = size(16, 500)
    keys = [flag for name, key in KEYS.items() for flag in ("--api-key", f"{name}={key}")]
    server = serve("--fake-step-ms", "20", *keys)
    server.http.headers["authorization"] = f"Bearer {KEYS['anna']}"
    cutter, tasks = Cutter(server, seed=20), server.metric("event_loop_tasks")
    async with await asyncio.start_server(cutter, "127.0.0.1", backlog=1024) as proxy:
        url = f"http://127.0.0.1:{proxy.sockets[0].getsockname()[1]}"
        async with client(url, "anna") as anna, client(server.url, "anna") as direct, client(server.url, "bob") as bob:
            names = [f"cat {i}" for i in range(count)]
            answers = await asyncio.gather(*(generate(anna, name, name) for name in names))
            assert sum(cutter.lost.values()) == count  # of each, the first connection
            assert ended(server)["ok"] == count  # none was made twice
            assert set(ended(server)) <= {"ok", "request_cancelled"}  # cut off before all of it was there
            assert len({seed for _, seed, _ in answers}) == count
            for name, (picture, seed, _) in list(zip(names, answers, strict=True))[:8]:
                assert await generate(direct, name, name) == (picture, seed, True)
            with pytest.raises(openai.UnprocessableEntityError) as reused:
                await generate(direct, "cat 0", "a dog")
            assert reused.value.code == "idempotency_key_reused"
            assert ended(server)["ok"] == count
            other = await generate(bob, "cat 0", "cat 0")  # a key of somebody else's, who is owed a picture of his own
            assert other[1:] != answers[0][1:]
            assert not other[2]
            assert ended(server)["ok"] == count + 1
        await asyncio.gather(*cutter.open)
    until(lambda: server.metric("num_requests_running") == 0)
    until(lambda: server.metric("event_loop_tasks") <= tasks)
    lost = " and ".join(f"{number} {where}" for where, number in cutter.lost.items())
    note(
        Finding(
            20, "sent again after a lost connection", f"{count} requests of OpenAI's client", f"{lost}",
            f"{count} of {count} answered, each made once",
        )
    )  # fmt: skip
