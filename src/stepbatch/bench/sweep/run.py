"""``stepbatch bench sweep``: one load after another, on one server after another, to see where each tips over."""

from __future__ import annotations

import asyncio
import re
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from stepbatch.bench.environment import environment, now
from stepbatch.bench.load.watch import meet_servers
from stepbatch.bench.options import ReportOptions, TargetOptions
from stepbatch.bench.results import Result, save
from stepbatch.bench.servers import Server, started
from stepbatch.bench.serving import PACKAGES, check_output_file, idle_latencies, measure
from stepbatch.bench.sweep.plan import Axis, Flags, Variant, read_axes, read_command, read_variants, requests_of
from stepbatch.bench.sweep.report import Series, SweepResult, attained, said_of, series_by_unit, show
from stepbatch.bench.sweep.settle import settle
from stepbatch.bench.sweep.tipping import Search, SweepPoint, kept_up
from stepbatch.bench.workload.goals import Kind
from stepbatch.bench.workload.work import WorkItem, build
from stepbatch.errors import OptionError, SetupError

FIRST_SHARE = 0.5  # of the rate of one request after another: the first that is tried in a search
GAIN = 1.05  # of throughput at twice the concurrency: with less, and without a goal, the search ends


def run_sweep(flags: Flags) -> int:
    """Measure every load, print tables and what they come to, and keep the results.

    However it ends, what was measured by then is printed and kept. A run that is far too much for the servers ends at
    the latest when its last request times out. Returns 1 if a request failed other than by being turned away or by
    taking too long.

    Raises:
        OptionError: a flag says what can't be.
        SetupError: a server doesn't start, has ended or can't be measured, or a file can't be written.
        KeyboardInterrupt: Ctrl-C.
    """
    check_output_file(flags.report)
    axes, variants, command = read_axes(flags), read_variants(flags.sweep), read_command(flags)
    items = build(flags.dataset, flags.wanted)
    if flags.sweep.concurrencies and any(item.timestamp is not None for item in items):
        raise OptionError("--concurrencies has each request sent as soon as it may be, and the trace says when")
    driver = Driver(flags, items)
    try:
        for variant in variants:
            with _servers(flags, variant, command) as servers:
                driver.move_to(servers)
                for axis in axes:
                    driver.measure(axis, variant)
    finally:
        driver.tell()
    return 1 if driver.failed else 0


class Driver:
    """Measures one load after another and keeps what came."""

    def __init__(self, flags: Flags, items: Sequence[WorkItem]) -> None:
        self.failed = 0  # requests that failed other than by being turned away or by taking too long
        self.result = SweepResult(
            created=now(),
            environment=environment(PACKAGES),
            options=flags.told(),
            slo_attainment=flags.sweep.slo_attainment,
        )
        self._flags = flags
        self._items = items
        self._target = flags.target
        self._servers: Sequence[Server] = ()
        self._warm = False
        self._idle: dict[Kind, float] | None = None  # on the first servers: one yardstick for all
        self._has_goal = flags.goal.slo is not None or any(item.slo_ms is not None for item in items)

    def move_to(self, servers: Sequence[Server]) -> None:
        """Measure these servers from now on, or, if there are none, those that the flags name."""
        self._servers, self._warm = servers, False
        if servers:
            self._target = replace(self._flags.target, base_url=tuple(server.base_url for server in servers))

    def measure(self, axis: Axis, variant: Variant) -> None:
        """Measure the loads of an axis, or search for the one at which the servers tip over."""
        if self._flags.goal.is_relative:
            self._idle_seconds()  # first of all
        series = Series(name=variant.name, unit=axis.unit)
        self.result.series.append(series)
        for load in axis.loads:
            self._measure(series, load)
        if not axis.loads:
            by_rate = axis.unit == "rate"
            count = max(1, len(self._target.base_url))
            self._search(series, FIRST_SHARE * count / self._idle_seconds() if by_rate else 1.0)

    def _idle_seconds(self) -> float:
        """What requests take on idle servers, on average over their kinds."""
        if self._idle is None:
            self._idle = asyncio.run(_idle(self._items, self._target))
            self.result.idle_s = statistics.fmean(self._idle.values())
        assert self.result.idle_s is not None
        return self.result.idle_s

    def _search(self, series: Series, start: float) -> None:
        sweep = self._flags.sweep
        whole = series.unit == "concurrency"
        by_gain = whole and not self._has_goal  # nothing but throughput tells when it is enough
        search = Search(start, precision=1.0 if by_gain else sweep.precision, max_runs=sweep.max_runs, whole=whole)
        while (load := search.next()) is not None:
            best = max((point.summary.throughput_qps for point in series.points), default=0.0)
            point = self._measure(series, load)
            gained = point.summary.throughput_qps >= GAIN * best
            search.tell(load, point.good and (gained or not by_gain))

    def _measure(self, series: Series, load: float) -> SweepPoint:
        if not asyncio.run(settle(self._target, self._flags.target.timeout)):
            _note("the servers are still busy with what was sent before, and the next figures suffer from it")
        result = asyncio.run(self._run(series, load))
        if len(result.records) < result.work.requests:
            raise KeyboardInterrupt
        point = self._point(series, load, result)
        series.add(point)
        self.result.note(result)
        self.keep()
        if not self._flags.report.disable_tqdm:
            _note(said_of(point, series))
        for server in self._servers:
            server.check()
        return point

    async def _run(self, series: Series, load: float) -> Result:
        flags, last = self._flags, series.points[-1].summary.throughput_qps if series.points else 0.0
        count = requests_of(flags, series.unit, load, last)
        if series.unit == "rate":
            wanted_load = replace(flags.load, request_rate=load)
        else:
            wanted_load = replace(flags.load, max_concurrency=int(load))
        if self._warm:
            wanted_load = replace(wanted_load, warmup_requests=0)
        self._warm = True
        report = flags.report
        if report.save_outputs:
            folder = Path(report.save_outputs) / _slug(series.name) / f"{series.unit}-{load:g}"
            report = replace(report, save_outputs=str(folder))
        dataset = replace(flags.dataset, num_prompts=count)
        options = replace(flags, target=self._target, dataset=dataset, load=wanted_load, report=report)
        return await measure(options, self._idle)

    def _point(self, series: Series, load: float, result: Result) -> SweepPoint:
        summary = result.summary
        self.failed += summary.failed_requests + summary.invalid_requests
        return SweepPoint(
            load=load,
            unit=series.unit,
            summary=summary,
            meets=attained(summary) >= self._flags.sweep.slo_attainment,
            steady=series.unit == "concurrency" or kept_up(result.records),
            work=result.work,
            client=result.client,
        )

    def keep(self) -> None:
        """Write what there is, if a file is wanted."""
        if self._flags.report.output_file:
            save(self.result, Path(self._flags.report.output_file))

    def tell(self) -> None:
        """Print what there is, and draw it if a file is wanted."""
        show(self.result)
        drawn = series_by_unit(self.result)
        if not (drawn and self._flags.report.output_file):
            return
        from stepbatch.bench.sweep.picture import draw_sweep  # here, for it takes a second to import

        path = Path(self._flags.report.output_file)
        print(path)
        for unit, all_series in drawn.items():
            picture = path.with_suffix(".png") if len(drawn) == 1 else path.with_name(f"{path.stem}-{unit}.png")
            draw_sweep(all_series, picture)
            print(picture)


async def _idle(items: Sequence[WorkItem], target: TargetOptions) -> dict[Kind, float]:
    """Seconds that a request of each kind takes on servers that do nothing else."""
    servers = await meet_servers(target)
    return await idle_latencies(items, target, servers[0]["model"])


@contextmanager
def _servers(flags: Flags, variant: Variant, command: Sequence[str]) -> Iterator[list[Server]]:
    """The variant's servers, up, for as long as the context lasts; none if none are to be started."""
    servers: list[Server] = []
    with ExitStack() as stack:
        if command:
            words, count, folder = (
                [*command, *variant.flags],
                flags.sweep.servers,
                stack.enter_context(_logs(flags.report)),
            )
            if not flags.report.disable_tqdm:
                _note(f"starting {variant.name or 'the server'}{f', {count} times' if count > 1 else ''}")
            for i in range(count):
                base_url = flags.target.base_url[i] if flags.target.base_url else ""
                log = folder / f"{_slug(variant.name)}-{i + 1}.log"
                servers.append(stack.enter_context(started(words, log, base_url=base_url, index=i)))
            for server in servers:
                server.wait_until_ready(flags.target.ready_timeout)
        yield servers


@contextmanager
def _logs(report: ReportOptions) -> Iterator[Path]:
    """A folder for the servers' logs, beside the results or, without these, for as long as the context lasts."""
    with ExitStack() as stack:
        try:
            if report.output_file:
                path = Path(report.output_file)
                folder = path.with_name(f"{path.stem}-logs")
                folder.mkdir(parents=True, exist_ok=True)
            else:
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="stepbatch-")))
        except OSError as error:
            raise SetupError(f"can't make a folder for the servers' logs: {error}") from error
        yield folder


def _slug(name: str) -> str:
    return re.sub(r"[^\w.=-]+", "_", name) or "server"


def _note(text: str) -> None:
    print(f"stepbatch: {text}", file=sys.stderr, flush=True)
