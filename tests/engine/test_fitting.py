import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepbatch.engine.cost import LinearCost, StepCost
from stepbatch.engine.fitting import Sample, StepSample, fit_linear, fit_step

SIZES = [
    (tokens * width, tokens * tokens * width) for tokens in (64, 256, 1024, 4096) for width in (1, 2, 4, 8)
]  # tokens, squares
positive = st.floats(1e-6, 1e3)


def steps(cost: StepCost) -> list[StepSample]:
    return [StepSample(tokens=n, squares=nn, seconds=cost.seconds(n, nn)) for n, nn in SIZES]


def worst(cost: StepCost, samples: list[StepSample]) -> float:
    return max(abs(cost.seconds(s.tokens, s.squares) / s.seconds - 1) for s in samples)


@pytest.mark.parametrize(
    "machine",
    [
        StepCost(base=0.01, per_token=2e-5, per_square=1e-8),
        StepCost(base=0.01, per_token=2e-5),
        StepCost(per_token=2e-5, per_square=1e-9),
        StepCost(base=0.3),
    ],
)
def test_a_straight_machine_is_recovered(machine: StepCost) -> None:
    found = fit_step(steps(machine))
    assert found.base == pytest.approx(machine.base, rel=0.02, abs=1e-9)
    assert found.per_token == pytest.approx(machine.per_token, rel=0.02, abs=1e-12)
    assert found.per_square == pytest.approx(machine.per_square, rel=0.02, abs=1e-15)
    assert found.factors == ()


def test_a_floor_is_found() -> None:
    machine = StepCost(host=0.05, base=0.002, per_token=2e-5, per_square=1e-9)
    found = fit_step(steps(machine))
    assert found.host == pytest.approx(0.05, rel=0.02)
    assert worst(found, steps(machine)) < 0.03


def test_weights_that_are_brought_over_are_a_floor_too() -> None:
    machine = StepCost(streamed=0.4, per_token=2e-5, per_square=1e-9)
    assert worst(fit_step(steps(machine), streamed=0.4), steps(machine)) < 0.03


def test_a_measured_host_is_a_floor_though_one_step_alone_lies_on_it() -> None:
    machine = StepCost(host=0.03, base=0.002, per_token=2e-5, per_square=1e-9)
    samples = [s for s in steps(machine) if (s.tokens, s.squares) == SIZES[6] or s.seconds > 0.03]
    assert [s.seconds for s in samples].count(0.03) == 1
    assert fit_step(samples, host=0.03).host == 0.03
    assert worst(fit_step(samples, host=0.03), samples) < 0.001


def test_a_floor_that_steps_fall_below_is_none() -> None:
    machine = StepCost(base=0.01, per_token=2e-5, per_square=1e-9)
    found = fit_step(steps(machine), host=0.5, streamed=0.4)
    assert found.host == found.streamed == 0
    assert worst(found, steps(machine)) < 0.01


def test_a_bent_machine_is_followed() -> None:
    bent = StepCost(
        base=0.01, per_token=2e-5, factors=tuple((float(k), 1 + 0.3 / (1 + math.exp(10 - k))) for k in range(6, 16))
    )
    samples = steps(bent)
    found = fit_step(samples)
    assert found.factors
    assert worst(found, samples) < 0.08


def test_one_step_that_something_else_slowed_down_misleads_nobody() -> None:
    machine = StepCost(base=0.01, per_token=2e-5, per_square=1e-8)
    samples = steps(machine)
    spoilt = [
        StepSample(tokens=s.tokens, squares=s.squares, seconds=3 * s.seconds) if i == 5 else s
        for i, s in enumerate(samples)
    ]
    found = fit_step(spoilt)
    straight = StepCost(base=found.base, per_token=found.per_token, per_square=found.per_square)
    assert worst(straight, samples) < 0.1


def test_of_one_size_alone_steps_are_thought_to_grow_with_it() -> None:
    found = fit_step([StepSample(tokens=1000, squares=1_000_000, seconds=2.0)])
    assert found.seconds(2000, 2_000_000) == pytest.approx(4.0)


@given(st.lists(st.tuples(st.integers(1, 10**6), st.integers(1, 16), positive), min_size=1, max_size=30))
def test_no_term_is_negative_whatever_was_measured(found: list[tuple[int, int, float]]) -> None:
    samples = [StepSample(tokens=n, squares=max(1, n * n // k), seconds=s) for n, k, s in found]
    cost = fit_step(samples)
    assert min(cost.host, cost.base, cost.per_token, cost.per_square) >= 0
    assert all(cost.seconds(s.tokens, s.squares) > 0 for s in samples)
    assert list(cost.factors) == sorted(cost.factors)


@given(positive, positive)
def test_a_line_is_recovered(each: float, per_unit: float) -> None:
    line = LinearCost(each=each, per_unit=per_unit)
    found = fit_linear([Sample(size=size, cost=line.of(size)) for size in (0.5, 1, 2, 4)])
    assert all(found.of(size) == pytest.approx(line.of(size), rel=0.02) for size in (0.5, 1, 3))


def test_nothing_costs_nothing() -> None:
    assert fit_linear([]) == LinearCost()
    assert fit_linear([Sample(size=5, cost=0.0)]) == LinearCost()
