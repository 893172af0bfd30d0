"""How wide a step pays: the knee. Plain arithmetic on predicted seconds.

A wider step does more work a second, as long as something in a step is shared: launching it, reading weights, streaming
them. Past that a wider step only makes its members wait for each other.
"""

from __future__ import annotations

from collections.abc import Iterable

from stepbatch.engine.cost import StepCost

SHORT_OF_BEST = 0.01  # of the most work a second: the last percent isn't worth its wait


def best_width(cost: StepCost, sizes: Iterable[tuple[int, int]]) -> int:
    """How many of the jobs that could take a step should: the fewest that do nearly as much a second as any more would.

    Args:
        cost: Of a step.
        sizes: Tokens of each job's sequences, and their squares, in the order in which the jobs are served.
    """
    tokens = squares = 0
    work = 0.0
    rates = []
    for more_tokens, more_squares in sizes:
        tokens, squares = tokens + more_tokens, squares + more_squares
        work += cost.work(more_tokens, more_squares)
        rates.append(work / cost.seconds(tokens, squares))
    enough = (1 - SHORT_OF_BEST) * max(rates)
    return next(width for width, rate in enumerate(rates, 1) if rate >= enough)
