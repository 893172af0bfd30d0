import math

from hypothesis import given
from hypothesis import strategies as st

from stepbatch.engine.cost import UNKNOWN, Costs, LinearCost
from stepbatch.engine.memory import MOST_PATIENCE, PATIENCE, SPARE, TokenLimit, tokens_within

GIGA = 2**30


def test_a_limit_is_predicted_from_what_steps_and_a_decoding_need() -> None:
    costs = Costs(
        known=True,
        step_memory=LinearCost(each=20 * GIGA, per_unit=2**20),
        decode_memory=LinearCost(each=GIGA, per_unit=1024),
    )
    tokens = tokens_within(costs, 32 * GIGA, 2**20)
    used = costs.step_memory.of(tokens) + costs.decode_memory.of(2**20)
    assert used <= (1 - SPARE) * 32 * GIGA < used + 2 * 2**20
    assert tokens_within(costs, 21 * GIGA, 2**20) == 1  # whoever is alone runs all the same


def test_there_is_none_where_nothing_is_known() -> None:
    assert tokens_within(UNKNOWN, 32 * GIGA, 2**20) == math.inf
    assert tokens_within(Costs(known=True, step_memory=LinearCost(each=1, per_unit=1)), math.inf, 1) == math.inf


def test_it_is_lowered_below_what_was_too_much_and_raised_again_after_a_while() -> None:
    limit = TokenLimit()
    limit.lower(1000, now=0.0)
    assert limit.at(PATIENCE - 1) == 750.0
    assert 750 < limit.at(PATIENCE) < 1000
    assert limit.at(1e6) == math.inf


def test_what_is_too_much_again_and_again_is_tried_ever_more_seldom() -> None:
    limit, now, failures = TokenLimit(5000.0), 0.0, 0
    while now < 24 * MOST_PATIENCE:
        if limit.at(now) > 1000:
            limit.lower(1001, now)
            failures += 1
        now += 10.0
    assert 1 <= failures <= 24 / 2
    assert limit.at(now) <= 1000


@given(st.lists(st.tuples(st.integers(1, 10**6), st.floats(0, 1e5)), max_size=20), st.floats(1, 1e7))
def test_it_is_never_over_what_was_predicted_nor_what_has_just_failed(
    failures: list[tuple[int, float]], most: float
) -> None:
    limit, now = TokenLimit(most), 0.0
    for tokens, later in failures:
        limit.lower(tokens, now)
        assert 1 <= limit.at(now) <= most
        assert limit.at(now) < tokens or limit.at(now) == 1
        now += later
        assert limit.at(now) <= most
