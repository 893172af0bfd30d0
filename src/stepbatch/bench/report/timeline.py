"""What went on when: requests in lanes, and how many jobs shared a step."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from stepbatch.bench.report.summary import steps_taken
from stepbatch.bench.results import Record, Sample


def lanes(records: Sequence[Record]) -> list[int]:
    """A lane for each request, the lowest that is free from when it should have been sent until it ended.

    There are as many lanes as requests were in flight at once.
    """
    chosen = [0] * len(records)
    busy: list[tuple[float, int]] = []  # when it is free again, lane
    free: list[int] = []
    for i in sorted(range(len(records)), key=lambda i: (records[i].intended, records[i].ended)):
        while busy and busy[0][0] <= records[i].intended:
            heapq.heappush(free, heapq.heappop(busy)[1])
        chosen[i] = heapq.heappop(free) if free else len(busy)
        heapq.heappush(busy, (max(records[i].ended, records[i].intended), chosen[i]))
    return chosen


def occupancy(samples: Sequence[Sample]) -> tuple[list[float], list[float]]:
    """How many jobs shared a step of one server, over time.

    A step may last longer than the time between two samples: what it held counts from the sample before it began.

    Returns:
        Seconds at which a value ends, and the values; the first of them is where the first begins, and its value again.
    """
    times: list[float] = []
    values: list[float] = []
    begin: float | None = None  # of a step that no sample has counted yet
    for taken in steps_taken(samples):
        begin = taken.begin if begin is None else begin
        if not taken.steps and not taken.idle:
            continue
        value = taken.jobs / taken.steps if taken.steps else 0.0
        if not times:
            times, values = [begin], [value]
        times.append(taken.end)
        values.append(value)
        begin = None
    return times, values
