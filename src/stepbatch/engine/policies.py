"""Scheduling policies: who goes before whom. A policy is a function that gives each job a key; the least goes first.

A key is asked for when a job comes and whenever it has taken a step, and not as time passes, so that the order is kept
and not sorted anew. That is less narrow than it sounds: what the keys of all share cancels out, so that "less a share
of the seconds waited" is "plus that share of the arrival".

A key that goes by ``now`` may grow while its job runs, as steps in company take longer than alone: then others come
first, though nobody has come or left. Policies whose keys never do are listed in ``STEADY``; under any other, the
scheduler asks what the keys will be in the end before it says that the next steps are all the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import msgspec

from stepbatch.request import Job

LEAST = 1e-9  # seconds that are left, where it is said to be none

Key = tuple[float, ...]


class Outlook(msgspec.Struct, frozen=True):
    """What a policy may know besides the job."""

    remaining: float  # seconds that the job would take from here, by itself
    now: float  # on the clock of the jobs' arrivals
    ageing: float  # seconds of remaining time that a second of waiting makes up for
    usual: float  # seconds that the job would take from here in steps as wide as is usual
    decay: float  # of boosts, a second: see ``engine.traffic``; 0 where nothing is known


def fcfs(job: Job, outlook: Outlook) -> Key:
    """First come, first served."""
    return (job.arrival,)


def srpt(job: Job, outlook: Outlook) -> Key:
    """Shortest remaining processing time, less a share of the wait, so that what is long gets its turn."""
    return outlook.remaining + outlook.ageing * job.arrival, job.arrival


def boost(job: Job, outlook: Outlook) -> Key:
    """As they came, but each as if it had come earlier, the more so the less is left of it.

    After "Strongly tail-optimal scheduling in the light-tailed M/G/1" (Yu and Scully, 2024). How far what is short gets
    ahead is bounded, so that nobody waits for ever, and depends on how long the long waits are.
    """
    if not outlook.decay:
        return (job.arrival,)
    gone = -math.expm1(-outlook.decay * max(outlook.usual, LEAST))
    return job.arrival + math.log(gone) / outlook.decay, job.arrival


def deadline(job: Job, outlook: Outlook) -> Key:
    """Earliest deadline, among those of the highest priority; what can't be on time any more goes last."""
    due = math.inf if job.deadline is None else job.deadline
    return outlook.now + outlook.remaining > due, -job.request.priority, due, job.arrival


POLICIES: dict[str, Callable[[Job, Outlook], Key]] = {
    "boost": boost,
    "fcfs": fcfs,
    "srpt": srpt,
    "deadline": deadline,
}

STEADY = frozenset({"boost", "fcfs", "srpt"})  # whose keys never grow as a job runs
