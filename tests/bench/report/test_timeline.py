from hypothesis import given
from hypothesis import strategies as st
from tests.bench.made import made, record

from stepbatch.bench.report.timeline import lanes, occupancy
from stepbatch.bench.results import Sample

times = st.integers(0, 50).map(float)


def sample(at: float, jobs: float, steps: float, running: float | None = None) -> Sample:
    return Sample(at=at, server="a", jobs_sum=jobs, steps=steps, running=running)


@given(st.lists(st.tuples(times, st.integers(1, 20)), max_size=40))
def test_a_lane_holds_one_request_at_a_time_and_no_lane_is_needless(drawn: list[tuple[float, int]]) -> None:
    records = [record(i, begin, begin + taken) for i, (begin, taken) in enumerate(drawn)]
    chosen = lanes(records)
    placed = list(zip(records, chosen, strict=True))
    for i, (a, lane) in enumerate(placed):
        for b, other in placed[:i]:
            assert lane != other or a.ended <= b.intended or b.ended <= a.intended
    moments = [one.intended for one in records]
    most = max((sum(one.intended <= at < one.ended for one in records) for at in moments), default=0)
    assert len(set(chosen)) == max(chosen, default=-1) + 1 == most


def test_clients_that_send_one_request_after_another_have_a_lane_each() -> None:
    assert max(lanes(made(requests=200, concurrency=8).records)) == 7


def test_a_request_that_ended_at_once_takes_a_lane_too() -> None:
    assert lanes([record(0, 1.0, 1.0), record(1, 1.0, 1.0), record(2, 0.0, 5.0)]) == [1, 1, 0]


def test_occupancy_is_what_was_added_between_two_samples() -> None:
    at, jobs = occupancy([sample(0, 100, 50), sample(1, 120, 60), sample(2, 150, 70)])
    assert (at, jobs) == ([0, 1, 2], [2, 2, 3])


def test_a_step_that_outlasts_samples_counts_from_before_it_began() -> None:
    at, jobs = occupancy([sample(0, 0, 0, 4), sample(1, 0, 0, 4), sample(2, 0, 0, 4), sample(3, 4, 1, 4)])
    assert (at, jobs) == ([0, 3], [4, 4])


def test_an_idle_server_has_no_jobs_in_its_steps() -> None:
    at, jobs = occupancy([sample(0, 0, 0, 2), sample(1, 20, 10, 0), sample(2, 20, 10, 0), sample(3, 50, 20, 3)])
    assert (at, jobs) == ([0, 1, 2, 3], [2, 2, 0, 3])


def test_without_two_samples_there_is_no_occupancy() -> None:
    assert occupancy([]) == occupancy([sample(0, 1, 1)]) == ([], [])
