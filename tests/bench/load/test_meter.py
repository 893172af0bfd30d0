import asyncio
import gc
import time

import pytest

from stepbatch.bench.load.meter import Meter, bottleneck
from stepbatch.bench.results import ClientState

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize(
    ("state", "latency", "why"),
    [
        (ClientState(), 1.0, ""),
        (ClientState(lag_p99=0.004, loop_lag_p99=0.004, cpu_share=1.0), 0.01, ""),
        (ClientState(lag_p99=0.06, loop_lag_p99=0.06, cpu_share=1.0), 0.0, ""),  # none was answered
        (ClientState(lag_p99=0.04, loop_lag_p99=0.04, cpu_share=0.5), 1.0, ""),
        (ClientState(lag_p99=0.06), 1.0, "it sent requests late, by 60.0 ms at P99 where 50.0 ms would do"),
        (ClientState(lag_p99=0.006), 0.01, "it sent requests late, by 6.0 ms at P99 where 5.0 ms would do"),
        (ClientState(loop_lag_p99=0.006), 0.01, "it was late to see answers, by 6.0 ms at P99 where 5.0 ms would do"),
        (ClientState(loop_lag_p99=0.006, cpu_share=0.99), 10.0, "it was busy for 99% of the time"),
    ],
)
def test_when_the_client_is_the_bottleneck(state: ClientState, latency: float, why: str) -> None:
    assert bottleneck(state, latency, sent=100) == why


def test_a_few_requests_say_nothing_of_a_percentile() -> None:
    state = ClientState(lag_p99=0.06)
    assert bottleneck(state, 0.1, sent=19) == ""
    assert bottleneck(state, 0.1, sent=20)


def test_a_client_without_connections_is_one_too() -> None:
    assert "ulimit" in bottleneck(ClientState(), 1.0, sent=1, exhausted=True)
    assert "ulimit" in bottleneck(ClientState(), 0.0, sent=1, exhausted=True)


async def test_a_stall_weighs_as_much_as_it_lasts() -> None:
    async with Meter() as meter:
        await asyncio.sleep(0.05)
        time.sleep(0.3)  # noqa: ASYNC251 # on purpose
        await asyncio.sleep(0.05)
    state = meter.state([0.001, 0.002], [0.01])
    assert state.loop_lag_p99 > 0.2  # one late beat among ten would be the same in a run of any length
    assert sorted(meter.lags)[len(meter.lags) // 2] > 0.05  # most of the time, the loop stood still
    assert state.lag_max == 0.002
    assert "late to see answers" in state.bottleneck


async def test_the_share_of_a_core_is_measured() -> None:
    async with Meter() as busy:
        until = time.process_time() + 0.2
        while time.process_time() < until:
            pass
    async with Meter() as idle:
        await asyncio.sleep(0.2)
    assert idle.state([], []).cpu_share < busy.state([], []).cpu_share <= 1.5
    assert idle.state([], []).lag_p99 == 0.0


async def test_garbage_is_collected_as_before_afterwards() -> None:
    before = gc.get_freeze_count()
    async with Meter():
        assert gc.get_freeze_count() > before
    assert gc.get_freeze_count() == 0
