from __future__ import annotations

import asyncio

import pytest

from stepbatch import race
from stepbatch.race import done_before


async def never(cancelled: list[bool]) -> None:
    try:
        await asyncio.Event().wait()
    finally:
        cancelled.append(True)


async def after(turns: int, value: int | Exception) -> int:
    for _ in range(turns):
        await asyncio.sleep(0)
    if isinstance(value, Exception):
        raise value
    return value


def test_work_that_is_done_first_returns_or_raises_and_the_other_is_cancelled() -> None:
    cancelled: list[bool] = []
    assert asyncio.run(done_before(never(cancelled), after(2, 5))) == (5,)
    with pytest.raises(ValueError, match="its own"):
        asyncio.run(done_before(never(cancelled), after(2, ValueError("its own"))))
    assert cancelled == [True, True]


def test_work_is_cancelled_when_the_other_ends_however_it_does() -> None:
    cancelled: list[bool] = []
    assert asyncio.run(done_before(after(2, 5), never(cancelled))) is None
    assert asyncio.run(done_before(after(2, ValueError()), never(cancelled))) is None
    assert cancelled == [True, True]


def test_work_counts_where_both_are_done() -> None:
    assert asyncio.run(done_before(after(0, 1), after(0, 2))) == (2,)


def test_whoever_waits_is_cancelled_together_with_both() -> None:
    cancelled: list[bool] = []

    async def run() -> None:
        async with asyncio.timeout(0.05):
            await done_before(never(cancelled), never(cancelled))

    with pytest.raises(TimeoutError):
        asyncio.run(run())
    assert cancelled == [True, True]


def test_what_swallows_a_cancellation_is_cancelled_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(race, "AGAIN", 0.01)
    swallowed = 0

    async def stubborn() -> None:
        nonlocal swallowed
        while swallowed < 2:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                swallowed += 1

    assert asyncio.run(done_before(asyncio.sleep(0), stubborn())) is None
    assert swallowed == 2
