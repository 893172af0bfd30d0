from __future__ import annotations

import math
from collections import Counter

import pytest
from tests.bench.simulate.simulated import curve, kind

from stepbatch.bench.simulate.cluster import Course
from stepbatch.bench.simulate.results import Setting, summed


def setting(**fields: object) -> Setting:
    given = {"unit": "load", "amount": 0.8, "policy": "fcfs", "ageing": None, "width": None, "replicas": 1}
    return Setting(**{**given, "routing": "round-robin", **fields})  # type: ignore[arg-type]


def test_what_was_refused_or_dropped_enters_no_latency_and_missed_its_goal() -> None:
    course = Course([0.0, 1.0, 2.0, 4.0], [2.0, math.nan, 8.0, math.nan], refused=1, dropped=1, duration=8.0)
    course.busy, course.widths = 6.0, Counter({1: 4, 2: 4})
    outcome = summed(course, [kind(curve(), goal=3.0)] * 4, setting(replicas=3))
    assert (outcome.mean, outcome.p50, outcome.finished, outcome.requests) == (4.0, 4.0, 2, 4)
    assert outcome.p99 == pytest.approx(5.96)
    assert (outcome.attainment, outcome.goodput, outcome.throughput) == (0.25, 1 / 8, 2 / 8)
    assert (outcome.rate, outcome.width_mean, outcome.utilisation) == (3 / 4, 1.5, 6 / 24)


def test_nothing_that_finished_is_no_latency() -> None:
    outcome = summed(Course([0.0], [math.nan], refused=1), [kind(curve())], setting())
    assert outcome.mean is outcome.p99 is outcome.attainment is outcome.goodput is None
    assert outcome.throughput == outcome.utilisation == 0.0


def test_a_queue_that_grows_is_seen() -> None:
    came = [float(i) for i in range(100)]
    grows = Course(came, [2.0 * i + 2 for i in range(100)], duration=200.0)
    keeps = Course(came, [i + 2.0 for i in range(100)], duration=102.0)
    kinds = [kind(curve())] * 100
    assert [summed(course, kinds, setting()).steady for course in (grows, keeps)] == [False, True]
    assert summed(grows, kinds, setting(unit="concurrency")).steady
