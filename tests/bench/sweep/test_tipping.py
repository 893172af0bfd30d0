import heapq
import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.bench.made import made, record

from stepbatch.bench.report.summary import summarize
from stepbatch.bench.results import Record
from stepbatch.bench.sweep.tipping import Search, SweepPoint, Unit, kept_up, knee, tipped, tipping


def point(
    load: float, throughput: float = 1.0, *, unit: Unit = "concurrency", meets: bool = True, steady: bool = True
) -> SweepPoint:
    summary = summarize([], [])
    summary.throughput_qps = throughput
    return SweepPoint(load=load, unit=unit, summary=summary, meets=meets, steady=steady)


def curve(throughput: Callable[[float], float], loads: Sequence[float], unit: Unit = "concurrency") -> list[SweepPoint]:
    return [point(load, throughput(load), unit=unit) for load in loads]


DOUBLING = [2**i for i in range(9)]


def batching(concurrency: float, alone: float = 0.1, each: float = 0.02, width: int = 8) -> float:
    """A batch takes as long as one, and a little more for each; it has at most so many."""
    wide = min(concurrency, width)
    return wide / (alone + each * wide)


def loads(points: Sequence[SweepPoint]) -> list[float]:
    return [p.load for p in points]


class TestKnee:
    def test_of_one_server_in_a_row_is_its_capacity(self) -> None:
        found = knee(curve(lambda rate: min(rate, 10.0), [1, 2, 4, 8, 10, 16, 32], "rate"))
        assert found is not None
        assert found.load == 10

    def test_of_a_closed_loop_with_random_service_times_is_where_the_server_is_busy(self) -> None:
        # M/M/1 with as many customers, each of whom pauses as long as being served takes: chance that nobody is served
        def throughput(customers: float) -> float:
            return 5.0 * (1 - 1 / sum(math.perm(int(customers), k) for k in range(int(customers) + 1)))

        found = knee(curve(throughput, [1, 2, 3, 4, 6, 8, 16]))
        assert found is not None
        assert found.load == 4  # busy 98% of the time; with 3, 94%

    def test_of_a_server_that_batches_is_its_batch_size(self) -> None:
        found = knee(curve(batching, DOUBLING))
        assert found is not None
        assert found.load == 8

    @pytest.mark.parametrize("seed", range(20))
    def test_stays_where_it_is_in_spite_of_noise(self, seed: int) -> None:
        noise = np.random.default_rng(seed)
        found = knee(curve(lambda load: batching(load) * noise.normal(1, 0.01), DOUBLING))
        assert found is not None
        assert found.load == 8

    def test_is_where_throughput_is_best_if_more_load_only_harms(self) -> None:
        found = knee(curve(lambda load: load if load <= 4 else 4 / load, DOUBLING))
        assert found is not None
        assert found.load == 4

    def test_is_not_known_while_throughput_grows(self) -> None:
        assert knee(curve(lambda load: load, DOUBLING)) is None
        assert knee(curve(lambda load: load, [10, 10.4], "rate")) is None

    def test_is_not_known_from_loads_that_hardly_differ(self) -> None:
        assert knee([point(10, 10), point(11, 10.1)]) is None

    def test_is_known_from_loads_that_hardly_differ_if_the_server_fell_behind(self) -> None:
        found = knee([point(10, 10, unit="rate"), point(11, 10.1, unit="rate", steady=False)])
        assert found is not None
        assert found.load == 10

    def test_does_not_mind_the_order(self) -> None:
        found = knee(curve(batching, DOUBLING[::-1]))
        assert found is not None
        assert found.load == 8

    def test_is_none_where_nothing_was_answered(self) -> None:
        assert knee([]) is None
        assert knee([point(1, 0.0), point(2, 0.0)]) is None

    def test_of_a_run_of_many_requests(self) -> None:
        results = {c: made(requests=400, slots=4, concurrency=c) for c in (1, 2, 4, 8, 16)}
        points = [SweepPoint(load=c, unit="concurrency", summary=r.summary, meets=True) for c, r in results.items()]
        found = knee(points)
        assert found is not None
        assert found.load == 4


class TestTipping:
    def test_is_the_highest_load_before_the_first_that_was_too_much(self) -> None:
        points = [point(1), point(2), point(4, meets=False), point(8, meets=False)]
        found, over = tipping(points), tipped(points)
        assert found is not None
        assert over is not None
        assert (found.load, over.load) == (2, 4)

    def test_does_not_count_a_success_beyond_a_failure(self) -> None:
        found = tipping([point(8), point(4, meets=False), point(2), point(1)])
        assert found is not None
        assert found.load == 2

    def test_does_not_count_a_goal_that_is_met_while_the_queue_grows(self) -> None:
        found = tipping([point(1), point(2, steady=False), point(4)])
        assert found is not None
        assert found.load == 1

    def test_takes_the_worse_of_two_runs_at_one_load(self) -> None:
        found = tipping([point(1), point(2), point(2, meets=False)])
        assert found is not None
        assert found.load == 1

    def test_is_none_if_the_least_was_too_much(self) -> None:
        assert tipping([point(1, meets=False), point(2)]) is None
        assert tipping([]) is None

    def test_nothing_was_too_much_where_all_were_good(self) -> None:
        assert tipped([point(1), point(2)]) is None
        assert tipped([]) is None

    @given(st.lists(st.tuples(st.integers(1, 9), st.booleans(), st.booleans()), max_size=12))
    def test_agrees_with_its_definition(self, tried: list[tuple[int, bool, bool]]) -> None:
        points = [point(load, meets=meets, steady=steady) for load, meets, steady in tried]
        fine = [p for p in points if all(other.good for other in points if other.load <= p.load)]
        found, over = tipping(points), tipped(points)
        assert (found.load if found else None) == max(loads(fine), default=None)
        assert (over.load if over else None) == min((p.load for p in points if not p.good), default=None)


class TestKeptUp:
    @staticmethod
    def queue(
        rate: float, requests: int, services: Sequence[float] = (1.0,), slots: int = 1, seed: int = 0
    ) -> list[Record]:
        """Requests at random times on so many slots, each of which takes one of ``services`` seconds."""
        random = np.random.default_rng(seed)
        records, free = [], [0.0] * slots
        for i, at in enumerate(np.cumsum(random.exponential(1 / rate, requests)).tolist()):
            ended = max(at, heapq.heappop(free)) + float(random.choice(services))
            heapq.heappush(free, ended)
            records.append(record(i, intended=at, ended=ended))
        return records

    @pytest.mark.parametrize("seed", range(10))
    @pytest.mark.parametrize("rate", [0.1, 0.5, 0.8])
    def test_under_its_capacity_a_server_does(self, rate: float, seed: int) -> None:
        assert kept_up(self.queue(rate, 300, seed=seed))

    @pytest.mark.parametrize("seed", range(10))
    @pytest.mark.parametrize("rate", [1.4, 2.0, 100.0])
    def test_over_its_capacity_it_does_not(self, rate: float, seed: int) -> None:
        assert not kept_up(self.queue(rate, 300, seed=seed))

    @pytest.mark.parametrize("requests", [15, 30, 100])
    def test_requests_of_different_sizes_are_no_falling_behind(self, requests: int) -> None:
        def idle(seed: int) -> list[Record]:  # four slots that are busy for less than a third of the time
            return self.queue(0.4, requests, (1.0, 1.0, 1.0, 8.0), 4, seed)

        assert sum(kept_up(idle(seed)) for seed in range(40)) >= 38

    def test_too_many_requests_of_different_sizes_are(self) -> None:
        assert not any(kept_up(self.queue(3.0, 100, (1.0, 1.0, 1.0, 8.0), 4, seed)) for seed in range(20))

    def test_all_at_once_tells_nothing(self) -> None:
        assert kept_up([record(i, intended=1.0, ended=2.0 + i) for i in range(20)])

    def test_a_long_latency_alone_is_no_falling_behind(self) -> None:
        assert kept_up([record(i, intended=0.1 * i, ended=0.1 * i + 60.0) for i in range(20)])

    def test_answers_out_of_order_are_none_either(self) -> None:
        assert kept_up([record(i, intended=1.0 * i, ended=1.0 * i + (2.0 if i % 3 else 4.0)) for i in range(60)])

    def test_a_few_requests_tell_nothing(self) -> None:
        assert kept_up(self.queue(100.0, 7))
        assert kept_up([])


def drive(search: Search, good: Callable[[float], bool]) -> list[float]:
    tried: list[float] = []
    while (load := search.next()) is not None:
        assert len(tried) < 1000
        assert load not in tried
        tried.append(load)
        search.tell(load, good(load))
    return tried


class TestSearch:
    def test_doubles_until_it_is_too_much_and_then_bisects(self) -> None:
        search = Search(1.0)
        assert drive(search, lambda load: load <= 12) == [1, 2, 4, 8, 16, 11.3, 13.4, 12.3]
        assert (search.good, search.bad) == (11.3, 12.3)

    def test_halves_where_the_first_is_too_much(self) -> None:
        search = Search(8.0)
        assert drive(search, lambda load: load <= 1.5) == [8, 4, 2, 1, 1.41, 1.68, 1.54]
        assert (search.good, search.bad) == (1.41, 1.54)

    def test_ends_when_the_runs_are_used_up(self) -> None:
        up, down = Search(1.0, max_runs=5), Search(1.0, max_runs=3)
        assert drive(up, lambda load: True) == [1, 2, 4, 8, 16]
        assert drive(down, lambda load: False) == [1, 0.5, 0.25]
        assert math.isinf(up.bad)
        assert down.good == 0

    def test_of_whole_numbers_knows_the_very_one(self) -> None:
        search = Search(1, whole=True, precision=0.01)
        assert drive(search, lambda load: load <= 11) == [1, 2, 4, 8, 16, 11, 13, 12]
        assert (search.good, search.bad) == (11, 12)

    def test_of_whole_numbers_ends_at_one(self) -> None:
        assert drive(Search(8, whole=True), lambda load: False) == [8, 4, 2, 1]

    def test_a_precision_of_two_only_doubles(self) -> None:
        assert drive(Search(1, whole=True, precision=1.0), lambda load: load <= 5) == [1, 2, 4, 8]

    @given(
        start=st.floats(1e-3, 1e3),
        threshold=st.floats(1e-3, 1e3),
        precision=st.floats(0.01, 1.0),
        whole=st.booleans(),
        max_runs=st.integers(1, 60),
    )
    def test_ends_within_the_precision(
        self, start: float, threshold: float, precision: float, whole: bool, max_runs: int
    ) -> None:
        search = Search(start, precision=precision, max_runs=max_runs, whole=whole)
        tried = drive(search, lambda load: load <= threshold)
        assert len(tried) <= max_runs
        assert search.good <= threshold < search.bad
        assert all(not whole or load.is_integer() for load in tried)
        bisections = math.ceil(math.log2(1 / math.log2(1 + precision))) + 2  # rounded to three digits: rarely one more
        if max_runs > abs(math.log2(threshold / start)) + 2 + bisections:
            close = search.bad <= (1 + precision) * search.good
            assert close or (whole and search.bad - search.good <= 1)
