"""The load client itself: how late it is against a server that answers at once, in another process on this machine.

Run with: python benchmarks/client.py [--rates R ...] [--seconds S] [--quick]
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import random
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
from aiohttp import web
from PIL import Image
from rich.console import Console

from stepbatch.bench import environment
from stepbatch.bench.load.client import drive, warm_up
from stepbatch.bench.load.outputs import check_outputs
from stepbatch.bench.options import LoadOptions, TargetOptions
from stepbatch.bench.report.summary import Spread, spread
from stepbatch.bench.results import ClientState, Record
from stepbatch.bench.workload.arrivals import schedule
from stepbatch.bench.workload.work import WorkItem

RESULTS = Path(__file__).parent / "results" / "client.json"
SIDE = 128  # pixels; of noise, so that the file is as large as one of this size can be
SEED = 2026
GOAL_RATE, GOAL_MS = 500.0, 5.0  # requests a second; lag at P99


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rates", nargs="+", type=float, default=[100.0, GOAL_RATE, 1000.0], help="requests a second")
    parser.add_argument("--seconds", type=float, default=10.0, help="how long each rate is kept up")
    parser.add_argument("--quick", action="store_true", help="a second of each, to see that it runs")
    parser.add_argument("--output", type=Path, help="where the JSON goes; without it, in results/ beside this script")
    parser.add_argument("--stub", action="store_true", help="be the server: print a port and answer until stdin ends")
    options = parser.parse_args(arguments)
    if options.stub:
        asyncio.run(stub())
        return
    seconds = 1.0 if options.quick else options.seconds
    output = options.output or (RESULTS.with_name("client-quick.json") if options.quick else RESULTS)
    console = Console() if sys.stdout.isatty() else Console(width=140)
    about = environment.environment(("aiohttp",)) | {"picture": f"{SIDE}x{SIDE}", "seconds": seconds}
    with stub_server() as url:
        measured = [asyncio.run(measure(url, rate, seconds)) for rate in options.rates]
    from parts.common import Case, Figure  # here, for it imports torch, which the load client does without
    from parts.report import save, show

    cases = [
        Case(
            name=f"{rate:g} requests/s",
            figures=[
                Figure("achieved /s", run["rate"], at_least=0.95 * rate),
                Figure("lag P50 ms", run["lag"]["median"]),
                Figure("lag P99 ms", run["lag"]["p99"], at_most=GOAL_MS if rate <= GOAL_RATE else None),
                Figure("lag max ms", run["lag"]["max"]),
                Figure("loop lag P99 ms", run["client"]["loop_lag_p99"] * 1000),
                Figure("CPU share", run["client"]["cpu_share"]),
                Figure("latency P50 ms", run["latency"]["median"]),
                Figure("latency P99 ms", run["latency"]["p99"]),
            ],
            raw=run,
            settings={"rate": rate, "seconds": seconds},
        )
        for rate, run in zip(options.rates, measured, strict=True)
    ]
    show(console, "The load client against a server that answers at once, open loop, Poisson", cases)
    save(output, about, {"client": cases})
    console.print(f"all of it: {output}")


async def measure(url: str, rate: float, seconds: float) -> dict[str, Any]:
    """Keep up a rate, and check what came."""
    items = [WorkItem(prompt="noise", width=SIDE, height=SIDE, seed=i) for i in range(round(rate * seconds))]
    times = schedule(items, LoadOptions(request_rate=rate), SEED)
    target = TargetOptions(base_url=(url,), timeout=60.0)
    await warm_up(items[:20], target, "stub")
    with await drive(items, times, target, 0, "stub", [None] * len(items)) as driven:
        await check_outputs(driven)
    return _run(driven.records, driven.client)


def _run(records: Sequence[Record], client: ClientState) -> dict[str, Any]:
    done = [record for record in records if record.outcome == "ok"]
    if len(done) < len(records):
        fault = next(record for record in records if record.outcome != "ok")
        print(f"{len(records) - len(done)} requests failed: {fault.outcome}: {fault.error}", file=sys.stderr)
    return {
        "requests": len(records),
        "completed": len(done),
        "rate": len(done) / max(record.ended for record in records),
        "lag": _ms([record.lag for record in records]),
        "latency": _ms([record.latency for record in done]),
        "client": msgspec.to_builtins(client),
    }


def _ms(seconds: Sequence[float]) -> dict[str, float | None]:
    figures: Spread = spread([value * 1000 for value in seconds])
    return msgspec.to_builtins(figures)


@contextmanager
def stub_server() -> Iterator[str]:
    """A server in a process of its own that answers every request with the same picture at once; gives its address."""
    command = [sys.executable, __file__, "--stub"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        try:
            yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        finally:
            process.stdin.close()  # which tells it to end


async def stub() -> None:
    """Be that server."""
    file = io.BytesIO()
    Image.frombytes("RGB", (SIDE, SIDE), random.Random(SEED).randbytes(3 * SIDE * SIDE)).save(file, "PNG")
    body = msgspec.json.encode({"created": 1, "data": [{"b64_json": base64.b64encode(file.getvalue()).decode()}]})

    async def answer(request: web.Request) -> web.Response:
        await request.read()
        return web.Response(body=body, content_type="application/json")

    app = web.Application()
    app.add_routes([web.post("/v1/images/generations", answer)])
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, backlog=1024).start()
    print(runner.addresses[0][1], flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await runner.cleanup()


if __name__ == "__main__":
    main()
