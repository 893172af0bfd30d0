"""Promise 20: OpenAI's client understands every refusal, comes again when it is told to, and not more often."""

from __future__ import annotations

import asyncio
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import openai
import pytest

from .record import Finding
from .serving import Served, until

pytestmark = pytest.mark.anyio

WIDTH = 4
KEY = "a-key-of-the-tests"
RETRIES = 2  # as the client has it, unless told otherwise
OVER = 3  # times what the server can do
DELAY = 1.5  # seconds that a busy machine may take to send what is due


@dataclass(frozen=True)
class Attempt:
    """What a request got at one of its tries."""

    id: str
    number: int  # 0 is the first
    status: int
    told: int | None  # seconds, by Retry-After
    sent: float  # seconds, as the next
    answered: float


@dataclass
class Client:
    """The client, and all that it sent."""

    openai: openai.AsyncOpenAI
    steps: int
    attempts: list[Attempt] = field(default_factory=list)

    async def ask(self, id: str = "one", **fields: Any) -> float | None:
        """When the picture was there; ``None`` if it was refused to the last."""
        try:
            await self.generate(id, **fields)
        except openai.RateLimitError:
            return None
        return time.monotonic()

    async def generate(self, id: str = "one", **fields: Any) -> None:
        known = {name: fields.pop(name) for name in ("model", "n") if name in fields}
        headers = {"x-request-id": id, **fields.pop("headers", {})}
        body = {"num_inference_steps": self.steps, **fields}
        prompt = body.pop("prompt", "a cat")
        await self.openai.images.generate(
            prompt=prompt, size="16x16", extra_headers=headers, extra_body=body, **known
        )  # fmt: skip

    def tries(self) -> Counter[str]:
        """How often each request was sent."""
        return Counter(attempt.id for attempt in self.attempts)


@asynccontextmanager
async def client(server: Served, steps: int = 20, retries: int = RETRIES) -> AsyncIterator[Client]:
    sent: dict[Any, float] = {}

    async def on_request(request: Any) -> None:
        sent[request] = time.monotonic()

    async def on_response(response: Any) -> None:
        told, given = response.headers.get("retry-after"), response.request.headers
        attempt = Attempt(
            given["x-request-id"],
            int(given["x-stainless-retry-count"]),
            response.status_code,
            told and int(told),
            sent.pop(response.request),
            time.monotonic(),
        )
        found.attempts.append(attempt)

    hooks = {"request": [on_request], "response": [on_response]}
    http = openai.DefaultAsyncHttpxClient(event_hooks=hooks)
    async with openai.AsyncOpenAI(
        base_url=f"{server.url}/v1", api_key=KEY, max_retries=retries, http_client=http, timeout=600
    ) as made:
        found = Client(made, steps)
        yield found


@pytest.fixture(scope="module")
def queue(size: Callable[[int, int], int]) -> int:
    """Seconds of work that may be there: two or three times what a request takes."""
    return size(1, 4)


@pytest.fixture(scope="module")
def server(queue: int) -> Iterator[Served]:
    bounds = ("--dynamic-batch-max-size", str(WIDTH), "--max-queue-seconds", str(queue))
    served = Served("--fake-step-ms", "20", *bounds, "--api-key", f"tests={KEY}")
    served.http.headers["authorization"] = f"Bearer {KEY}"
    try:
        yield served
    finally:
        served.kill()


async def test_every_refusal_is_an_error_of_the_client_s(server: Served, note: Callable[[Finding], None]) -> None:
    reused = {"headers": {"Idempotency-Key": "again"}, "seed": 1}
    cases: list[tuple[type[openai.APIStatusError], int, dict[str, Any]]] = [
        (openai.BadRequestError, 400, {"n": 11}),
        (openai.AuthenticationError, 401, {"headers": {"authorization": "Bearer of-no-key"}}),
        (openai.NotFoundError, 404, {"model": "dall-e-3"}),
        (openai.APIStatusError, 413, {"prompt": "x" * (1 << 20)}),
        (openai.UnprocessableEntityError, 422, reused | {"seed": 2}),
        (openai.InternalServerError, 500, {"prompt": "[raise-denoise]"}),
        (openai.InternalServerError, 504, {"timeout": 0.001}),
    ]
    async with client(server) as made:
        await made.generate("first", **reused)
        for expected, status, fields in cases:
            with pytest.raises(openai.APIStatusError) as raised:
                await made.generate(f"mine-{status}", **fields)
            error = raised.value
            assert (type(error), error.status_code, error.request_id) == (expected, status, f"mine-{status}"), error
            assert error.code
            assert error.type in ("invalid_request_error", "server_error")
        assert set(made.tries().values()) == {1}  # as none of them would be another time
    note(
        Finding(
            20, "errors as the client has them", f"{len(cases)} refusals", "each kind of fault",
            "each its class, with x-request-id as request_id, and sent once",
        )
    )  # fmt: skip


async def test_past_the_tipping_point_the_client_is_told_when_to_come(
    server: Served, queue: int, size: Callable[[float, float], float], note: Callable[[Finding], None]
) -> None:
    seconds, steps = (
        size(1.5, 60.0),
        20 * queue,
    )  # the client itself takes much of a small machine: it sends few of long
    async with client(server, steps) as made:
        capacity = await measured_capacity(made)
        made.attempts.clear()
        began, asked = time.monotonic(), list[asyncio.Task[float | None]]()
        while (elapsed := time.monotonic() - began) < seconds:
            while len(asked) < OVER * capacity * elapsed:
                asked.append(asyncio.create_task(made.ask(f"r{len(asked)}")))
            await asyncio.sleep(0.005)
        ends = [end for end in await asyncio.gather(*asked) if end is not None]
        tries = made.tries()
        assert len(tries) == len(asked)
        again = [attempt for attempt in made.attempts if attempt.number]
        let_in = sum(attempt.status == 200 for attempt in again) / len(again)
        assert let_in >= size(0.7, 0.4)  # as they were told when there would be room, in spite of all who weren't
        refused = [attempt for attempt in made.attempts if attempt.status == 429]
        assert {attempt.status for attempt in made.attempts} == {200, 429}
        assert all(attempt.told and 1 <= attempt.told <= 120 for attempt in refused)
        assert_obeyed(made.attempts)
        assert_spread(refused, capacity)
        loaded = [end for end in ends if end <= began + seconds]
        overall = rate(ends) / capacity
        goodput = rate(loaded) / capacity if len(loaded) > 2 * WIDTH else overall
        assert goodput >= size(0.6, 0.9)  # in short, what others do on the machine tells
        assert overall >= size(0.5, 0.8)  # the last that were let in have ever less company
        until(lambda: server.metric("backlog_seconds") == 0)
    mean = len(made.attempts) / len(asked)
    note(
        Finding(
            20, "retries under overload", f"{len(asked):,} requests of OpenAI's client, {OVER} x what can be done",
            f"a queue of {queue} s, {RETRIES} retries each",
            f"goodput {goodput:.0%} of the capacity under load, {overall:.0%} until the last; {mean:.2f} attempts, "
            f"{let_in:.0%} of the later ones let in; {len(ends) / len(asked):.0%} answered in the end",
        )
    )  # fmt: skip


async def measured_capacity(made: Client) -> float:
    """Requests a second of this machine with all that it does besides: a step may take longer than it should."""

    async def ask_often(name: int) -> list[float | None]:
        return [await made.ask(f"w{name}-{i}") for i in range(2)]

    ends = await asyncio.gather(*(ask_often(name) for name in range(2 * WIDTH)))  # the queue has room for them
    return rate([end for found in ends for end in found if end])


def rate(ends: list[float]) -> float:
    """Answers a second, from when the first of them were there."""
    ends = sorted(ends)
    return (len(ends) - WIDTH) / (ends[-1] - ends[WIDTH - 1])


def assert_obeyed(attempts: list[Attempt]) -> None:
    """Who was told to come again came then, and nobody came who was not."""
    before = {(attempt.id, attempt.number): attempt for attempt in attempts}
    again = [attempt for attempt in attempts if attempt.number]
    assert again
    for attempt in again:
        told = before[attempt.id, attempt.number - 1]
        assert told.told
        assert -0.05 <= attempt.sent - told.answered - told.told <= DELAY


def assert_spread(refused: list[Attempt], capacity: float) -> None:
    """Those who are refused don't come again in one second: in any, hardly more than can be worked on."""
    due = Counter(int(attempt.answered + (attempt.told or 0)) for attempt in refused if attempt.number < RETRIES)
    assert max(due.values()) <= 4 * capacity, due


async def test_a_server_that_shuts_down_sends_them_away_for_different_times(
    server: Served, note: Callable[[Finding], None]
) -> None:
    """The last in this file: it ends the server of the others."""
    count = 20
    async with client(server) as busy, client(server, retries=0) as made:
        long = asyncio.create_task(busy.generate("long", num_inference_steps=1000))
        while server.metric("num_requests_running") == 0:
            await asyncio.sleep(0.01)
        server.signal(signal.SIGTERM)
        while server.http.get("/ready").status_code == 200:
            await asyncio.sleep(0.01)
        for i in range(count):
            with pytest.raises(openai.InternalServerError) as raised:
                await made.generate(f"r{i}")
            assert (raised.value.status_code, raised.value.code) == (503, "engine_unavailable")
        long.cancel()
        await asyncio.gather(long, return_exceptions=True)
        told = Counter(attempt.told for attempt in made.attempts)
    assert set(told) <= set(range(5, 11))
    assert len(told) > 2
    note(
        Finding(
            20, "sent away at shutdown", f"{count} requests", "SIGTERM with one in flight",
            f"503 with Retry-After of {min(filter(None, told))} to {max(filter(None, told))} s, each its own",
        )
    )  # fmt: skip
