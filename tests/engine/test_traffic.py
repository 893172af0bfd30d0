"""What is learned of who comes, against the equation that it is an approximation of."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepbatch.engine.traffic import CHANGE, LEAST_LOAD, MEMORY, MOST_LOAD, PART, PAUSE, USUAL_LOAD, Traffic

STEPS, WEIGHTS = (8.0, 28.0, 50.0), (0.6, 0.3, 0.1)
MEAN = sum(size * weight for size, weight in zip(STEPS, WEIGHTS, strict=True))


def gamma(load: float, sizes: Sequence[float] = STEPS, weights: Sequence[float] = WEIGHTS) -> float:
    """What solves the equation, to within very little."""
    rate = load / sum(size * weight for size, weight in zip(sizes, weights, strict=True))

    def over(at: float) -> bool:
        return rate * sum(w * math.expm1(at * size) for size, w in zip(sizes, weights, strict=True)) > at

    low, high = 0.0, 1 / max(sizes)
    while not over(high):
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if over(middle) else (middle, high)
    return low


def mixed(load: float, count: int = 10 * MEMORY, unit: float = 1.0, width: float = 1.0) -> Traffic:
    """What is known after so many jobs of different steps, of so many seconds each."""
    chance, traffic, now = random.Random(1), Traffic(), 0.0
    for _ in range(count):
        now += chance.expovariate(load / MEAN / unit)
        seconds = unit * chance.choices(STEPS, WEIGHTS)[0]
        traffic.came(now, seconds, width * seconds)
    return traffic


@pytest.mark.parametrize("load", [0.65, 0.8, 0.85])
def test_it_is_a_part_of_what_solves_the_equation(load: float) -> None:
    assert mixed(load).decay == pytest.approx(PART * gamma(load), rel=0.4)  # what is learned of the load is 5% off


@pytest.mark.parametrize(("load", "taken"), [(0.1, LEAST_LOAD), (3.0, MOST_LOAD)])
def test_loads_that_are_reckoned_with(load: float, taken: float) -> None:
    assert mixed(load).decay == pytest.approx(PART * gamma(taken), rel=0.3)


@pytest.mark.parametrize("load", [LEAST_LOAD, USUAL_LOAD, MOST_LOAD])
@pytest.mark.parametrize(
    ("sizes", "weights"),
    [((20.0,), (1.0,)), ((4.0, 8.0), (0.5, 0.5)), (STEPS, WEIGHTS), ((4.0, 100.0), (0.95, 0.05))],
)
def test_three_moments_are_enough(load: float, sizes: tuple[float, ...], weights: tuple[float, ...]) -> None:
    traffic, each = Traffic(), sum(size * weight for size, weight in zip(sizes, weights, strict=True)) / load
    counts = [round(20 * weight) for weight in weights]
    arrivals = [size for size, count in zip(sizes, counts, strict=True) for _ in range(count)]
    random.Random(0).shuffle(arrivals)
    for number in range(10 * MEMORY):
        traffic.came(number * each, arrivals[number % 20], arrivals[number % 20])
    exact = PART * gamma(load, sizes, weights)
    assert exact / CHANGE < traffic.decay < 1.35 * CHANGE * exact


def test_seconds_are_seconds_of_any_machine() -> None:
    assert mixed(0.8, unit=1e-3).decay == pytest.approx(1e3 * mixed(0.8).decay)


def test_where_steps_are_wide_starts_are_smaller() -> None:
    assert mixed(0.8, width=8.0).decay == pytest.approx(2 * mixed(0.8).decay)


def test_a_night_does_not_make_the_day_calm() -> None:
    traffic = mixed(0.8)
    before = traffic.decay
    traffic.came(1e9, 20.0, 20.0)
    traffic.came(1e9 + 1, 20.0, 20.0)
    assert before / CHANGE**2 < traffic.decay < before * CHANGE**2
    assert PAUSE * MEAN < 1e9


def test_what_changes_is_learned_and_what_is_chance_is_not() -> None:
    chance, traffic, now = random.Random(2), Traffic(), 0.0

    def changes(load: float, count: int) -> int:
        nonlocal now
        found = 0
        for _ in range(count):
            now += chance.expovariate(load / MEAN)
            seconds = chance.choices(STEPS, WEIGHTS)[0]
            found += traffic.came(now, seconds, seconds)
        return found

    changes(0.7, 5 * MEMORY)
    calm = traffic.decay
    assert changes(0.7, 10 * MEMORY) < 0.01 * 10 * MEMORY
    changes(1.5, 4 * MEMORY)
    assert traffic.decay < calm / 2
    changes(0.7, 5 * MEMORY)
    assert traffic.decay == pytest.approx(calm, rel=0.5)


def test_nothing_is_learned_as_long_as_costs_are_unknown() -> None:
    traffic = Traffic()
    assert not traffic.came(1.0, 0.0, 0.0)
    assert traffic.decay == 0
    assert traffic.came(2.0, 3.0, 3.0)
    assert traffic.decay == pytest.approx(PART * gamma(USUAL_LOAD, (3.0,), (1.0,)), rel=0.1)


moments = st.tuples(st.floats(0, 1e6), st.floats(1e-6, 1e4), st.floats(1, 64))


@given(st.lists(moments, min_size=1, max_size=40))
def test_whoever_comes_it_is_a_number_that_bounds_the_start(jobs: list[tuple[float, float, float]]) -> None:
    traffic = Traffic()
    for arrival, seconds, width in jobs:  # at any times, those of before later too
        before = traffic.decay
        changed = traffic.came(arrival, seconds, width * seconds)
        assert changed == (traffic.decay != before)
    sizes = [seconds for _, seconds, _ in jobs]
    mean, square = sum(sizes) / len(sizes), sum(size**2 for size in sizes) / len(sizes)
    least = (math.sqrt(9 + 24 * 0.1) - 3) / 12 / max(sizes) / CHANGE  # if all were as long as the longest, nearly
    assert min(least, 0.1 * mean / square / CHANGE) * 0.3 < traffic.decay < math.inf
