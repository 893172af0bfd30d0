"""How wide a step is to be. Plain arithmetic on predicted seconds.

A wider step does more work a second, as long as something in a step is shared: launching it, reading weights, streaming
them. Past that, the knee, a wider step only makes its members wait for each other. Before it they wait for each other
too, and that is worth it where enough others wait for all of them.
"""

from __future__ import annotations

import math
import sys
from bisect import bisect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from stepbatch.config import BatchingConfig
from stepbatch.engine.cost import LEAST_WORK, Costs, StepCost
from stepbatch.request import Job

TO_COME = 8  # for each job that is here: so many come while there is a queue, and wait as long as it is slow
SHORT_OF_BEST = 0.01  # of the most work a second: the last percent isn't worth its wait
USUAL = 4  # jobs in a step, at most, where many would pay: seldom do so many wait
NEARLY = 0.02  # likewise, of the work a second that such a step does at best
WIDTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)  # that are tried where jobs are alike
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
    work, rates = _work_and_rates(costs.step, [(job.tokens, job.squares) for job in jobs])
    steps = sum([job.steps * each for job, each in zip(jobs, work, strict=True)]) / len(jobs)
    besides = costs.decode_of(jobs) / len(jobs)  # which takes as long however wide steps are
    waits = [(TO_COME * here + width) * (steps / rate + besides) for width, rate in enumerate(rates[: _knee(rates)], 1)]
    return waits.index(min(waits)) + 1


def best_width(cost: StepCost, sizes: Iterable[tuple[int, int]]) -> int:
    """The knee: the fewest of the jobs that could take a step that do nearly as much a second as any more would.

    Args:
        cost: Of a step.
        sizes: Tokens of each job's sequences, and their squares, in the order in which the jobs are served.
    """
    return _knee(_work_and_rates(cost, sizes)[1])


def _knee(rates: Sequence[float]) -> int:
    enough = (1 - SHORT_OF_BEST) * max(rates)
    return next(width for width, rate in enumerate(rates, 1) if rate >= enough)


def _work_and_rates(cost: StepCost, sizes: Iterable[tuple[int, int]]) -> tuple[list[float], list[float]]:
    """The work of each of these sizes; and the work a second of a step of the first, of the first two, and so on."""
    least, per_token, per_square = max(cost.host, cost.streamed), cost.per_token, cost.per_square
    tokens = squares = 0
    work = 0.0
    works, rates = [], []
    for more_tokens, more_squares in sizes:  # what cost.work and cost.seconds say, written out: this is asked often
        tokens += more_tokens
        squares += more_squares
        more = per_token * more_tokens + per_square * more_squares
        more = more if more > LEAST_WORK * more_tokens else LEAST_WORK * more_tokens
        work += more
        works.append(more)
        straight = cost.base + per_token * tokens + per_square * squares
        seconds = straight if straight > least else least
        rates.append(work / (seconds * cost.factor(tokens) if cost.factors else seconds))
    return works, rates


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
