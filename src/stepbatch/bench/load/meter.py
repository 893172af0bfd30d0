"""How the load client itself does: whether it, and not the server, bounds what is measured."""

from __future__ import annotations

import asyncio
import gc
import statistics
import time
from collections.abc import Sequence
from contextlib import suppress
from types import TracebackType

from stepbatch.bench.report.summary import spread
from stepbatch.bench.results import ClientState

BEAT = 0.01  # seconds between two beats of the heart
LATE = 0.005  # seconds: the client may always be this late
LATE_SHARE = 0.05  # of the median latency: so late it may be where requests take longer
FEW = 20  # requests
NO_CONNECTIONS = "it could open no more connections (see ulimit -n)"
BUSY = 0.95  # of a core: a client that takes more has no time left to be on time


class Meter:
    """Measures the event loop's lag and the process's share of a core inside its context.

    A heart beats every 10 ms by a fixed schedule. A loop that stands still for 200 ms misses twenty beats, each of
    which counts by how late it came, so a long stall weighs as much as it should.

    Objects that exist by then are kept out of garbage collection for as long, for it would stop the loop.
    """

    def __init__(self) -> None:
        self.lags: list[float] = []
        self._seconds = self._busy = 0.0

    async def __aenter__(self) -> Meter:
        gc.collect()
        gc.freeze()
        self._seconds, self._busy = time.perf_counter(), time.process_time()
        self._heart = asyncio.create_task(self._beat())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._busy = time.process_time() - self._busy
        self._seconds = time.perf_counter() - self._seconds
        gc.unfreeze()
        self._heart.cancel()
        with suppress(asyncio.CancelledError):
            await self._heart

    def state(self, lags: Sequence[float], latencies: Sequence[float], exhausted: bool = False) -> ClientState:
        """What was measured, after the context.

        Args:
            lags: Seconds that each request was sent late.
            latencies: Seconds, of those that were answered.
            exhausted: Whether connections failed because this machine would open no more.
        """
        late = spread(lags)
        state = ClientState(
            lag_p99=late.p99 or 0.0,
            lag_max=late.max or 0.0,
            loop_lag_p99=spread(self.lags).p99 or 0.0,
            cpu_share=self._busy / self._seconds if self._seconds > 0 else 0.0,
        )
        state.bottleneck = bottleneck(state, statistics.median(latencies) if latencies else 0.0, len(lags), exhausted)
        return state

    async def _beat(self) -> None:
        due = time.perf_counter() + BEAT
        while True:
            await asyncio.sleep(due - time.perf_counter())
            now = time.perf_counter()
            while due <= now:
                self.lags.append(now - due)
                due += BEAT


def bottleneck(state: ClientState, latency: float, sent: int, exhausted: bool = False) -> str:
    """Why the client bounded a run whose median latency this is, in seconds; empty if it did not.

    It did if it sent requests late or was late to see answers, 99th percentiles, by more than 5 ms and more than 5% of
    the median latency; or if it took all of a core and its loop was over 5 ms late; or if it ran out of connections.
    Of fewer than 20 requests the percentile says nothing, nor does any of it where none was answered.
    """
    if not latency:
        return NO_CONNECTIONS if exhausted else ""
    allowed = max(LATE, LATE_SHARE * latency)
    reasons = []
    if exhausted:
        reasons.append(NO_CONNECTIONS)
    if state.lag_p99 > allowed and sent >= FEW:
        reasons.append(f"it sent requests late, by {_ms(state.lag_p99)} at P99 where {_ms(allowed)} would do")
    if state.loop_lag_p99 > allowed:
        reasons.append(f"it was late to see answers, by {_ms(state.loop_lag_p99)} at P99 where {_ms(allowed)} would do")
    if state.cpu_share > BUSY and state.loop_lag_p99 > LATE:
        reasons.append(f"it was busy for {state.cpu_share:.0%} of the time")
    return "; ".join(reasons)


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.1f} ms"
