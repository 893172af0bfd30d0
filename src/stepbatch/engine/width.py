"""How wide a step is to be. Plain arithmetic on predicted seconds.

A wider step does more work a second, as long as something in a step is shared: launching it, reading weights, streaming
them. Past that, the knee, a wider step only makes its members wait for each other. Before it they wait for each other
too, and that is worth it where enough others wait for all of them.
"""

from __future__ import annotations

import math
import sys
from bisect import bisect, bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate
from operator import attrgetter, mul

from stepbatch.config import BatchingConfig
from stepbatch.engine.cost import Costs, StepCost
from stepbatch.request import Job

WIDEST = 64  # jobs in a step
TO_COME = 8  # for each job that is here: so many come while there is a queue, and wait as long as it is slow
SHORT_OF_BEST = 0.01  # of the most work a second: the last percent isn't worth its wait
ENDLESS = WIDEST**2  # jobs in a step, beside which nothing counts that is shared
SATURATED = 0.9  # of what such a step does a second, that one has to do for others to add little to it
USUAL = 4  # jobs in a step, at most, where many would pay: seldom do so many wait
NEARLY = 0.02  # likewise, of the work a second that such a step does at best
WIDTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, WIDEST)  # that are tried
WIDEST_CALL = 8  # jobs in a whole call, where nobody says
REMEMBERED = 1024  # sizes

_SIZE = attrgetter("tokens", "squares", "steps", "pixels")  # of a job


def step_width(costs: Costs, jobs: Sequence[Job], here: int) -> int:
    """How many of the jobs that could share a step should, for the shortest time from arrival to end.

    All that are here, and those who come meanwhile, wait as long as an output takes of the machine; those in the step
    are in it for as many outputs' time as it is wide. If few are here, narrow steps are better: two equal jobs that
    take as long together as one after the other end later on average.

    Args:
        costs: What is known.
        jobs: In the order in which they are served, up to the knee.
        here: Jobs that wait or run, of which these are the first.
    """
    count = len(jobs)
    if count == 1 or count < SHORT_OF_BEST * TO_COME * here:  # then who is in the step hardly counts
        return count
    cost = costs.step
    tokens, squares, steps, pixels = zip(*map(_SIZE, jobs), strict=True)
    each = cost.work(sum(map(mul, steps, tokens)), sum(map(mul, steps, squares))) / count
    besides = costs.decode.of(sum(pixels) / count)  # which takes as long however wide steps are
    together = list(zip(accumulate(tokens), accumulate(squares), strict=True))
    best, least = 1, math.inf
    for width in (*WIDTHS[: bisect_left(WIDTHS, count)], count):
        waits = (TO_COME * here + width) * (each / cost.rate(*together[width - 1]) + besides)
        if waits < least:
            best, least = width, waits
    return best


def best_width(cost: StepCost, tokens: int, squares: int) -> int:
    """The knee: the fewest of such jobs that do nearly as much a second in a step as any more would.

    Args:
        cost: Of a step.
        tokens: Of a job's sequences.
        squares: Of their tokens, added up.
    """
    shares = [cost.seconds(jobs * tokens, jobs * squares) / jobs for jobs in range(1, WIDEST + 1)]
    return 1 + _nearly_least(shares, SHORT_OF_BEST)


def _nearly_least(shares: Sequence[float], short: float) -> int:
    """The index of the first that is but for so much as small as the least."""
    enough = min(shares) / (1 - short)
    return next(index for index, share in enumerate(shares) if share <= enough)


@dataclass(frozen=True, slots=True)
class Pace:
    """What a step of a job takes, seconds."""

    alone: float  # with no other job
    share: float  # of a step of its like that is as wide as it may be, the job's part
    usual: float  # of a step of its like that is as wide as is usual, all of it
    enough: float  # tokens, of a step of its like about as wide as the knee; endless where others would add much


def paces(cost: StepCost, limits: BatchingConfig, most_tokens: float = math.inf) -> Callable[[int, int], Pace]:
    """A function that tells the pace of a job, by its tokens and their squares; each is reckoned once.

    Args:
        limits: How wide a step may be.
        most_tokens: In a step, as far as memory goes.
    """
    most, room = limits.dynamic_batch_max_size or WIDEST, min(limits.max_batch_tokens or math.inf, most_tokens)

    @lru_cache(REMEMBERED)
    def pace(tokens: int, squares: int) -> Pace:
        widths = [w for w in WIDTHS if w <= most and (w == 1 or w * tokens <= room)]
        steps = [cost.seconds(w * tokens, w * squares) for w in widths]
        shares = [step / w for step, w in zip(steps, widths, strict=True)]
        usual = steps[_nearly_least(shares[: bisect(widths, USUAL)], NEARLY)]
        knee = _nearly_least(shares, SHORT_OF_BEST)
        endless = cost.seconds(ENDLESS * tokens, ENDLESS * squares) / ENDLESS
        full = SATURATED * shares[knee] <= endless
        return Pace(steps[0], min(shares), usual, widths[knee] * tokens if full else math.inf)

    return pace


def limits_of(limits: BatchingConfig, whole_calls: bool) -> BatchingConfig:
    """The scheduler's limits: in whole calls, encoding and decoding are parts of the call and no units of their own."""
    if not whole_calls:
        return limits
    return replace(
        limits,
        dynamic_batch_max_size=limits.dynamic_batch_max_size or WIDEST_CALL,
        max_encodes_per_step=sys.maxsize,
        max_decodes_per_step=sys.maxsize,
    )
