from __future__ import annotations

import pytest
from tests.bench.simulate.simulated import curve, kind, run

from stepbatch.bench.simulate.kinds import capacity, pace
from stepbatch.config import BatchingConfig


def test_a_request_alone_takes_what_its_units_take() -> None:
    of = curve(base=0.25, per_token=1 / 256, encode=0.5, decode=0.125)
    assert kind(of, steps=8, n=3).alone(of.costs) == 0.5 + 8 * (0.25 + 3 / 16) + 3 * 0.125
    assert kind(of, side=128).lengths == (64,) and kind(of, side=128).decode == 0.5


def test_a_wider_step_has_a_better_pace() -> None:
    of = curve(base=0.25, per_token=1 / 256)
    assert pace([kind(of)], [1.0], of.costs, widest=1) == (1 / 16) / (1 / 4 + 1 / 16)
    assert pace([kind(of)], [1.0], of.costs, widest=4) == (4 / 16) / (1 / 4 + 4 / 16)


@pytest.mark.parametrize("width", [1, 4])
def test_capacity_is_what_a_closed_loop_gets_through(width: int) -> None:
    of = curve(base=0.25, per_token=1 / 64, encode=0.05, decode=0.1)
    kinds = [kind(of, steps=8), kind(of, steps=2)]
    limits = BatchingConfig(dynamic_batch_max_size=width, max_batch_tokens=10**9)
    course = run([kinds[i % 4 == 0] for i in range(600)], None, of, limits, concurrency=40)
    assert 600 / course.duration == pytest.approx(capacity(kinds, [3.0, 1.0], of.costs, width), rel=0.02)
