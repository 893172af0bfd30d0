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

from stepbatch.config import BatchingConfig
from stepbatch.engine.cost import LEAST_WORK, Costs, StepCost
from stepbatch.request import Job

TO_COME = 8  # for each job that is here: so many come while there is a queue, and wait as long as it is slow
SHORT_OF_BEST = 0.01  # of the most work a second: the last percent isn't worth its wait
USUAL = 4  # jobs in a step, at most, where many would pay: seldom do so many wait
NEARLY = 0.02  # likewise, of the work a second that such a step does at best
WIDTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)  # that are tried where jobs are alike
TRIED = (*range(1, 9), *range(10, 17, 2), *range(20, 33, 4), *range(40, 65, 8))  # and where they may not be
WIDEST_CALL = 8  # jobs in a whole call, where nobody says
REMEMBERED = 1024  # sizes


def step_width(costs: Costs, jobs: Sequence[Job], here: int) -> int:
    """How many of the jobs that could take a step should, for the shortest time from arrival to end; the knee at most.

    All that are here, and those who come meanwhile, wait as long as an output takes of the machine; those in the step
    are in it for as many outputs' time as it is wide. If few are here, narrow steps are better: two equal jobs that
    take as long together as one after the other end later on average.

    Args:
        costs: What is known.
        jobs: In the order in which they are served.
        here: Jobs that wait or run, of which these are the first.
    """
    if len(jobs) == 1:
        return 1
    widths = [*TRIED[: bisect_left(TRIED, len(jobs))], len(jobs)]
    rates, work = _rates(costs.step, [(job.tokens, job.squares) for job in jobs], widths)
    each = sum([job.steps * one for job, one in zip(jobs, work, strict=True)]) / len(jobs)
    besides = costs.decode_of(jobs) / len(jobs)  # which takes as long however wide steps are
    best, least = 1, math.inf
    for width, rate in zip(widths, rates[: _knee(rates)], strict=False):
        waits = (TO_COME * here + width) * (each / rate + besides)
        if waits < least:
            best, least = width, waits
    return best


def best_width(cost: StepCost, sizes: Sequence[tuple[int, int]]) -> int:
    """The knee: the fewest of the jobs that could take a step that do nearly as much a second as any more would.

    Args:
        cost: Of a step.
        sizes: Tokens of each job's sequences, and their squares, in the order in which the jobs are served.
    """
    return _knee(_rates(cost, sizes, range(1, len(sizes) + 1))[0])


def _knee(rates: Sequence[float]) -> int:
    """The number of the first that is nearly as much as any, from one."""
    enough = (1 - SHORT_OF_BEST) * max(rates)
    return next(number for number, rate in enumerate(rates, 1) if rate >= enough)


def _rates(cost: StepCost, sizes: Sequence[tuple[int, int]], widths: Sequence[int]) -> tuple[list[float], list[float]]:
    """The work a second of a step of so many of these sizes, for each of these widths; and the work of each size.

    It is what ``cost.work`` and ``cost.seconds`` say, written out: this is asked often.
    """
    least, base, per_token, per_square = max(cost.host, cost.streamed), cost.base, cost.per_token, cost.per_square
    per_work = max(per_token, LEAST_WORK)
    works = [per_work * tokens + per_square * squares for tokens, squares in sizes]
    rates = []
    upto = list(zip(*(accumulate(column) for column in (*zip(*sizes, strict=True), works)), strict=True))
    for width in widths:
        tokens, squares, work = upto[width - 1]
        straight = base + per_token * tokens + per_square * squares
        seconds = straight if straight > least else least
        rates.append(work / (seconds * cost.factor(tokens) if cost.factors else seconds))
    return rates, works


@dataclass(frozen=True, slots=True)
class Pace:
    """What a step of a job takes, seconds."""

    alone: float  # with no other job
    share: float  # of a step of its like that is as wide as it may be, the job's part
    usual: float  # of a step of its like that is as wide as is usual, all of it


def paces(cost: StepCost, limits: BatchingConfig, most_tokens: float = math.inf) -> Callable[[int, int], Pace]:
    """A function that tells the pace of a job, by its tokens and their squares; each is reckoned once.

    Args:
        limits: How wide a step may be.
        most_tokens: In a step, as far as memory goes.
    """
    most, room = limits.dynamic_batch_max_size or WIDTHS[-1], min(limits.max_batch_tokens or math.inf, most_tokens)

    @lru_cache(REMEMBERED)
    def pace(tokens: int, squares: int) -> Pace:
        widths = [w for w in WIDTHS if w <= most and (w == 1 or w * tokens <= room)]
        steps = [cost.seconds(w * tokens, w * squares) for w in widths]
        shares = [step / w for step, w in zip(steps, widths, strict=True)]
        enough = min(shares[: bisect(widths, USUAL)]) / (1 - NEARLY)
        usual = next(step for step, share in zip(steps, shares, strict=True) if share <= enough)
        return Pace(steps[0], min(shares), usual)

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
