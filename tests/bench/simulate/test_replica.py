from __future__ import annotations

import math

from tests.bench.simulate.simulated import SERIAL, curve, kind

from stepbatch.bench.simulate.replica import Replica
from stepbatch.request import Job, JobState


def test_it_says_when_it_would_be_through() -> None:
    of, ended = curve(base=0.0, per_token=1 / 16, encode=0.5, decode=0.25), list[tuple[str, float]]()
    one = kind(of, steps=4)
    replica = Replica(SERIAL, of.costs, 1.0, lambda job, now: ended.append((job.request_id, now)))
    assert replica.until == -math.inf
    first, second = (Job(name, 0, one.request, one.lengths, 0.0) for name in "ab")
    replica.take([first], 2.0)
    assert replica.wake == 2.0 and replica.until == 2.0 + 4.75
    replica.step()
    assert replica.wake == 2.0 + 0.5 + 4.0 and replica.until == 6.75  # all steps at once
    replica.take([second], 3.0)
    assert replica.wake == 3.5 and replica.until == 6.75 + 4.75  # to the end of the step that is under way
    while replica.wake < math.inf:
        replica.step()
    assert ended == [("a", 6.75), ("b", 11.5)]
    assert first.state is second.state is JobState.FINISHED
    assert replica.until == -math.inf and replica.busy == 9.5


def test_work_left_is_none_when_all_has_ended() -> None:
    of = curve(base=0.1, per_token=0.003, encode=0.07, decode=0.03)
    hasty, endings = kind(of, steps=5, n=2, timeout=4.0), list[JobState]()
    replica = Replica(SERIAL, of.costs, 0.3, lambda job, now: endings.append(job.state))
    for number in range(10):
        jobs = [Job(str(number), i, hasty.request, hasty.lengths, 0.1 * number) for i in range(2)]
        replica.take(jobs, 0.1 * number)
    lefts = []
    while replica.wake < math.inf:
        lefts.append(replica.until - replica.wake)
        replica.step()
    assert lefts[0] > 10 and lefts == sorted(lefts, reverse=True)
    assert abs(lefts[-1]) < 1e-9
    assert set(endings) == {JobState.FINISHED, JobState.FAILED} and len(endings) == 20
