import asyncio
import time

import pytest
from aiohttp import web
from tests.bench.support import serving

from stepbatch.bench.options import TargetOptions
from stepbatch.bench.sweep import settle as settling
from stepbatch.bench.sweep.settle import settle

pytestmark = pytest.mark.anyio


class Busy:
    """A server's metrics: what is said is the next of these, and the last over and over."""

    def __init__(self, *told: tuple[float, float]) -> None:
        self.told = list(told)
        self.asked = 0

    async def metrics(self, request: web.Request) -> web.Response:
        running, waiting = self.told[min(self.asked, len(self.told) - 1)]
        self.asked += 1
        return web.Response(text=f"some:num_requests_running {running}\nsome:num_requests_waiting {waiting}\n")


async def test_waits_until_nothing_is_to_be_done_twice_in_a_row() -> None:
    busy = Busy((2, 3), (0, 1), (1, 0), (0, 0), (1, 0), (0, 0))
    async with serving(("GET", "/metrics", busy.metrics)) as url:
        assert await settle(TargetOptions(base_url=(url,)), 30)
    assert busy.asked == 7


async def test_waits_for_every_server() -> None:
    first, second = Busy((0, 0)), Busy((1, 0), (1, 0), (0, 0))
    async with serving(("GET", "/metrics", first.metrics)) as a, serving(("GET", "/metrics", second.metrics)) as b:
        assert await settle(TargetOptions(base_url=(a, b)), 30)
    assert second.asked == 4


async def test_gives_up_after_a_time() -> None:
    async with serving(("GET", "/metrics", Busy((1, 0)).metrics)) as url:
        assert not await settle(TargetOptions(base_url=(url,)), 0.3)


async def test_a_server_that_does_not_answer_in_time_is_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settling, "LOOK_SECONDS", 0.05)

    async def slow(request: web.Request) -> web.Response:
        await asyncio.sleep(0.2)
        return web.Response()

    async with serving(("GET", "/metrics", slow)) as url:
        assert not await settle(TargetOptions(base_url=(url,)), 0.3)


@pytest.mark.parametrize("status", [404, 200])
async def test_a_server_that_does_not_tell_gets_a_pause(monkeypatch: pytest.MonkeyPatch, status: int) -> None:
    monkeypatch.setattr(settling, "PAUSE_SECONDS", 0.3)

    async def nothing(request: web.Request) -> web.Response:
        return web.Response(text="some:other 1\n", status=status)

    async with serving(("GET", "/metrics", nothing)) as url:
        began = time.monotonic()
        assert await settle(TargetOptions(base_url=(url,)), 30)
        assert time.monotonic() - began >= 0.3


async def test_so_does_one_that_is_not_there() -> None:
    assert await settle(TargetOptions(base_url=("http://127.0.0.1:1",)), 0.5)
