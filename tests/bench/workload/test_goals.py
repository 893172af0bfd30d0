import pytest

from stepbatch.bench.options import GoalOptions
from stepbatch.bench.workload.goals import MAX_KINDS, goals, kind, one_of_each
from stepbatch.bench.workload.work import WorkItem


def item(side: int = 64, steps: int | None = 4, **fields: object) -> WorkItem:
    return WorkItem(prompt="a cat", width=side, height=side, num_inference_steps=steps, **fields)  # type: ignore[arg-type]


def test_nothing_is_asked_unless_a_goal_is_given() -> None:
    assert goals([item()], GoalOptions(), {}) == [None]


def test_seconds_hold_for_all() -> None:
    assert goals([item(), item(128)], GoalOptions(slo=2.5), {}) == [2.5, 2.5]


def test_a_trace_has_goals_of_its_own() -> None:
    assert goals([item(slo_ms=500.0), item()], GoalOptions(slo=2.5), {}) == [0.5, 2.5]


def test_a_goal_is_a_multiple_of_the_idle_latency_of_the_same_kind() -> None:
    idle = {kind(item()): 1.0, kind(item(128)): 3.0}
    assert goals([item(128), item()], GoalOptions(slo=0.0, slo_scale=2.0), idle) == [6.0, 2.0]


def test_the_latency_of_a_kind_that_was_not_measured_is_scaled_by_its_work() -> None:
    idle = {kind(item(64, 4)): 1.0}
    wanted = [item(128, 4), item(64, 8), item(64, 4, n=3)]
    assert goals(wanted, GoalOptions(slo=0.0, slo_scale=1.0), idle) == pytest.approx([4.0, 2.0, 3.0])


def test_without_any_measured_latency_there_is_no_goal() -> None:
    assert goals([item()], GoalOptions(slo=0.0), {}) == [None]


def test_each_kind_is_measured_after_all_were_set_up_in_the_order_of_the_requests() -> None:
    first, second = item(64), item(128)
    found = one_of_each([first, second, item(64), item(128)])
    assert [kind(one) for one in found] == [kind(first), kind(second)] * 2
    assert len(one_of_each([item(steps=steps) for steps in range(1, 100)])) == 2 * MAX_KINDS


def test_no_prompt_is_one_that_a_server_may_remember() -> None:
    prompts = [one.prompt for one in one_of_each([item(64)])]
    assert len({item(64).prompt, *prompts}) == 3


def test_numbers_among_other_fields_make_kinds_and_text_does_not() -> None:
    plain, guided = item(extra={"user": "a"}), item(extra={"user": "a", "true_cfg_scale": 4.0})
    assert kind(plain) != kind(guided)
    assert kind(plain) == kind(item(extra={"user": "b"}))
