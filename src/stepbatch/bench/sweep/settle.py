"""Waiting until servers have nothing left to do, so that one run's leftovers don't spoil the next."""

from __future__ import annotations

import asyncio
import time

import aiohttp

from stepbatch.bench.load.target import open_session, resolve
from stepbatch.bench.load.watch import read_metrics
from stepbatch.bench.load.wire import FAULTS
from stepbatch.bench.options import TargetOptions

PAUSE_SECONDS = 1.0  # for servers that don't tell what they do
LOOK_EVERY = 0.2  # seconds
LOOK_SECONDS = 5.0  # until a look is given up; the server counts as busy


async def settle(options: TargetOptions, patience: float) -> bool:
    """Wait until every server's metrics have twice in a row told that nothing is running or waiting.

    Servers whose metrics don't tell get a short pause. Returns whether nothing is left to do, as far as is known;
    ``False`` after ``patience`` seconds.

    Raises:
        OptionError: an address or a header is none.
    """
    target, idle = resolve(options), 0
    deadline = time.monotonic() + patience
    async with open_session(target.headers) as session:
        while True:
            found = await asyncio.gather(*(_to_do(session, base) for base in target.bases))
            idle = 0 if any(found) else idle + 1
            if idle == 2:
                break
            if time.monotonic() >= deadline:
                return False
            await asyncio.sleep(LOOK_EVERY)
    if None in found:
        await asyncio.sleep(min(PAUSE_SECONDS, patience))
    return True


async def _to_do(session: aiohttp.ClientSession, base: str) -> float | None:
    """How many requests a server has, by its metrics; ``None`` if they don't tell."""
    try:
        async with asyncio.timeout(LOOK_SECONDS), session.get(f"{base}/metrics") as response:
            values = read_metrics(await response.read()) if response.status == 200 else {}
    except TimeoutError:
        return 1.0
    except FAULTS:
        return None
    told = [values[name] for name in ("running", "waiting") if name in values]
    return sum(told) if told else None
