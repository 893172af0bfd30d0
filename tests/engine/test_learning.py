import random
from collections.abc import Callable
from statistics import median

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepbatch.engine.cost import Costs, LinearCost, StepCost
from stepbatch.engine.learning import FRESH, PAUSE, Learning

MACHINE = StepCost(base=0.02, per_token=6e-5, per_square=1e-8)
KNOWN = Costs(known=True, step=MACHINE, prompt=LinearCost(each=0.002), decode=LinearCost(each=0.01, per_unit=2e-6))
BENT = StepCost(base=0.02, per_token=6e-5, per_square=1e-8, factors=((8.0, 1.0), (11.0, 0.9), (13.0, 1.25)))
SIZES = (200, 400, 600, 1024)


def mixture(rng: random.Random) -> tuple[int, int]:
    lengths = [rng.choice(SIZES) for _ in range(rng.choice((1, 2, 3, 4, 8, 12)))]
    return sum(lengths), sum(n * n for n in lengths)


def run(learning: Learning, steps: int, seconds: Callable[[int, int], float], seed: int = 0) -> list[float]:
    """Take random steps; the relative errors of what was predicted of each, where anything was."""
    rng, errors = random.Random(seed), []
    for _ in range(steps):
        tokens, squares = mixture(rng)
        took = seconds(tokens, squares) * rng.lognormvariate(0, 0.03)
        if learning.costs.known:
            errors.append(abs(learning.costs.step.seconds(tokens, squares) / took - 1))
        learning.step(tokens, squares, took)
        learning.news()
    return errors


def test_a_bent_machine_is_learned_from_nothing() -> None:
    errors = run(Learning(), 600, BENT.seconds)
    assert len(errors) > 500
    assert median(errors) < 0.08
    assert median(errors[-200:]) < 0.05


def test_what_was_known_is_corrected() -> None:
    learning = Learning(KNOWN)
    errors = run(learning, 600, BENT.seconds)
    assert median(errors[-200:]) < 0.06


def test_a_spike_hardly_moves_a_prediction() -> None:
    learning = Learning(KNOWN)
    run(learning, 300, MACHINE.seconds)
    before = learning.costs.step.seconds(1200, 720_000)
    for _ in range(3):
        learning.step(1200, 720_000, 10 * MACHINE.seconds(1200, 720_000))
    run(learning, 30, MACHINE.seconds, seed=1)
    assert learning.costs.step.seconds(1200, 720_000) == pytest.approx(before, rel=0.04)


@given(st.floats(1.0, 1e4), st.sampled_from([(200, 40_000), (2400, 2_880_000), (100_000, 10**9)]))
def test_the_first_step_of_its_size_may_be_a_spike(factor: float, size: tuple[int, int]) -> None:
    learning = Learning(KNOWN)
    learning.step(*size, PAUSE + factor * MACHINE.seconds(*size))
    learning.news()
    assert learning.costs.step.seconds(*size) == pytest.approx(MACHINE.seconds(*size), rel=0.03)


def test_a_lasting_change_gets_through_within_a_few_steps() -> None:
    learning = Learning(KNOWN)
    for _ in range(200):
        learning.step(1200, 720_000, 1.5 * MACHINE.seconds(1200, 720_000))
        learning.news()
    assert learning.costs.step.seconds(1200, 720_000) == pytest.approx(1.5 * MACHINE.seconds(1200, 720_000), rel=0.05)


def test_sizes_that_are_not_seen_follow_those_that_are() -> None:
    learning = Learning(KNOWN)
    run(learning, 300, MACHINE.seconds)
    learning.step(20_000, 20_000 * 1024, MACHINE.seconds(20_000, 20_000 * 1024))
    run(learning, 3 * FRESH, lambda n, nn: 1.4 * MACHINE.seconds(n, nn))
    assert learning.costs.step.seconds(20_000, 20_000 * 1024) == pytest.approx(
        1.4 * MACHINE.seconds(20_000, 20_000 * 1024), rel=0.12
    )


def test_nothing_is_told_while_predictions_hold() -> None:
    learning = Learning(KNOWN)
    run(learning, 400, MACHINE.seconds)
    assert learning.costs.step.seconds(1200, 720_000) == pytest.approx(MACHINE.seconds(1200, 720_000), rel=0.05)
    told = [learning.step(1200, 720_000, MACHINE.seconds(1200, 720_000)) or learning.news() for _ in range(200)]
    assert not any(told)


def test_of_one_size_alone_nothing_is_known() -> None:
    learning = Learning()
    for _ in range(200):
        learning.step(400, 160_000, 0.05)
        assert learning.news() is None
    assert not learning.costs.known


def test_of_whole_calls_one_size_is_enough() -> None:
    learning = Learning(one_size=True)
    learning.decode([64 * 64], 2.0)
    assert learning.news() is None  # no step was seen
    for _ in range(30):
        learning.step(400, 160_000, 0.05)
    found = learning.news()
    assert found is not None
    assert found.step.seconds(400, 160_000) == pytest.approx(0.05)
    assert found.step.seconds(800, 320_000) == pytest.approx(0.1)


def test_decoding_is_learned_by_the_pixels_of_each_output() -> None:
    learning, decode = Learning(KNOWN), LinearCost(each=0.03, per_unit=4e-6)
    rng = random.Random(0)
    for _ in range(300):
        pixels = [rng.choice((1 << 14, 1 << 16, 1 << 18)) for _ in range(rng.randint(1, 3))]
        learning.decode(pixels, sum(map(decode.of, pixels)))
        learning.step(400, 160_000, MACHINE.seconds(400, 160_000))
        learning.news()
    for size in (1 << 14, 1 << 16, 1 << 18):
        assert learning.costs.decode.of(size) == pytest.approx(decode.of(size), rel=0.15)


def test_prompts_and_images_are_learned() -> None:
    learning = Learning(KNOWN)
    for _ in range(300):
        learning.encode(2, [], 0.02)
        learning.encode(2, [1 << 16], 0.02 + 0.2)
        learning.news()
    assert learning.costs.prompt.of(1) == pytest.approx(0.01, rel=0.1)
    assert learning.costs.image.of(1 << 16) == pytest.approx(0.2, rel=0.1)


@given(st.lists(st.tuples(st.integers(1, 10**6), st.integers(1, 16), st.floats(1e-6, 1e4)), max_size=60), st.booleans())
def test_no_term_is_ever_negative(found: list[tuple[int, int, float]], known: bool) -> None:
    learning = Learning(KNOWN if known else Costs())
    for tokens, sequences, seconds in found:
        learning.step(tokens, max(1, tokens * tokens // sequences), seconds)
        learning.decode([tokens], seconds)
        costs = learning.news() or learning.costs
        step = costs.step
        assert min(step.host, step.base, step.per_token, step.per_square, costs.decode.each, costs.decode.per_unit) >= 0
