import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepbatch.engine.cost import Costs, LinearCost, StepCost

BENT = StepCost(per_token=1e-3, factors=((6.0, 2.0), (8.0, 1.0), (9.0, 1.5)))


@pytest.mark.parametrize(
    ("tokens", "factor"), [(1, 2.0), (64, 2.0), (128, 1.5), (256, 1.0), (512, 1.5), (1 << 20, 1.5), (0, 2.0)]
)
def test_the_machine_bends_the_line(tokens: int, factor: float) -> None:
    assert BENT.factor(tokens) == pytest.approx(factor)
    assert BENT.seconds(tokens, 0) == pytest.approx(1e-3 * tokens * factor)


@given(st.integers(1, 10**6), st.integers(1, 10**6))
def test_a_step_takes_at_least_what_launching_and_streaming_it_do(tokens: int, squares: int) -> None:
    cost = StepCost(host=0.5, streamed=0.7, base=0.1, per_token=1e-6, per_square=1e-8)
    straight = 0.1 + 1e-6 * tokens + 1e-8 * squares
    assert cost.seconds(tokens, squares) == pytest.approx(max(0.7, straight))
    assert cost.work(tokens, squares) == pytest.approx(straight - 0.1)


def test_no_job_is_free_whatever_the_fit_says() -> None:
    assert StepCost().work(10, 100) > 0


def test_costs_cross_a_boundary() -> None:
    costs = Costs(known=True, step=BENT, decode=LinearCost(each=1.0, per_unit=2.0))
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(costs), type=Costs) == costs
    assert costs.decode.of(3) == 7.0
