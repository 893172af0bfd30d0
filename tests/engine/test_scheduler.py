from collections import Counter
from dataclasses import replace
from itertools import count
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepbatch.config import BatchingConfig
from stepbatch.engine.cost import Costs, LinearCost, StepCost
from stepbatch.engine.plan import Plan
from stepbatch.engine.scheduler import Scheduler
from stepbatch.errors import GenerationFailed
from stepbatch.image import InputImage
from stepbatch.request import GenerationRequest, Job, JobState

serial = count()


def job(
    tokens: int = 1,
    steps: int = 1,
    arrival: float = 0.0,
    alone: bool = False,
    name: str = "",
    index: int = 0,
    signature: str | None = None,
) -> Job:
    request = GenerationRequest(prompt="x", num_inference_steps=steps, seed=0, n=10, width=16, height=16)
    return Job(name or f"request-{next(serial)}", index, request, (tokens,), arrival, alone, signature)


def scheduler(size: int = 8, tokens: int = 100, encodes: int = 2, decodes: int = 2, delay_ms: float = 0.0) -> Scheduler:
    return Scheduler(
        BatchingConfig(
            dynamic_batch_max_size=size,
            dynamic_batch_delay_ms=delay_ms,
            max_batch_tokens=tokens,
            max_encodes_per_step=encodes,
            max_decodes_per_step=decodes,
        )
    )


def advance(under_test: Scheduler, plan: Plan) -> list[Job]:
    """What the engine does with a plan in which nothing fails."""
    finished = under_test.finish(one for one in plan.decode if not one.ended)
    for one in plan.encode:
        if not one.ended:
            one.to(JobState.RUNNING)
    under_test.advance(one for one in plan.denoise if not one.ended)
    return finished


def by_arrival(under_test: Scheduler) -> list[Job]:
    """The jobs that are to be denoised."""
    return sorted(under_test.denoising.values(), key=lambda one: one.arrival)


def checked_schedule(under_test: Scheduler) -> Plan:
    """Schedule, and hold the plan against the limits and the order of arrival."""
    order = [(one, one.state is JobState.WAITING) for one in by_arrival(under_test)]
    plan, limits = under_test.schedule(0.0), under_test.limits
    assert len(plan.denoise) <= limits.dynamic_batch_max_size
    assert len(plan.denoise) == 1 or sum(one.tokens for one in plan.denoise) <= limits.max_batch_tokens
    assert len({one.request_id for one in plan.encode}) <= limits.max_encodes_per_step
    assert len(plan.decode) <= limits.max_decodes_per_step
    for unit in (plan.encode, plan.denoise, plan.decode):
        assert len(unit) <= 1 or not any(one.alone for one in unit)
    assert all(one in plan.denoise for one in plan.encode)
    # The oldest job always takes a step, so every job gets to be the oldest: nothing starves.
    assert not order or plan.denoise[0] is order[0][0]
    assert bool(plan.decode) == bool(under_test.decoding)
    check_nobody_is_passed_over(order, plan, limits)
    return plan


def check_nobody_is_passed_over(order: list[tuple[Job, bool]], plan: Plan, limits: BatchingConfig) -> None:
    """A job is left out only if it didn't fit in the room that the chosen ones that arrived before it left."""
    before: list[Job] = []
    encoded: set[str] = set()
    for one, waiting in order:
        if one in plan.denoise:
            before.append(one)
            encoded |= {one.request_id} if waiting else set()
            continue
        full = len(before) == limits.dynamic_batch_max_size or any(other.alone for other in before)
        no_room = one.alone or one.tokens > limits.max_batch_tokens - sum(other.tokens for other in before)
        no_encode = waiting and one.request_id not in encoded and len(encoded) == limits.max_encodes_per_step
        assert before
        assert full or no_room or no_encode


limits = st.builds(
    scheduler,
    size=st.integers(1, 5),
    tokens=st.integers(1, 30),
    encodes=st.integers(1, 3),
    decodes=st.integers(1, 3),
)
requests = st.tuples(
    st.integers(1, 4),  # outputs
    st.integers(1, 40),  # tokens
    st.integers(1, 4),  # steps
    st.sampled_from([0.0, 0.0, 0.0, 5.0]),  # seconds that it is late
    st.sampled_from([False, False, False, True]),  # alone
)
operations = st.one_of(
    st.tuples(st.just("add"), requests),
    st.tuples(st.just("step"), st.sets(st.integers(0, 9), max_size=2)),  # the jobs of the plan that fail
    st.tuples(st.just("cancel"), st.integers(0, 20)),
)


@given(limits, st.lists(operations, max_size=40))
def test_any_sequence_keeps_the_limits_and_ends_every_job_once(
    under_test: Scheduler, sequence: list[tuple[str, Any]]
) -> None:
    jobs: list[Job] = []
    endings: Counter[tuple[str, int]] = Counter()

    def step(failing: set[int]) -> None:
        plan = checked_schedule(under_test)
        for index, one in enumerate(plan.denoise + plan.decode):
            if index in failing:
                one.fail(GenerationFailed("x"))
                under_test.remove(one)
                endings[one.id] += 1
        endings.update(one.id for one in advance(under_test, plan))

    for now, (what, value) in enumerate(sequence):
        live = [one for one in jobs if not one.ended]
        if what == "add":
            n, tokens, steps, late, alone = value
            name = f"request-{next(serial)}"
            new = [job(tokens, steps, now - late, alone, name, index) for index in range(n)]
            for one in new:
                under_test.add(one)
            jobs += new
            assert under_test.get(name) == new
        elif what == "cancel" and live:
            one = live[value % len(live)]
            one.cancel()
            under_test.remove(one)
            endings[one.id] += 1
        elif what == "step":
            step(value)
        assert len(under_test) == sum(not one.ended for one in jobs)
        assert under_test.waiting == sum(one.state is JobState.WAITING for one in jobs)
    for _ in range(sum(one.steps + 1 for one in jobs)):
        step(set())
    assert len(under_test) == 0
    assert under_test.waiting == 0
    assert endings == Counter(one.id for one in jobs)


@given(limits, st.lists(st.tuples(st.integers(1, 40), st.integers(1, 4), st.booleans()), min_size=1, max_size=6))
def test_nothing_starves_while_small_jobs_keep_coming(
    under_test: Scheduler, first: list[tuple[int, int, bool]]
) -> None:
    jobs = [job(tokens, steps, arrival=0.0, alone=alone) for tokens, steps, alone in first]
    for one in jobs:
        under_test.add(one)
    for now in range(1, sum(one.steps for one in jobs) + 1):  # at most one step of one of them at a time
        under_test.add(job(tokens=1, steps=1, arrival=now))
        advance(under_test, checked_schedule(under_test))
    assert all(one.step == one.steps for one in jobs)


def test_an_empty_scheduler_plans_nothing() -> None:
    assert not scheduler().schedule(0.0)


def test_a_job_that_arrived_earlier_goes_before_those_already_here() -> None:
    under_test = scheduler(size=1)
    late, later, early = job(arrival=2), job(arrival=3), job(arrival=1)
    for one in (late, later, early):
        under_test.add(one)
    assert under_test.schedule(0.0).denoise == [early]


def test_a_newcomer_joins_at_the_next_step() -> None:
    under_test = scheduler()
    old, new = job(steps=3), job(steps=3, arrival=1)
    under_test.add(old)
    advance(under_test, under_test.schedule(0.0))
    under_test.add(new)
    assert under_test.schedule(0.0).denoise == [old, new]


def test_small_jobs_fill_the_room_beside_a_large_one_and_give_way_to_it() -> None:
    under_test = scheduler(tokens=10, encodes=8)
    first, large, small = job(6, steps=1), job(10, steps=1, arrival=1), job(4, steps=2, arrival=2)
    for one in (first, large, small):
        under_test.add(one)
    chosen = []
    for _ in range(3):
        plan = checked_schedule(under_test)
        chosen.append(plan.denoise)
        advance(under_test, plan)
    assert chosen == [[first, small], [large], [small]]


def test_a_job_over_the_token_limit_runs_by_itself() -> None:
    under_test = scheduler(tokens=10)
    oversize = job(1000)
    under_test.add(oversize)
    under_test.add(job(1, arrival=1))
    assert under_test.schedule(0.0).denoise == [oversize]


def test_the_outputs_of_a_request_count_as_one_encode() -> None:
    under_test = scheduler(encodes=1)
    together = [job(name="same", index=index) for index in range(3)]
    other = job(arrival=1)
    for one in (*together, other):
        under_test.add(one)
    assert under_test.schedule(0.0).encode == together


@pytest.mark.parametrize("position", [0, 1, 2])
def test_a_job_that_must_be_alone_shares_no_unit(position: int) -> None:
    under_test = scheduler(encodes=8, decodes=8)
    jobs = [job(arrival=index, alone=index == position) for index in range(3)]
    for one in jobs:
        under_test.add(one)
    finished: list[Job] = []
    while len(under_test):
        finished += advance(under_test, checked_schedule(under_test))
    assert Counter(one.id for one in finished) == Counter(one.id for one in jobs)


def test_jobs_that_ended_within_the_step_stay_where_they_are() -> None:
    under_test = scheduler()
    gone, here = job(), job(arrival=1)
    under_test.add(gone)
    under_test.add(here)
    plan = under_test.schedule(0.0)
    gone.cancel()
    under_test.remove(gone)
    assert advance(under_test, plan) == []
    assert (gone.step, here.step) == (0, 1)
    assert list(under_test.decoding.values()) == [here]


def test_images_count_as_much_as_requests_in_what_is_encoded_at_once() -> None:
    under_test = scheduler(encodes=3)
    image = InputImage(1, 1, bytes(3))
    for name, images in (("a", 2), ("b", 2), ("c", 1), ("d", 5)):
        request = replace(job(steps=9).request, images=(image,) * images)
        under_test.add(Job(name, 0, request, (1,), 0.0))
    encoded = []
    for _ in range(3):
        plan = under_test.schedule(0.0)
        encoded.append([one.request_id for one in plan.encode])
        advance(under_test, plan)
    assert encoded == [["a", "c"], ["b"], ["d"]]  # one that is over the limit by itself is encoded by itself


def calls(*described: tuple[str, float], size: int = 2, delay_ms: float = 100.0) -> tuple[Scheduler, list[Job]]:
    """A scheduler with jobs of these signatures and arrivals, that are denoised in one call."""
    under_test = scheduler(size=size, delay_ms=delay_ms)
    jobs = [job(signature=signature, arrival=arrival, steps=9) for signature, arrival in described]
    for one in jobs:
        under_test.add(one)
    return under_test, jobs


def test_whole_calls_are_of_one_signature_and_skip_whoever_does_not_match() -> None:
    under_test, (first, other, second, third) = calls(("a", 0), ("b", 1), ("a", 2), ("a", 3), delay_ms=0)
    assert under_test.schedule(3.0).denoise == [first, second]
    for one in (first, second):
        one.to(JobState.RUNNING)
    under_test.advance([first, second])
    assert (first.step, second.step) == (9, 9)
    plan = under_test.schedule(3.0)
    assert (plan.decode, plan.denoise) == ([first, second], [other])  # the oldest is next, then what is left of a
    assert third.state is JobState.WAITING


def test_a_batch_waits_for_company_from_the_arrival_of_its_oldest() -> None:
    under_test, (one,) = calls(("a", 5.0))
    plan = under_test.schedule(5.04)
    assert not plan
    assert plan.wait == pytest.approx(0.06)
    assert under_test.schedule(5.1).denoise == [one]
    queued, (behind,) = calls(("a", 5.0))
    assert queued.schedule(7.0).denoise == [behind]  # a call ran meanwhile: it waits no second time


def test_after_a_call_those_it_answered_have_a_moment_to_come_back() -> None:
    under_test, (behind, other) = calls(("a", 5.0), ("b", 6.0), delay_ms=100)
    under_test.pause("a", 7.0, 1.0)
    assert under_test.schedule(7.0).denoise == [other]  # nobody of this kind was answered
    under_test.remove(_cancelled(other))
    assert under_test.schedule(7.0).wait == pytest.approx(0.03)
    back = job(signature="a", arrival=7.02)
    under_test.add(back)
    assert under_test.schedule(7.02).denoise == [behind, back]  # full
    impatient, (alone,) = calls(("a", 5.0), delay_ms=10)
    impatient.pause("a", 7.0, 1.0)
    assert impatient.schedule(7.01).denoise == [alone]  # the delay is the longest that anyone waits
    never, (at_once,) = calls(("a", 5.0), delay_ms=0)
    never.pause("a", 7.0, 1.0)
    assert never.schedule(7.0).denoise == [at_once]


def test_a_full_batch_waits_for_nobody() -> None:
    under_test, (head, first, second) = calls(("a", 0.0), ("b", 0.01), ("b", 0.02))
    assert under_test.schedule(0.03).denoise == [first, second]
    for one in (first, second):
        under_test.remove(_cancelled(one))
    assert under_test.schedule(0.03).wait == pytest.approx(0.07)
    assert head.state is JobState.WAITING


@pytest.mark.parametrize(("tokens", "count", "room_for"), [(6, 2, 1), (6, 1, 1), (11, 1, 1), (5, 1, None), (5, 2, 2)])
def test_a_batch_with_no_room_for_another_is_full(tokens: int, count: int, room_for: int | None) -> None:
    under_test = scheduler(tokens=10, delay_ms=100)
    jobs = [job(tokens=tokens, signature="a", arrival=0.01 * index) for index in range(count)]
    for one in jobs:
        under_test.add(one)
    assert under_test.schedule(0.02).denoise == (jobs[:room_for] if room_for else [])


def test_who_has_no_company_waits_for_none() -> None:
    under_test = scheduler(delay_ms=100)
    native, alone = job(arrival=0.0), job(arrival=0.01, signature="a", alone=True)
    waiting = job(arrival=0.005, signature="a")
    for one in (native, waiting):
        under_test.add(one)
    assert under_test.schedule(0.0).denoise == [native]
    under_test.remove(_cancelled(native))
    under_test.add(alone)
    assert under_test.schedule(0.02).denoise == [alone]


def _cancelled(one: Job) -> Job:
    one.cancel()
    return one


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.floats(0, 1), st.booleans()), min_size=1, max_size=20),
    st.integers(1, 4),
    st.floats(0, 300),
    st.floats(0, 2),
)
def test_whole_calls_keep_their_promises(
    described: list[tuple[str, float, bool]], size: int, delay_ms: float, now: float
) -> None:
    under_test = scheduler(size=size, delay_ms=delay_ms, tokens=100, encodes=100)
    jobs = [job(signature=name, arrival=arrival, alone=alone) for name, arrival, alone in described]
    for one in jobs:
        under_test.add(one)
    queued = by_arrival(under_test)
    plan = under_test.schedule(now)
    if plan:
        head = plan.denoise[0]
        assert plan.wait == 0
        assert len(plan.denoise) <= (1 if head.alone else size)
        assert {one.signature for one in plan.denoise} == {head.signature}
        full = head.alone or len(plan.denoise) == size
        assert full or head.arrival + delay_ms / 1000 <= now
        company = [one for one in queued if one.signature == head.signature and not one.alone]
        assert plan.denoise == ([head] if head.alone else company[:size])  # the oldest, none passed over
    else:
        assert 0 < plan.wait <= max(one.arrival for one in jobs) + delay_ms / 1000 - now
        assert under_test.schedule(now + plan.wait + 1e-6)  # and then there is something to do


PROMPT = LinearCost(each=1e-9)
KNOWN = Costs(known=True, step=StepCost(base=1.0, per_token=0.1), prompt=PROMPT, decode=LinearCost(each=3.0))


def measured(costs: Costs = KNOWN, **limits: Any) -> Scheduler:
    """A scheduler that knows what steps cost and is told no widths."""
    return Scheduler(BatchingConfig(**limits), costs)


def filled(under_test: Scheduler, *jobs: Job) -> Scheduler:
    for one in jobs:
        under_test.add(one, one.arrival)
    return under_test


@pytest.mark.parametrize(("base", "width"), [(0.0, 1), (0.01, 24), (10.0, 50)])
def test_a_step_is_as_wide_as_pays(base: float, width: int) -> None:
    costs = Costs(known=True, step=StepCost(base=base, per_token=0.01), prompt=PROMPT)
    under_test = filled(measured(costs), *(job(arrival=index) for index in range(50)))
    assert len(under_test.schedule(50.0).denoise) == pytest.approx(width, abs=2)
    assert len(filled(measured(costs, max_batch_tokens=7), *(job() for _ in range(50))).schedule(0).denoise) == 7
    assert len(filled(measured(costs, dynamic_batch_max_size=2), *(job() for _ in range(9))).schedule(0).denoise) <= 2


def test_small_jobs_that_can_not_fill_a_step_do_not_keep_large_ones_out() -> None:
    costs = Costs(known=True, step=StepCost(host=10.0, per_token=0.001), prompt=PROMPT)
    mixed = [job(100 if index % 8 else 2, arrival=index) for index in range(64)]
    assert len(filled(measured(costs), *mixed).schedule(64.0).denoise) == 64


def test_what_memory_has_no_room_for_is_not_planned() -> None:
    under_test = filled(
        measured(Costs(known=True, step=StepCost(base=9.0), prompt=PROMPT)), *(job(10) for _ in range(9))
    )
    under_test.most_tokens = 35
    assert len(under_test.schedule(0).denoise) == 3


def test_the_shortest_goes_first_and_takes_the_step_of_one_that_has_begun() -> None:
    one_by_one = Costs(known=True, step=StepCost(per_token=1.0))  # what pays best
    long, short = job(steps=50), job(steps=2, arrival=1.0)
    under_test = filled(measured(one_by_one), long)
    for _ in range(2):
        advance(under_test, under_test.schedule(0.0))
    filled(under_test, short)
    chosen = []
    for _ in range(3):
        plan = under_test.schedule(2.0)
        chosen += plan.denoise
        advance(under_test, plan)
    assert chosen == [short, short, long]
    in_order = filled(measured(one_by_one, scheduling_policy="fcfs"), job(steps=50), job(steps=2, arrival=1.0))
    assert in_order.schedule(2.0).denoise[0].steps == 50


ONE_BY_ONE = Costs(known=True, step=StepCost(per_token=1.0))  # a step of a token takes a second, however wide


def test_what_is_long_gets_its_turn_however_many_short_ones_come() -> None:
    long = job(steps=100, arrival=200.0)
    shorts = [job(steps=4, arrival=4 * number / 1.5) for number in range(400)]  # half as many again as can be done
    coming, under_test, now, passed = sorted([long, *shorts], key=lambda one: one.arrival), measured(ONE_BY_ONE), 0.0, 0
    while long.state is not JobState.FINISHED:
        while coming and coming[0].arrival <= now:
            filled(under_test, coming.pop(0))
        passed += sum(one.arrival > long.arrival for one in advance(under_test, under_test.schedule(now)))
        now += 1
    assert 20 < passed < 200, "short ones have a start, but not for ever"
    assert under_test.waiting > 50, "they would have kept the machine busy"


def test_of_equal_jobs_none_goes_before_another_whatever_is_learned_meanwhile() -> None:
    under_test, done, now = measured(ONE_BY_ONE), list[Job](), 0.0
    steps = [9, 2, 30] * 40
    coming = [job(steps=steps[i], arrival=float(min(i, 60))) for i in range(120)]  # calm, and then all at once
    while len(done) < 120:
        while coming and coming[0].arrival <= now:
            filled(under_test, coming.pop(0))
        plan = under_test.schedule(now)
        done += advance(under_test, plan)
        now += 1
    for alike in (2, 9, 30):
        arrivals = [one.arrival for one in done if one.steps == alike]
        assert arrivals == sorted(arrivals)


def test_a_decay_that_is_given_is_kept() -> None:
    calm = [job(steps=50), job(steps=8, arrival=40.0)]
    first = [Scheduler(BatchingConfig(), ONE_BY_ONE, decay) for decay in (0.0, 1.0, 1e-3)]
    assert [filled(one, *calm).in_order()[0].steps for one in first] == [50, 50, 8]


def test_a_plan_stands_until_someone_comes_or_is_through() -> None:
    under_test = filled(measured(dynamic_batch_max_size=2), job(steps=5), job(steps=3), job(steps=9, arrival=1.0))
    plan = under_test.schedule(1.0)
    assert plan.steps == 3
    advance(under_test, plan)
    assert under_test.schedule(1.0).denoise == plan.denoise
    assert under_test.schedule(1.0).steps == 2
    under_test.advance(plan.denoise, 1.0, steps=2)
    after = under_test.schedule(1.0)
    assert [one.steps for one in after.decode] == [3]
    assert sorted(one.steps for one in after.denoise) == [5, 9]
    newcomer = job(steps=1, arrival=2.0)
    filled(under_test, newcomer)
    assert newcomer in under_test.schedule(2.0).denoise


def test_decoding_takes_no_longer_than_two_of_the_steps_that_wait_for_it() -> None:
    def decodes(tokens: int, others: int) -> int:
        under_test = filled(measured(max_batch_tokens=1000), *(job(tokens, steps=1) for _ in range(8)))
        advance(under_test, under_test.schedule(0.0))
        filled(under_test, *(job(tokens, steps=9) for _ in range(others)))
        return len(under_test.schedule(0.0).decode)

    assert decodes(tokens=10, others=0) == 8  # nobody is kept waiting
    assert decodes(tokens=10, others=1) == 1  # two seconds a step, three a picture
    assert decodes(tokens=100, others=1) == 7  # eleven seconds a step


def test_what_cannot_be_on_time_is_told_once() -> None:
    def due(timeout: float | None) -> Job:
        one = job(10, steps=10)  # of two seconds
        one.request = replace(one.request, timeout=timeout)
        return one

    lost, soon, never, begun = due(5.0), due(100.0), due(None), due(30.0)
    under_test = filled(measured(dynamic_batch_max_size=1, scheduling_policy="deadline"), begun)
    under_test.schedule(0.0)
    filled(under_test, lost, soon, never)
    assert under_test.late(0.1) == [lost]
    assert under_test.late(0.2) == []
    lost.cancel()
    under_test.remove(lost)
    under_test.learn(Costs(known=True, step=StepCost(host=8.0)), 0.2)  # so that it takes 80 seconds
    assert under_test.late(27.0) == []
    assert under_test.late(29.0) == [soon]  # the one that has begun is let be


def test_shares_are_fair_where_that_is_asked_for() -> None:
    def of(user: str, arrival: float) -> Job:
        one = job(arrival=arrival)
        one.request = replace(one.request, user=user)
        return one

    def second(fair: bool) -> str | None:
        flood = [of("much", 0.1 * index) for index in range(9)]
        under_test = filled(measured(dynamic_batch_max_size=1, fair_shares=fair), *flood, of("little", 5.0))
        advance(under_test, under_test.schedule(5.0))
        return under_test.schedule(5.0).denoise[0].request.user

    assert second(fair=True) == "little"
    assert second(fair=False) == "much"


def test_what_is_learned_counts_at_once() -> None:
    jobs = [job(arrival=index) for index in range(20)]
    under_test = filled(measured(Costs(known=True, step=StepCost(base=9.0, per_token=0.01), prompt=PROMPT)), *jobs)
    wide = len(under_test.schedule(20.0).denoise)
    under_test.learn(Costs(known=True, step=StepCost(per_token=0.01)), 20.0)
    assert (wide, len(under_test.schedule(20.0).denoise)) == (20, 1)


def test_what_cannot_be_on_time_any_more_gives_way_in_mid_job() -> None:
    costs = Costs(known=True, step=StepCost(per_token=1.0))
    doomed, other = job(steps=20), job(steps=5)
    doomed.request, other.request = replace(doomed.request, timeout=21.0), replace(other.request, timeout=40.0)
    under_test = filled(measured(costs, dynamic_batch_max_size=1, scheduling_policy="deadline"), doomed, other)
    plan = under_test.schedule(0.0)
    assert plan.denoise == [doomed]
    for one in plan.encode:
        one.to(JobState.RUNNING)
    under_test.advance([doomed], 6.0)  # a hiccup
    assert under_test.schedule(6.0).denoise == [other]


def test_deadlines_of_those_that_are_gone_are_forgotten() -> None:
    under_test = measured(dynamic_batch_max_size=1)
    for _ in range(1000):
        one = job()
        one.request = replace(one.request, timeout=3600.0)
        filled(under_test, one)
        under_test.remove(_cancelled(one))
    assert len(under_test._due) < 100


def test_flags_of_whole_calls_mean_what_they_say_once_costs_are_known() -> None:
    under_test = Scheduler(
        BatchingConfig(dynamic_batch_max_size=4, dynamic_batch_delay_ms=1000),
        Costs(known=True, step=StepCost(per_token=1e-3)),
    )
    filled(under_test, job(signature="a"), job(signature="a", arrival=0.05))
    assert under_test.schedule(0.1).wait == pytest.approx(0.9)
    assert len(under_test.schedule(1.0).denoise) == 2
