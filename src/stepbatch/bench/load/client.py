"""The load itself: every request sent when it should be, and a record of each."""

from __future__ import annotations

import asyncio
import random
import resource
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from types import TracebackType

import aiohttp

from stepbatch.bench.load.api import Prepared, prepare
from stepbatch.bench.load.meter import Meter
from stepbatch.bench.load.target import open_session, resolve
from stepbatch.bench.load.watch import Watch
from stepbatch.bench.load.wire import EXHAUSTED, FAULTS, Answer, Spool, Wire, error_number, words
from stepbatch.bench.options import TargetOptions
from stepbatch.bench.results import ClientState, Record, Sample
from stepbatch.bench.workload.work import WorkItem
from stepbatch.race import done_before

LONGEST_WAIT = 120.0  # seconds before a request is sent again, whatever the server says
REST_SECONDS = 1.0  # of a server that isn't well, while there are others
BUSY_OR_GONE = (None, 429, 502, 503, 504)  # status of an answer, if there was one: it isn't the request's fault
FIRST_WAIT = 0.5  # seconds, where the server says nothing; doubled each time


@dataclass(eq=False, repr=False)
class Driven:
    """What came of a load. A context: the answers are deleted at its end.

    ``records`` has one for each item, by index; fewer only if it was stopped. ``requests`` are by the items' index.
    """

    target: TargetOptions
    requests: list[Prepared]
    records: list[Record]
    answers: dict[int, Answer]  # by index, of those that are ok
    client: ClientState
    samples: list[Sample]
    spool: Spool
    _files: ExitStack

    def __enter__(self) -> Driven:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Delete the answers."""
        self._files.close()


async def drive(
    items: Sequence[WorkItem],
    times: Sequence[float] | None,
    target: TargetOptions,
    max_concurrency: int,
    model: str,
    slos: Sequence[float | None],
    progress: Callable[[int], None] = lambda ended: None,
    *,
    watch_interval: float = 0.5,
    stop: asyncio.Event | None = None,
) -> Driven:
    """Send all items, in their order, and wait until each has ended.

    Outcomes are as far as the status tells; ``check_outputs`` looks at what came.

    Args:
        items: The requests.
        times: Open loop: when each should be sent, in seconds after the start, not descending. Its latency counts from
            then, whatever the client or ``max_concurrency`` does. ``None``, closed loop: each should be sent when a
            place comes free for it, which without ``max_concurrency`` is at the start.
        target: The servers. Each request goes to the one that has the fewest in flight.
        max_concurrency: The most requests in flight; 0 is no bound.
        model: The name that requests have the model by.
        slos: Seconds that each may take.
        progress: Called with the number of requests that have ended, each time one has.
        watch_interval: Seconds between two looks at the servers' metrics.
        stop: Once it is set, what is in flight is given up and left out of the records.

    A record's ``lag`` is how long after it could have been, by its time and a free place, a request was given to the
    HTTP library. This process's limit of open files is raised as far as it may be.

    Raises:
        OptionError: an address or header is none, or an item isn't for its route.
        SetupError: there is no room for the answers, or videos couldn't be checked.
    """
    resolved, requests = resolve(target), prepare(items, target.api, model)
    _allow_connections()
    with ExitStack() as files:
        spool = files.enter_context(closing(Spool()))
        async with (
            open_session(resolved.headers) as session,
            Watch(session, resolved.bases, spool, watch_interval) as watch,
        ):
            sender = _Sender(session, Servers(resolved.bases), spool, target, progress)
            async with Meter() as meter:
                stopped = (stop or asyncio.Event()).wait()
                await done_before(stopped, sender.send_all(requests, times, slos, max_concurrency))
        records = sorted(sender.records, key=lambda record: record.index)
        answered = [record.latency for record in records if record.outcome == "ok"]
        client = meter.state([record.lag for record in records], answered, sender.exhausted)
        samples = watch.samples(sender.start)
        return Driven(target, requests, records, sender.answers, client, samples, spool, files.pop_all())


async def warm_up(items: Sequence[WorkItem], target: TargetOptions, model: str) -> list[Record]:
    """Send the items one after another, the servers taking turns, and some again until each server had one.

    Raises:
        OptionError, SetupError: as ``drive`` does.
    """
    resolved, requests = resolve(target), prepare(items, target.api, model)
    if not requests:
        return []
    requests = [requests[i % len(requests)] for i in range(max(len(requests), len(resolved.bases)))]
    async with open_session(resolved.headers) as session:
        with closing(Spool()) as spool:
            sender = _Sender(session, Servers(resolved.bases), spool, target, lambda ended: None)
            await sender.send_all(requests, None, [None] * len(requests), max_concurrency=1)
    return sender.records


class Servers:
    """How many requests each server has in flight, and which ones are better left alone for a while."""

    def __init__(self, bases: Sequence[str]) -> None:
        self._bases = bases
        self._in_flight = [0] * len(bases)
        self._rests_until = [0.0] * len(bases)  # time.perf_counter()
        self._next = 0  # among equals, they take turns

    @contextmanager
    def least(self) -> Iterator[str]:
        """The address of the server that has the fewest, which has one more inside the context.

        One that rests is passed over while there are others: it would be done with its requests at once, and so get
        them all.
        """
        count, now = len(self._bases), time.perf_counter()

        def rank(i: int) -> tuple[bool, int, int]:
            return self._rests_until[i] > now, self._in_flight[i], (i - self._next) % count

        chosen = min(range(count), key=rank)
        self._next = (chosen + 1) % count
        self._in_flight[chosen] += 1
        try:
            yield self._bases[chosen]
        finally:
            self._in_flight[chosen] -= 1

    def rest(self, base: str) -> None:
        """Leave a server alone for a second."""
        self._rests_until[self._bases.index(base)] = time.perf_counter() + REST_SECONDS


class _Places:
    """Room for so many requests at once (0: no bound), which remembers when each place came free."""

    def __init__(self, count: int) -> None:
        self._free = deque([0.0] * count)
        self._semaphore = asyncio.Semaphore(count) if count else None

    async def take(self) -> float:
        """Wait for a place; returns since when it has been free, in seconds after the start."""
        if self._semaphore is None:
            return 0.0
        await self._semaphore.acquire()
        return self._free.popleft()

    def give_back(self, now: float) -> None:
        if self._semaphore is not None:
            self._free.append(now)
            self._semaphore.release()


class _Sender:
    """Sends requests and keeps what becomes of them."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        servers: Servers,
        spool: Spool,
        options: TargetOptions,
        progress: Callable[[int], None],
    ) -> None:
        self.records: list[Record] = []
        self.answers: dict[int, Answer] = {}
        self.exhausted = False
        self.start = 0.0  # time.perf_counter()
        self._session = session
        self._servers = servers
        self._spool = spool
        self._options = options
        self._progress = progress

    async def send_all(
        self,
        requests: Sequence[Prepared],
        times: Sequence[float] | None,
        slos: Sequence[float | None],
        max_concurrency: int,
    ) -> None:
        """As ``drive`` does. One loop for every kind of load: they differ in when a request should have been sent."""
        places = _Places(max_concurrency)
        self.start = time.perf_counter()
        try:
            async with asyncio.TaskGroup() as group:
                for index, request in enumerate(requests):
                    if times is not None:
                        await asyncio.sleep(times[index] - self._now())  # at least once around the loop
                    free = await places.take()
                    intended = free if times is None else times[index]
                    group.create_task(self._send(index, request, intended, max(intended, free), slos[index], places))
                    await asyncio.sleep(0)  # so that it is on its way before the next
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None

    async def _send(
        self, index: int, request: Prepared, intended: float, possible: float, slo: float | None, places: _Places
    ) -> None:
        """Send a request, which was ``possible`` from then on, and keep a record of it."""
        now = self._now()
        record = Record(
            index=index,
            asked=request.asked,
            server="",
            intended=intended,
            sent=now,
            ended=now,
            lag=max(0.0, now - possible),
            slo_s=slo,
        )
        try:
            answer = await self._persist(request, record)
        finally:
            places.give_back(self._now())
        record.ended, record.outcome = answer.ended - self.start, answer.outcome
        record.status, record.error = answer.status, answer.error
        if answer.outcome == "ok":
            self.answers[index] = answer
        self.records.append(record)
        self._progress(len(self.records))

    async def _persist(self, request: Prepared, record: Record) -> Answer:
        """Send a request, and again while it is turned away, as often as the flags allow and time is left."""
        deadline = asyncio.get_running_loop().time() + self._options.timeout
        while True:
            answer = await self._attempt(request, record, deadline)
            wait = _wait(answer, record.attempts)
            late = asyncio.get_running_loop().time() + wait >= deadline
            if answer.outcome != "rejected" or record.attempts > self._options.retries or late:
                return answer
            await asyncio.sleep(wait)
            record.attempts += 1

    async def _attempt(self, request: Prepared, record: Record, deadline: float) -> Answer:
        with self._servers.least() as base:
            record.server = base
            answer = await self._exchange(request, base, deadline)
        if answer.outcome != "ok" and answer.status in BUSY_OR_GONE:
            self._servers.rest(base)
        return answer

    async def _exchange(self, request: Prepared, base: str, deadline: float) -> Answer:
        wire = Wire(self._session, base, self._spool, self._options.poll_interval)
        limit = asyncio.timeout_at(deadline)
        try:
            async with limit:
                return await request.api.ask(wire, request)
        except FAULTS as error:
            self.exhausted |= error_number(error) in EXHAUSTED
            if limit.expired():
                message = f"no answer within {self._options.timeout:g} s"
                return Answer("timeout", time.perf_counter(), error=message)
            return Answer("failed", time.perf_counter(), error=words(error))

    def _now(self) -> float:
        return time.perf_counter() - self.start


def _wait(answer: Answer, attempts: int) -> float:
    """Seconds until a request that was turned away is sent again."""
    told = answer.retry_after
    if told is None:
        told = FIRST_WAIT * 2 ** min(attempts - 1, 10) * random.uniform(0.75, 1.25)  # not all of them at once
    return min(LONGEST_WAIT, told)


def _allow_connections() -> None:
    """Raise the limit of open files, which connections are: it is often 1024."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):  # some systems say that there is no limit, and have one
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
