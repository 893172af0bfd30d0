"""Records and samples of a run, summed up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from stepbatch.bench.results import Record, Sample, Summary


@dataclass(frozen=True)
class Spread:
    """How values are spread; all ``None`` where there are none."""

    mean: float | None = None
    median: float | None = None
    p90: float | None = None
    p95: float | None = None
    p99: float | None = None
    max: float | None = None


def spread(values: Sequence[float]) -> Spread:
    """Mean, percentiles (interpolated linearly between the two nearest values) and maximum, in the values' unit."""
    if not values:
        return Spread()
    median, p90, p95, p99 = np.percentile(values, [50, 90, 95, 99])
    return Spread(float(np.mean(values)), float(median), float(p90), float(p95), float(p99), float(max(values)))


def summarize(records: Sequence[Record], samples: Sequence[Sample]) -> Summary:
    """The figures of a run.

    Latency, queue and service times are those of requests that were answered with what they asked for. Of the requests
    that have a goal, those without such an answer missed it.
    """
    duration = max((record.ended for record in records), default=0.0)
    counts = Counter(record.outcome for record in records)
    done = [record for record in records if record.outcome == "ok"]
    outputs = sum(record.outputs for record in done)
    latency = spread([record.latency for record in done])
    queue = spread([record.queue_s for record in done if record.queue_s is not None])
    service = spread([record.service_s for record in done if record.service_s is not None])
    memory = _peak_memory(records, samples)
    goals = [met_goal(record) for record in records if record.slo_s is not None]
    return Summary(
        duration=duration,
        requests=len(records),
        completed_requests=len(done),
        failed_requests=counts["failed"],
        rejected_requests=counts["rejected"],
        timed_out_requests=counts["timeout"],
        invalid_requests=counts["invalid"],
        retried_requests=sum(record.attempts > 1 for record in records),
        completed_outputs=outputs,
        throughput_qps=_rate(len(done), duration),
        output_throughput_ops=_rate(outputs, duration),
        megapixels_per_second=_rate(sum(record.megapixels for record in done), duration),
        latency_mean=latency.mean,
        latency_median=latency.median,
        latency_p90=latency.p90,
        latency_p95=latency.p95,
        latency_p99=latency.p99,
        latency_max=latency.max,
        queue_mean=queue.mean,
        queue_p99=queue.p99,
        service_mean=service.mean,
        service_p99=service.p99,
        slo_attainment_rate=sum(goals) / len(goals) if goals else None,
        slo_met_success=sum(goals) if goals else None,
        goodput_qps=_rate(sum(goals), duration) if goals else None,
        peak_memory_mb_max=memory.max,
        peak_memory_mb_mean=memory.mean,
        peak_memory_mb_median=memory.median,
        jobs_per_step=_jobs_per_step(samples),
    )


def met_goal(record: Record) -> bool:
    """Whether a request that has a goal for its latency met it."""
    return record.slo_s is not None and record.outcome == "ok" and record.latency <= record.slo_s


def by_server(samples: Sequence[Sample]) -> dict[str, list[Sample]]:
    """The samples of each server, in order of time."""
    found: dict[str, list[Sample]] = {}
    for sample in sorted(samples, key=lambda sample: sample.at):
        found.setdefault(sample.server, []).append(sample)
    return found


@dataclass(frozen=True)
class StepsTaken:
    """What one server's steps were between two samples."""

    begin: float  # seconds since the run's start
    end: float
    jobs: float  # that took part in the steps, summed over them
    steps: float
    idle: bool  # the server said at the end that nothing was running


def steps_taken(samples: Sequence[Sample]) -> Iterator[StepsTaken]:
    """What happened between each two samples of one server, of those that tell its steps."""
    telling = [sample for sample in samples if sample.steps is not None and sample.jobs_sum is not None]
    for before, after in pairwise(telling):
        assert before.steps is not None and before.jobs_sum is not None  # the list has no others
        assert after.steps is not None and after.jobs_sum is not None
        anew = after.steps < before.steps  # a server that was started again counts from 0
        jobs = after.jobs_sum - (0.0 if anew else before.jobs_sum)
        steps = after.steps - (0.0 if anew else before.steps)
        yield StepsTaken(before.at, after.at, jobs, steps, after.running == 0)


def _jobs_per_step(samples: Sequence[Sample]) -> float | None:
    taken = [part for those in by_server(samples).values() for part in steps_taken(those)]
    steps = sum(part.steps for part in taken)
    return sum(part.jobs for part in taken) / steps if steps else None


def _peak_memory(records: Sequence[Record], samples: Sequence[Sample]) -> Spread:
    """In MB. Some servers say 0 where they don't know."""
    answered = [record.peak_memory_mb for record in records if record.peak_memory_mb]
    return spread(answered or [sample.peak_memory_mb for sample in samples if sample.peak_memory_mb])


def _rate(count: float, seconds: float) -> float:
    return count / seconds if seconds > 0 else 0.0
