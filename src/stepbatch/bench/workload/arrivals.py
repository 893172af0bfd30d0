"""When requests are sent."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence

from stepbatch.bench.options import LoadOptions
from stepbatch.bench.workload.work import WorkItem


def schedule(items: Sequence[WorkItem], load: LoadOptions, seed: int) -> list[float] | None:
    """When each item should be sent, seconds after the start; ``None`` where each is sent as soon as it may be.

    With a finite rate, the first is sent at 0 and the gaps between them are drawn from a Gamma distribution whose shape
    is the burstiness: 1 is a Poisson process, and the gaps' coefficient of variation is 1 / sqrt(burstiness). They are
    then scaled to a mean of exactly 1 / rate, for what is drawn for a few requests can be another rate altogether. A
    finite rate replaces a trace's timestamps.

    Args:
        items: In the order in which they are sent.
        load: The rate and the burstiness.
        seed: Of the gaps.
    """
    if math.isinf(load.request_rate):
        times = [item.timestamp for item in items if item.timestamp is not None]
        return times if times and len(times) == len(items) else None
    chance = random.Random(f"arrivals {seed}")  # a stream of its own: no profile goes with a longer gap
    gaps = [chance.gammavariate(load.burstiness, 1.0) for _ in items[1:]]
    total, seconds = sum(gaps) or 1.0, len(gaps) / load.request_rate
    return list(itertools.accumulate((gap / total * seconds for gap in gaps), initial=0.0))[: len(items)]
