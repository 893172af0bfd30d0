import math

from stepbatch.engine.policies import LEAST, POLICIES, Outlook, boost, deadline, fcfs, srpt
from stepbatch.request import GenerationRequest, Job


def job(arrival: float = 0.0, timeout: float | None = None, priority: int = 0) -> Job:
    request = GenerationRequest(prompt="x", num_inference_steps=1, seed=0, timeout=timeout, priority=priority)
    return Job("a", 0, request, (1,), arrival)


def outlook(remaining: float, now: float = 0.0, ageing: float = 0.5, decay: float = 0.1) -> Outlook:
    return Outlook(remaining, now, ageing, usual=remaining, decay=decay)


def test_in_order_of_arrival_whatever_is_left() -> None:
    assert fcfs(job(1.0), outlook(99.0)) < fcfs(job(2.0), outlook(1.0))


def test_the_shortest_first_until_what_is_long_has_waited_for_it() -> None:
    long = srpt(job(0.0), outlook(10.0))
    assert srpt(job(17.0), outlook(1.0)) < long
    assert srpt(job(19.0), outlook(1.0)) > long  # nine seconds less are made up for by eighteen of waiting
    assert srpt(job(1000.0), outlook(1.0, ageing=0.0)) < srpt(job(0.0), outlook(10.0, ageing=0.0))
    assert srpt(job(1.0), outlook(5.0)) < srpt(job(1.5), outlook(5.0))


def test_a_start_for_what_is_short_that_ends() -> None:
    long = boost(job(0.0), outlook(30.0))
    start = -math.log(1 - math.exp(-0.1)) / 0.1 + math.log(1 - math.exp(-3.0)) / 0.1  # of one second over thirty
    assert boost(job(start - 0.01), outlook(1.0)) < long < boost(job(start + 0.01), outlook(1.0))
    assert boost(job(3.0), outlook(5.0)) < boost(job(3.5), outlook(5.0))
    assert boost(job(3.0), outlook(4.9)) < boost(job(3.0), outlook(5.0)), "a job that runs goes ahead of its like"


def test_the_start_is_the_greater_the_longer_waits_are() -> None:
    starts = [
        -boost(job(), outlook(1.0, decay=decay))[0] + boost(job(), outlook(9.0, decay=decay))[0]
        for decay in (1.0, 0.1, 0.01, 0.001)
    ]
    assert starts == sorted(starts)
    assert starts[0] < 0.5


def test_nothing_known_is_as_they_came() -> None:
    assert boost(job(1.0), outlook(99.0, decay=0.0)) < boost(job(2.0), outlook(1.0, decay=0.0))
    assert boost(job(1.0), outlook(0.0)) < boost(job(2.0), outlook(0.0))
    assert math.isfinite(boost(job(1.0), outlook(LEAST / 9))[0])


def test_the_earliest_deadline_of_the_highest_priority_first_and_what_is_lost_last() -> None:
    ordered = [
        deadline(job(timeout=9.0, priority=1), outlook(1.0)),
        deadline(job(timeout=5.0), outlook(1.0)),
        deadline(job(timeout=6.0), outlook(1.0)),
        deadline(job(1.0), outlook(1.0)),
        deadline(job(2.0), outlook(1.0)),
        deadline(job(timeout=5.0), outlook(6.0)),
    ]
    assert ordered == sorted(ordered)
    assert deadline(job(), outlook(1.0))[2] == math.inf


def test_every_policy_gives_keys_that_compare() -> None:
    for policy in POLICIES.values():
        keys = [policy(one, outlook(1.0)) for one in (job(), job(timeout=1.0), job(1.0, priority=3))]
        assert sorted(keys)
