"""Promise 13: after many thousand requests of all kinds a server holds no more than after a few."""

from __future__ import annotations

import asyncio
import os
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest
from tests.pictures import file, image

from .record import Finding
from .serving import Served, descriptors, resident_mb, until

pytestmark = pytest.mark.anyio

AT_ONCE = 32
SAMPLES = 60  # of memory, in all
PICTURE = file(image(size=(32, 32)))
FLAGS = ("--fake-step-ms", "1", "--fake-memory-tokens", "60", "--url-ttl-seconds", "1")
FAULTS = {  # a prompt, and how it is answered
    "[raise-check]": 500, "[raise-encode]": 500, "[raise-denoise]": 500, "[raise-decode]": 500, "[nan]": 500,
    "[long]": 400,
}  # fmt: skip


@dataclass(frozen=True)
class Held:
    """What the two processes hold."""

    descriptors: tuple[int, int]
    threads: tuple[int, int]
    tasks: float
    files: int

    def is_like(self, other: Held) -> bool:
        """Descriptors may differ by two."""
        near = all(abs(a - b) <= 2 for a, b in zip(self.descriptors, other.descriptors, strict=True))
        return near and (self.threads, self.tasks, self.files) == (other.threads, other.tasks, other.files)


@dataclass
class Load:
    """Requests of all kinds, and how much memory there was as they ended."""

    server: Served
    total: int
    rng: random.Random = field(default_factory=lambda: random.Random("soak"))
    statuses: Counter[int | str] = field(default_factory=Counter)
    memory: list[tuple[int, float, float]] = field(default_factory=list)  # requests ended, MiB of server and engine

    async def run(self, count: int) -> None:
        """So many more, and after them nothing is connected."""
        todo = iter(range(count))
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=2)  # less than the server's
        async with aiohttp.ClientSession(self.server.url, connector=connector) as session:
            await asyncio.gather(*(self._work(session, todo) for _ in range(AT_ONCE)))

    async def _work(self, session: aiohttp.ClientSession, todo: Iterator[int]) -> None:
        for _ in todo:
            self.statuses[await self._one(session)] += 1
            ended = self.statuses.total()
            if ended % (self.total // SAMPLES) == 0:
                pids = self.server.pid, self.server.engine_pid()
                self.memory.append((ended, *map(resident_mb, pids)))

    async def _one(self, session: aiohttp.ClientSession) -> int | str:
        draw = self.rng.random()
        if draw < 0.25:
            prompt = self.rng.choice([*FAULTS])
            return await self._ask(session, FAULTS[prompt], prompt=prompt)
        if draw < 0.28:
            return await self._ask(session, 500, size="128x128")  # there is no memory for it
        if draw < 0.31:
            return await self._ask(session, 400, size="0x0")
        if draw < 0.5:
            return await self._hang_up(session)
        if draw < 0.55:
            return await self._edit(session)
        return await self._ask(session, 200, response_format=self.rng.choice(["b64_json", "b64_json", "url"]))

    async def _ask(self, session: aiohttp.ClientSession, wanted: int, **fields: Any) -> int:
        body = {"prompt": f"prompt {self.rng.random()}", "size": "16x16", "num_inference_steps": 2} | fields
        async with session.post("/v1/images/generations", json=body) as answer:
            assert answer.status == wanted, await answer.text()
            await answer.read()
        return answer.status

    async def _edit(self, session: aiohttp.ClientSession) -> int:
        form = aiohttp.FormData({"prompt": f"prompt {self.rng.random()}", "num_inference_steps": "1", "size": "16x16"})
        form.add_field("image", PICTURE, filename="x.png", content_type="image/png")
        async with session.post("/v1/images/edits", data=form) as answer:
            assert answer.status == 200, await answer.text()
            await answer.read()
        return answer.status

    async def _hang_up(self, session: aiohttp.ClientSession) -> str:
        try:
            async with asyncio.timeout(self.rng.uniform(0, 0.05)):
                await self._ask(session, 200, num_inference_steps=100)
        except TimeoutError:
            return "cancelled"
        raise AssertionError("it came after all")

    async def kill(self) -> None:
        """One ends the engine process, twice."""
        async with aiohttp.ClientSession(self.server.url) as session:
            self.statuses[await self._ask(session, 503, prompt="[die]")] += 1
            await self._ask(session, 200)  # there is a new process

    def growth(self, first: int, last: int) -> tuple[float, float]:
        """MiB per 1,000 requests, of the server and of the engine process."""
        samples = np.array([sample for sample in self.memory if first < sample[0] <= last])
        return tuple(np.polyfit(samples[:, 0] / 1000, samples[:, 1:], 1)[0])


def held(server: Served, folder: Path) -> Held:
    """As it is once what is on its way has come."""
    pids = server.pid, server.engine_pid()
    server.disconnect()
    return Held(
        descriptors=(descriptors(pids[0]), descriptors(pids[1])),
        threads=(threads(pids[0]), threads(pids[1])),
        tasks=server.metric("event_loop_tasks"),
        files=sum(len(files) + len(folders) for _, folders, files in os.walk(folder)),
    )


def threads(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/task"))


async def test_it_holds_no_more_after_many_requests_than_after_a_few(
    serve: Callable[..., Served],
    size: Callable[[int, int], int],
    note: Callable[[Finding], None],
    tmp_path: Path,
) -> None:
    count = size(800, 20000)
    warm_up = size(400, count // 3)  # until the allocators have what they need
    most = size(8, 1)  # MiB per 1,000 requests; of few requests, one step of an allocator makes more
    server = serve(*FLAGS, env={"TMPDIR": str(tmp_path)})
    load = Load(server, count)
    await load.kill()
    await load.run(warm_up)
    until(lambda: server.metric("num_requests_running") == 0)
    before, warm = held(server, tmp_path), load.statuses.total()
    await load.run(count - warm_up)
    server_growth, engine_growth = load.growth(warm, load.statuses.total())
    await load.kill()
    until(lambda: held(server, tmp_path).is_like(before))
    assert server_growth < most
    assert engine_growth < most
    cancelled, ok = load.statuses["cancelled"], load.statuses[200]
    note(
        Finding(
            13, "soak", f"{count:,} requests, {AT_ONCE} at once",
            f"{cancelled:,} hung up on, {count - cancelled - ok:,} raise, are NaN, invalid or too large; 4 deaths",
            f"server {server_growth:+.2f}, engine {engine_growth:+.2f} MiB per 1,000 requests; descriptors within 2, "
            "threads, tasks and files as before",
        )
    )  # fmt: skip
