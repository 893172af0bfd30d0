"""What servers say of themselves: once, of their models, and over and over during a run, of what they do."""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import aiohttp
import msgspec
from prometheus_client.parser import text_string_to_metric_families

from stepbatch.bench.load.target import open_session, resolve, wait_ready
from stepbatch.bench.load.wire import FAULTS, Extents, Spool, Wire
from stepbatch.bench.options import TargetOptions
from stepbatch.bench.results import Sample

SECONDS = 5.0  # until an answer is given up
LAST_SECONDS = 2.0  # likewise, after the run
MAX_TOLD = 1 << 16  # bytes: a larger answer is no description of a model

# the ends of metrics' names -> the fields of a sample; what stands before is the server's affair
_ADDED = {
    "num_requests_running": "running",
    "num_requests_waiting": "waiting",
    "num_running_reqs": "running",
    "num_queue_reqs": "waiting",
    "jobs_per_step_sum": "jobs_sum",
    "jobs_per_step_count": "steps",
}
_GREATEST = {"peak_memory_mb": "peak_memory_mb"}
_WANTED = re.compile(rb"^[\w:]*(?:%s)[ \t{].*$" % "|".join([*_ADDED, *_GREATEST]).encode(), re.MULTILINE)


@dataclass(frozen=True)
class _Scrape:
    at: float  # time.perf_counter()
    wire: Wire
    page: Extents


class Watch:
    """Fetches every server's ``/metrics`` at the start, now and then, and at the end of its context; parses later.

    A server that has none is left alone.

    Args:
        session: Whose connections are used.
        bases: The servers' addresses.
        spool: Where the pages go until they are read.
        interval: Seconds between two fetches.
    """

    def __init__(self, session: aiohttp.ClientSession, bases: Sequence[str], spool: Spool, interval: float) -> None:
        self._wires = [Wire(session, base, spool) for base in bases]
        self._spool = spool
        self._interval = interval
        self._scrapes: list[_Scrape] = []
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Watch:
        there = await asyncio.gather(*(self._scrape(wire, SECONDS) for wire in self._wires))
        self._wires = [wire for wire, is_there in zip(self._wires, there, strict=True) if is_there]
        self._tasks = [asyncio.create_task(self._keep_on(wire)) for wire in self._wires]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in self._tasks:
            task.cancel()
        for task in self._tasks:
            with suppress(asyncio.CancelledError):
                await task
        if error is None:
            await asyncio.gather(*(self._scrape(wire, LAST_SECONDS) for wire in self._wires))

    def samples(self, start: float) -> list[Sample]:
        """What the pages say, in the order in which they came.

        Args:
            start: ``time.perf_counter()`` when the run started.
        """
        ordered = sorted(self._scrapes, key=lambda scrape: scrape.at)
        return [
            Sample(at=max(0.0, scrape.at - start), server=scrape.wire.base, **values)
            for scrape in ordered
            if (values := read_metrics(self._spool.read(scrape.page)))
        ]

    async def _keep_on(self, wire: Wire) -> None:
        while True:
            await asyncio.sleep(self._interval)
            await self._scrape(wire, SECONDS)

    async def _scrape(self, wire: Wire, seconds: float) -> bool:
        """Fetch a page; returns whether the server has it, as far as is known."""
        try:
            async with asyncio.timeout(seconds):
                answer = await wire.get("/metrics")
        except FAULTS:  # a TimeoutError among them: it may be too busy
            return True
        if answer.outcome == "ok":
            self._scrapes.append(_Scrape(answer.ended, wire, answer.body))
        return answer.outcome in ("ok", "rejected", "timeout")


def read_metrics(page: bytes) -> dict[str, float]:
    """The fields of a sample that a page in Prometheus' text format gives, over all labels; empty if none."""
    wanted = b"\n".join(_WANTED.findall(page)).decode(errors="replace") + "\n"
    values: dict[str, float] = {}
    try:
        for family in text_string_to_metric_families(wanted):
            for sample in family.samples:
                _count(values, sample.name, float(sample.value))
    except ValueError:  # not that format
        return {}
    return values


def _count(values: dict[str, float], name: str, value: float) -> None:
    if not math.isfinite(value):
        return
    for end, field in _ADDED.items():
        if name.endswith(end):
            values[field] = values.get(field, 0.0) + value
    for end, field in _GREATEST.items():
        if name.endswith(end):
            values[field] = max(values.get(field, value), value)


async def meet_servers(options: TargetOptions) -> list[dict[str, Any]]:
    """What every server says of itself, once all are up; and as ``model``, what requests have the model by.

    Raises:
        OptionError: an address or a header is none.
        SetupError: as ``wait_ready`` does.
    """
    await wait_ready(options)
    servers = await ask_servers(options)
    model = options.model or model_name(servers[0])
    return [{"model": model, **server} for server in servers]


async def ask_servers(options: TargetOptions) -> list[dict[str, Any]]:
    """What every server says of itself, in their order.

    Raises:
        OptionError: an address or a header is none.
    """
    target = resolve(options)
    async with open_session(target.headers) as session:
        return [await ask_server(session, base) for base in target.bases]


async def ask_server(session: aiohttp.ClientSession, base: str) -> dict[str, Any]:
    """What ``/v1/models`` and ``/v1/model_info`` say, under these names, whichever exist; and ``base_url``."""
    told: dict[str, Any] = {"base_url": base}
    for name in ("models", "model_info"):
        with suppress(*FAULTS, msgspec.DecodeError, UnicodeDecodeError):
            async with asyncio.timeout(SECONDS), session.get(f"{base}/v1/{name}") as response:
                body = await response.read()
                if response.status == 200 and len(body) <= MAX_TOLD:
                    told[name] = msgspec.json.decode(body)
    return told


def model_name(server: Mapping[str, Any]) -> str:
    """What to call the model of a server that said this of itself."""
    models, info = server.get("models"), server.get("model_info")
    listed = models.get("data") if isinstance(models, dict) else None
    first = listed[0] if isinstance(listed, list) and listed else None
    names = (
        first.get("id") if isinstance(first, dict) else None,
        info.get("model_path") if isinstance(info, dict) else None,
    )
    return next((name for name in names if isinstance(name, str) and name), "default")
