import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepbatch.config import BatchingConfig
from stepbatch.engine.cost import Costs, LinearCost, StepCost
from stepbatch.engine.width import SHORT_OF_BEST, USUAL, WIDEST, WIDTHS, best_width, paces, step_width
from stepbatch.request import GenerationRequest, Job

seconds = st.floats(0, 1)
costs = st.builds(
    StepCost,
    host=seconds,
    streamed=seconds,
    base=seconds,
    per_token=st.floats(1e-6, 1e-3),
    per_square=st.floats(0, 1e-6),
    factors=st.sampled_from([(), ((8.0, 1.0), (11.0, 1.5), (14.0, 0.7))]),
)


@given(costs, st.integers(1, 5000))
def test_the_knee_is_the_narrowest_that_does_nearly_the_most(cost: StepCost, tokens: int) -> None:
    width = best_width(cost, tokens, tokens**2)
    rates = [cost.rate(jobs * tokens, jobs * tokens**2) for jobs in range(1, WIDEST + 1)]
    enough = (1 - SHORT_OF_BEST) * max(rates)
    assert rates[width - 1] >= enough * (1 - 1e-9)
    assert all(rate < enough * (1 + 1e-9) for rate in rates[: width - 1])


@pytest.mark.parametrize(
    ("cost", "enough"),
    [
        (StepCost(base=1e-3, per_token=1e-4), 1200),  # nine, or the next that is tried
        (StepCost(host=0.03, per_token=1e-4), 300),
        (StepCost(host=9.0, per_token=1e-4), math.inf),  # 64 are worth it, and more tokens would be
    ],
)
def test_jobs_that_can_not_fill_a_step_do_not_say_when_it_is_full(cost: StepCost, enough: float) -> None:
    assert paces(cost, BatchingConfig())(100, 10_000).enough == enough


@pytest.mark.parametrize(
    ("cost", "tokens", "width"),
    [
        (StepCost(per_token=1e-4), 4096, 1),  # nothing is shared
        (StepCost(base=1e-3, per_token=1e-4), 4096, 1),  # a quarter of a percent is
        (StepCost(base=0.1, per_token=1e-4), 256, 55),  # most of it is
        (StepCost(host=0.03, per_token=1e-4), 64, 5),  # up to five are free
        (StepCost(streamed=2.0, per_token=1e-4), 1000, 20),
    ],
)
def test_the_knee_of_equal_jobs(cost: StepCost, tokens: int, width: int) -> None:
    assert best_width(cost, tokens, tokens**2) == width


def jobs(tokens: list[int], steps: int = 4) -> list[Job]:
    request = GenerationRequest(prompt="x", width=64, height=64, num_inference_steps=steps, seed=0)
    return [Job(str(number), 0, request, (one,), 0.0) for number, one in enumerate(tokens)]


@given(costs, st.lists(st.integers(1, 5000), min_size=1, max_size=40), st.integers(0, 1000))
def test_the_more_are_here_the_wider_steps_are_as_far_as_that_pays(
    step: StepCost, tokens: list[int], more: int
) -> None:
    of, some = Costs(known=True, step=step, decode=LinearCost(each=0.1)), jobs(tokens)
    few = step_width(of, some, len(some))
    many = step_width(of, some, len(some) + more)
    assert 1 <= few <= many <= len(some)


@pytest.mark.parametrize(
    ("base", "here", "width"),
    [
        (0.02, 2, 1),  # two together take 2% less than one after the other, and the first would wait for the second
        (0.02, 16, 2),  # for fourteen more that is worth it
        (0.2, 2, 2),
        (0.2, 8, 4),
    ],
)
def test_jobs_share_a_step_where_enough_wait_for_them(base: float, here: int, width: int) -> None:
    of = Costs(known=True, step=StepCost(base=base, per_token=1e-2))
    assert step_width(of, jobs([100] * here), here) == width


def test_what_takes_as_long_however_wide_steps_are_makes_width_less_worth_while() -> None:
    step = StepCost(base=0.2, per_token=1e-2)
    slow = Costs(known=True, step=step, decode=LinearCost(each=10.0))
    assert step_width(slow, jobs([100] * 8), 8) < step_width(Costs(known=True, step=step), jobs([100] * 8), 8)


def test_attention_of_long_sequences_is_paid_for_each_and_not_for_the_square_of_all() -> None:
    cost = StepCost(base=0.01, per_token=1e-5, per_square=1e-8)
    assert cost.seconds(8192, 2 * 4096**2) == pytest.approx(0.01 + 0.08192 + 2 * 0.16777, rel=1e-3)
    assert cost.seconds(8192, 8192**2) > 1.5 * cost.seconds(8192, 2 * 4096**2)


@pytest.mark.parametrize(
    ("cost", "limits", "pace"),
    [
        (StepCost(per_token=0.01), {}, (1.0, 1.0, 1.0)),  # nothing is shared
        (StepCost(per_token=0.01, base=0.01), {}, (1.01, 1 + 0.01 / 64, 1.01)),  # hardly anything
        (StepCost(host=8.0, per_token=0.01), {}, (8.0, 1.0, 8.0)),  # eight for the price of one
        (StepCost(host=8.0, per_token=0.01), {"dynamic_batch_max_size": 5}, (8.0, 2.0, 8.0)),
        (StepCost(host=8.0, per_token=0.01), {"max_batch_tokens": 250}, (8.0, 4.0, 8.0)),
        (StepCost(host=8.0, per_token=0.01), {"max_batch_tokens": 9}, (8.0, 8.0, 8.0)),  # over it by itself
        (StepCost(), {}, (0.0, 0.0, 0.0)),  # nobody knows
    ],
)
def test_the_pace_of_a_job_of_a_hundred_tokens(cost: StepCost, limits: dict[str, int], pace: tuple[float, ...]) -> None:
    told = paces(cost, BatchingConfig(**limits))(100, 10_000)  # type: ignore[arg-type]
    assert (told.alone, told.share, told.usual) == pytest.approx(pace)


@given(costs, st.integers(1, 5000))
def test_a_full_step_has_as_many_as_nearly_pays(cost: StepCost, tokens: int) -> None:
    pace = paces(cost, BatchingConfig())(tokens, tokens**2)
    shares = {width: cost.seconds(width * tokens, width * tokens**2) / width for width in WIDTHS}
    assert pace.share == min(shares.values())
    usual = {width: share for width, share in shares.items() if width <= USUAL}
    enough = min(width for width, share in usual.items() if 0.98 * share <= min(usual.values()))
    assert pace.usual == pytest.approx(enough * shares[enough])
