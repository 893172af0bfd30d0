from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.bench.made import made, record

from stepbatch.bench.report.summary import met_goal, spread, steps_taken, summarize
from stepbatch.bench.results import Outcome, Record, Sample

OUTCOMES: list[Outcome] = ["ok", "invalid", "rejected", "timeout", "failed"]


def sample(at: float, jobs: float | None, steps: float | None, server: str = "a", **fields: Any) -> Sample:
    return Sample(at=at, server=server, jobs_sum=jobs, steps=steps, **fields)


def test_percentiles_are_numpys() -> None:
    values = [0.3, 0.1, 0.7, 0.2, 0.9, 0.4]
    found = spread(values)
    assert found.mean == pytest.approx(2.6 / 6) and found.median == pytest.approx(0.35) and found.max == 0.9
    assert found.p90 == pytest.approx(np.percentile(values, 90))
    assert found.p95 == pytest.approx(0.85)  # a quarter of the way from the fifth to the sixth, counted from 0: 4.75
    assert found.p99 == pytest.approx(0.89)


def test_latency_is_from_when_a_request_should_have_been_sent() -> None:
    one = record(intended=1.0, ended=3.0)
    one.sent = 2.5
    assert summarize([one], []).latency_mean == 2.0


def test_only_good_answers_enter_latency_and_throughput() -> None:
    records = [record(i, 0.0, 1.0, outputs=1, megapixels=0.5, queue_s=0.25, service_s=0.75) for i in range(4)]
    for i, outcome in enumerate(OUTCOMES[1:]):
        bad = record(4 + i, 0.0, 8.0, outcome=outcome, outputs=1, megapixels=9.0, queue_s=5.0, service_s=5.0)
        records.append(bad)
    found = summarize(records, [])
    assert found.requests == 8 and found.completed_requests == 4 and found.completed_outputs == 4
    assert found.invalid_requests == found.rejected_requests == found.timed_out_requests == found.failed_requests == 1
    assert found.latency_mean == found.latency_max == found.latency_p99 == 1.0
    assert found.queue_mean == found.queue_p99 == 0.25 and found.service_mean == found.service_p99 == 0.75
    assert found.duration == 8.0 and found.throughput_qps == 0.5 and found.megapixels_per_second == 0.25


def test_outputs_are_counted_apart_from_requests() -> None:
    found = summarize([record(0, 0, 2, outputs=4, megapixels=1.0), record(1, 0, 2, outputs=2, megapixels=0.5)], [])
    assert found.throughput_qps == 1.0 and found.output_throughput_ops == 3.0 and found.megapixels_per_second == 0.75


def test_a_retried_request_is_counted_once() -> None:
    assert summarize([record(attempts=3), record(1), record(2, attempts=2)], []).retried_requests == 2


def test_what_failed_missed_its_goal() -> None:
    records = [record(0, 0, 1, slo_s=2.0), record(1, 0, 3, slo_s=2.0), record(2, 0, 2, slo_s=2.0), record(3, 0, 4)]
    records += [record(4, 0, 0.1, slo_s=2.0, outcome="rejected")]
    found = summarize(records, [])
    assert found.slo_met_success == 2 and found.slo_attainment_rate == 0.5 and found.goodput_qps == 0.5
    assert [met_goal(one) for one in records] == [True, False, True, False, False]


def test_without_goals_there_is_no_attainment() -> None:
    found = summarize([record()], [])
    assert found.slo_attainment_rate is None and found.slo_met_success is None and found.goodput_qps is None


def test_a_run_in_which_all_failed_has_no_latencies() -> None:
    found = summarize([record(i, outcome="failed", slo_s=1.0) for i in range(3)], [])
    assert found.latency_mean is found.latency_p99 is found.latency_max is found.queue_mean is None
    assert found.throughput_qps == 0.0 and found.slo_attainment_rate == 0.0 and found.goodput_qps == 0.0


@pytest.mark.parametrize("records", [[], [record(ended=0.0, slo_s=0.0)]])
def test_nothing_is_divided_by_zero(records: list[Record]) -> None:
    found = summarize(records, [sample(0, 0, 0), sample(0, 0, 0)])
    assert found.duration == found.throughput_qps == found.output_throughput_ops == 0.0
    assert found.jobs_per_step is None


def test_memory_is_what_answers_tell_and_else_what_samples_tell() -> None:
    watched = [sample(0, None, None, peak_memory_mb=100.0), sample(1, None, None, peak_memory_mb=300.0)]
    told = summarize([record(peak_memory_mb=10.0), record(peak_memory_mb=20.0), record(), record()], watched)
    assert (told.peak_memory_mb_max, told.peak_memory_mb_mean, told.peak_memory_mb_median) == (20.0, 15.0, 15.0)
    assert summarize([record()], watched).peak_memory_mb_max == 300.0
    zeros = summarize([record(peak_memory_mb=0.0)], [sample(0, 1, 1, peak_memory_mb=0.0)])
    assert zeros.peak_memory_mb_max is zeros.peak_memory_mb_mean is None


def test_jobs_per_step_are_those_of_the_run_over_all_servers() -> None:
    before = [sample(0, 1000, 500), sample(0, 7, 7, "b")]
    after = [sample(1, 1010, 505), sample(2, 1080, 520), sample(2, 37, 37, "b")]
    assert summarize([], before + after).jobs_per_step == pytest.approx((80 + 30) / (20 + 30))
    assert summarize([], after + before).jobs_per_step == pytest.approx(110 / 50)  # whatever the order
    assert summarize([], before).jobs_per_step is None


def test_a_server_that_starts_again_counts_from_zero() -> None:
    counted = [sample(0, 90, 30), sample(1, 120, 40), sample(2, 10, 10), sample(3, 30, 20)]
    assert summarize([], counted).jobs_per_step == pytest.approx((30 + 10 + 20) / (10 + 10 + 10))


def test_samples_without_steps_are_passed_over() -> None:
    taken = list(steps_taken([sample(0, 2, 2), sample(1, None, None), sample(2, 6, 4, running=0)]))
    assert [(part.begin, part.end, part.jobs, part.steps, part.idle) for part in taken] == [(0, 2, 4, 2, True)]


times = st.floats(0, 1000)


@given(st.lists(st.tuples(times, times, st.sampled_from(OUTCOMES), st.none() | times), max_size=30))
def test_figures_hold_together(drawn: list[tuple[float, float, Outcome, float | None]]) -> None:
    records = [
        record(i, begin, begin + taken, outcome=outcome, slo_s=slo, outputs=1)
        for i, (begin, taken, outcome, slo) in enumerate(drawn)
    ]
    found = summarize(records, [])
    bad = found.failed_requests + found.rejected_requests + found.timed_out_requests + found.invalid_requests
    assert found.completed_requests + bad == found.requests == len(records)
    assert (found.latency_mean is None) == (found.completed_requests == 0)
    if found.latency_median is not None:
        assert found.latency_p90 is not None and found.latency_p95 is not None and found.latency_p99 is not None
        assert found.latency_max is not None and found.latency_mean is not None
        ordered = [found.latency_median, found.latency_p90, found.latency_p95, found.latency_p99, found.latency_max]
        assert ordered == sorted(ordered) and found.latency_mean <= found.latency_max * (1 + 1e-9)
    if found.goodput_qps is not None and found.slo_attainment_rate is not None:
        assert 0 <= found.slo_attainment_rate <= 1 and found.goodput_qps <= found.throughput_qps


def test_a_made_run_is_summed_up_as_it_was_made() -> None:
    found = made(requests=200, slots=4, concurrency=8).summary
    assert found.jobs_per_step == pytest.approx(4, abs=0.3)
    assert found.queue_mean is not None and found.service_mean is not None and found.latency_mean is not None
    assert found.latency_mean == pytest.approx(found.queue_mean + found.service_mean)
    assert found.throughput_qps * found.latency_mean == pytest.approx(8, rel=0.05)  # Little's law
