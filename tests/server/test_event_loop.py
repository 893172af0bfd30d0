from __future__ import annotations

import asyncio
import time

import pytest

from stepbatch.server.event_loop import PERIOD_SECONDS, LoopWatch

pytestmark = pytest.mark.anyio


async def test_what_holds_up_the_loop_is_seen_once() -> None:
    watch = LoopWatch()
    assert (watch.take_lag(), watch.tasks()) == (0.0, 0)
    async with watch.watching():
        tasks = watch.tasks()
        assert tasks == len(asyncio.all_tasks())
        time.sleep(0.3 + PERIOD_SECONDS)  # noqa: ASYNC251 - the point
        assert watch.take_lag() >= 0.3  # also before the watch itself has come round
        await asyncio.sleep(3 * PERIOD_SECONDS)
        assert watch.take_lag() >= 0.3  # its own look
        later = [watch.take_lag()]
        while later[-1] > 0.2:  # a busy machine
            await asyncio.sleep(PERIOD_SECONDS)
            later.append(watch.take_lag())
        assert len(later) < 100
    assert (watch.take_lag() < 100, watch.tasks()) == (True, 0)
