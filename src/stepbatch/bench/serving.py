"""``stepbatch bench serving``: one load on one server or several, and how it went."""

from __future__ import annotations

import asyncio
import importlib.util
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from stepbatch.bench.environment import environment, now
from stepbatch.bench.load.client import Driven, drive, warm_up
from stepbatch.bench.load.outputs import check_outputs
from stepbatch.bench.load.watch import meet_servers
from stepbatch.bench.options import LoadOptions, ReportOptions, ServingOptions, TargetOptions
from stepbatch.bench.report.summary import summarize
from stepbatch.bench.report.table import render
from stepbatch.bench.results import Result, Work, check_writable, make_folder, save
from stepbatch.bench.workload.arrivals import schedule
from stepbatch.bench.workload.goals import Kind, goals, kind, one_of_each
from stepbatch.bench.workload.work import WorkItem, build, digest
from stepbatch.errors import OptionError, SetupError

PACKAGES = ("aiohttp", "pillow", "numpy", "av")  # of the client

INTERRUPTED = 130  # exit status
REFUSALS = (400, 401, 403, 404, 405, 413, 415, 422)  # that another try would get again


def run_serving(options: ServingOptions) -> int:
    """Send the load, print the table and keep the results; returns 1 if a request failed.

    Interrupted by the keyboard, it reports what had ended by then, and returns 130.

    Raises:
        OptionError: a flag says what can't be.
        SetupError: a server isn't up, or a file can't be written.
    """
    check_output_file(options.report)
    result = asyncio.run(measure(options))
    print(render(result))
    if options.report.output_file:
        from stepbatch.bench.report.plots import draw_run  # here, for it takes a second to import

        path = Path(options.report.output_file)
        save(result, path)
        draw_run(result, path.with_suffix(".png"))
        print(f"{path}\n{path.with_suffix('.png')}")
    if len(result.records) < result.work.requests:
        return INTERRUPTED
    return 1 if result.summary.completed_requests < result.summary.requests else 0


def check_output_file(report: ReportOptions) -> None:
    """See that what is measured can be kept and drawn, before it is measured; makes the file's folder.

    Raises:
        OptionError: the picture would take the file's place.
        SetupError: the file can't be written, or there is nothing to draw with.
    """
    if not report.output_file:
        return
    path = Path(report.output_file)
    if path.suffix == ".png":
        raise OptionError(f"--output-file is JSON, and its picture goes beside it, as .png; {path} can't be both")
    if importlib.util.find_spec("matplotlib") is None:
        raise SetupError("--output-file draws with matplotlib: pip install 'stepbatch[bench]'")
    check_writable(path)


async def measure(options: ServingOptions, idle: Mapping[Kind, float] | None = None) -> Result:
    """Wait for the servers, warm them up, send the load, and look at what came.

    Args:
        idle: Seconds that requests take on the idle server, by kind, where they are known; else ``--slo`` without a
            value has them measured first.

    Raises:
        OptionError: a flag says what can't be.
        SetupError: a server isn't up or can't be measured, or a file can't be written.
    """
    target, load = options.target, options.load
    items = build(options.dataset, options.wanted)
    folder = make_folder(options.report.save_outputs)
    servers = await meet_servers(target)
    model = servers[0]["model"]
    await _warm_up(items, target, load, model)
    if idle is None:
        idle = await idle_latencies(items, target, model) if options.goal.is_relative else {}
    slos, times = goals(items, options.goal, idle), schedule(items, load, options.dataset.seed or 0)
    shown = sys.stderr.isatty() and not options.report.disable_tqdm
    if shown and times:
        print(f"stepbatch: {len(items)} requests over {times[-1]:.4g} s", file=sys.stderr)
    with _interruptible() as stop, _progress(len(items), shown) as (sent, checked):
        driven = await drive(items, times, target, load.max_concurrency, model, slos, sent, stop=stop)
        with driven:
            await check_outputs(driven, folder, checked)
            return _result(driven, servers, _work(items, options), options.told())


async def idle_latencies(items: Sequence[WorkItem], target: TargetOptions, model: str) -> dict[Kind, float]:
    """Seconds that a request of each kind takes on a server that does nothing else.

    Raises:
        OptionError: an address or header is none.
        SetupError: none of them was answered.
    """
    kinds = one_of_each(items)  # twice each, and the second time counts: the first may set something up
    records = await warm_up(kinds, target, model)
    taken = {kind(kinds[i % len(kinds)]): r.latency for i, r in enumerate(records) if r.outcome == "ok"}
    if not taken:
        raise SetupError(f"an idle server's latency can't be measured: {records[0].error}")
    return taken


async def _warm_up(items: Sequence[WorkItem], target: TargetOptions, load: LoadOptions, model: str) -> None:
    """Have the servers do once what they set up once.

    Raises:
        SetupError: they refuse such requests, so that there is nothing to measure.
    """
    first = [items[i % len(items)] for i in range(load.warmup_requests)]
    if load.warmup_inference_steps:
        first = [msgspec.structs.replace(item, num_inference_steps=load.warmup_inference_steps) for item in first]
    refused = [r for r in await warm_up(first, target, model) if r.status in REFUSALS]
    if refused:
        raise SetupError(f"{refused[0].server} refuses the first request, before any is measured: {refused[0].error}")


def _work(items: Sequence[WorkItem], options: ServingOptions) -> Work:
    load, digests = options.load, digest(items, options.load)
    return Work(
        digest=digests.pop("all"),
        parts=digests,
        requests=len(items),
        dataset=options.dataset.dataset,
        task=", ".join(sorted({item.task for item in items})),
        request_rate=None if load.request_rate == float("inf") else load.request_rate,
        burstiness=load.burstiness,
        max_concurrency=load.max_concurrency,
        is_timed=load.request_rate == float("inf") and any(item.timestamp is not None for item in items),
    )


def _result(driven: Driven, servers: list[dict[str, Any]], work: Work, options: dict[str, Any]) -> Result:
    return Result(
        created=now(),
        environment=environment(PACKAGES),
        options=options,
        servers=servers,
        work=work,
        client=driven.client,
        summary=summarize(driven.records, driven.samples),
        records=driven.records,
        samples=driven.samples,
    )


@contextmanager
def _interruptible() -> Iterator[asyncio.Event]:
    """An event that Ctrl-C sets; a second Ctrl-C ends the program as ever."""
    stop, loop = asyncio.Event(), asyncio.get_running_loop()

    def interrupt() -> None:
        loop.remove_signal_handler(signal.SIGINT)
        stop.set()

    loop.add_signal_handler(signal.SIGINT, interrupt)
    try:
        yield stop
    finally:
        loop.remove_signal_handler(signal.SIGINT)


@contextmanager
def _progress(count: int, shown: bool) -> Iterator[tuple[Callable[[int], None], Callable[[int], None]]]:
    """What to call with the number of requests that have ended, and of those that were looked at."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not shown) as progress:
        sending = progress.add_task("requests", total=count)
        checking = progress.add_task("checked", total=count)
        yield (
            lambda ended: progress.update(sending, completed=ended),
            lambda done: progress.update(checking, completed=done),
        )
