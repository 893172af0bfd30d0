from __future__ import annotations

import random
from collections import Counter

from stepbatch.bench.simulate.routing import LeastWork, RoundRobin, TwoChoices


def test_they_take_turns() -> None:
    router = RoundRobin(3, random.Random(0))
    assert [router.choose(0.0) for _ in range(5)] == [0, 1, 2, 0, 1]


def test_the_one_with_the_least_work_is_taken() -> None:
    router, chance = LeastWork(5, random.Random(0)), random.Random(1)
    until = [0.0] * 5
    for _ in range(500):
        replica = chance.randrange(5)
        until[replica] = chance.uniform(0, 10)
        router.tell(replica, until[replica])
        assert until[router.choose(0.0)] == min(until)


def test_the_better_of_two_is_taken_and_any_two_are_drawn() -> None:
    router = TwoChoices(3, random.Random(0))
    for replica, until in enumerate((5.0, 1.0, 3.0)):
        router.tell(replica, until)
    drawn = Counter(router.choose(0.0) for _ in range(3000))
    assert drawn[0] == 0  # the worst of three is never the better of two
    assert abs(drawn[1] - 2000) < 120 and abs(drawn[2] - 1000) < 120


def test_a_single_replica_gets_everything() -> None:
    for router in (RoundRobin(1, random.Random(0)), LeastWork(1, random.Random(0)), TwoChoices(1, random.Random(0))):
        assert {router.choose(0.0) for _ in range(5)} == {0}
