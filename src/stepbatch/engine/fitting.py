"""Curves through what was measured: the few terms of a cost, fitted by least squares. numpy alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations, product

import msgspec
import numpy as np
from numpy.typing import NDArray

from stepbatch.engine.cost import LinearCost, StepCost

BEND = 0.01  # of a prediction, that a curve may be off without being bent
BANDWIDTH = 0.75  # octaves of tokens in which a bend shows
DOUBT = 0.5  # measurements' worth of thinking that there is none
ROUNDS, FAR = 4, 0.05  # of fitting; an error, relative, that begins to be an outlier's
SPREAD = 1.5  # between the tokens of the smallest and the largest steps, so that a curve can be known
FLAT = 0.03  # steps within this of the quickest are as quick as it

Array = NDArray[np.float64]


class StepSample(msgspec.Struct, frozen=True, kw_only=True):
    """A step that was measured."""

    tokens: int  # of all sequences
    squares: int  # of their tokens, added up
    seconds: float
    weight: float = 1.0  # how much it counts


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """Something else that was measured: seconds, or bytes, of a thing of some size."""

    size: float
    cost: float
    weight: float = 1.0


def fit_step(samples: Sequence[StepSample], host: float = 0.0, streamed: float = 0.0) -> StepCost:
    """The cost of a step that is nearest to what was measured, relatively; no term is negative.

    Args:
        samples: One at least.
        host: Seconds that the host needs to launch a step, if that was measured. Steps that are all equally quick show
            such a floor too. What steps don't bear out is left out, since a host that waits for something looks slow.
        streamed: Seconds to bring over weights that don't stay on the device, if that was measured; likewise.
    """
    assert samples
    tokens, squares, seconds, weights = np.array(
        [(s.tokens, s.squares, s.seconds, s.weight) for s in samples], dtype=np.float64
    ).T
    terms = np.stack([np.ones_like(tokens), tokens, squares], axis=1)
    hosts = [0.0, host] if host else [0.0]
    flat = seconds < (1 + FLAT) * float(seconds.min())
    if flat.sum() > 1 and tokens[flat].max() > 1.5 * tokens[flat].min() and not flat.all():
        hosts.append(float(np.median(seconds[flat])))
    floors = product(hosts, [streamed, 0.0] if streamed else [0.0])
    tried = [_straight(terms, seconds, weights, *floor) for floor in floors]
    best = min(tried, key=lambda cost: _error(cost, samples))
    return msgspec.structs.replace(best, factors=_factors(best, samples))


def _straight(terms: Array, seconds: Array, weights: Array, host: float, streamed: float) -> StepCost:
    """Without factors: steps that take no longer than the floor say nothing of what is beneath it."""
    floor = max(host, streamed)
    above = seconds > (1 + FLAT) * floor
    if not above.any():
        return StepCost(host=host, streamed=streamed)
    rows, wanted, counts = terms[above], seconds[above], weights[above]
    base, per_token, per_square = found = least_squares(rows, wanted, counts)
    for _ in range(ROUNDS):  # what is far off counts less
        off = np.abs(rows @ np.array(found) / wanted - 1)
        base, per_token, per_square = found = least_squares(rows, wanted, counts / np.maximum(1, off / FAR))
    return StepCost(host=host, streamed=streamed, base=base, per_token=per_token, per_square=per_square)


def least_squares(terms: Array, values: Array, weights: Array) -> list[float]:
    """Coefficients, none negative, with the least sum of squared relative errors; of a constant and of what grows.

    The few terms that there are allow for trying each set of those that aren't zero.

    Args:
        terms: ``[samples, terms]``, not negative.
        values: ``[samples]``, positive.
        weights: ``[samples]``, how much each counts.
    """
    count = terms.shape[1]
    scale = terms.max(axis=0)
    scale[scale == 0] = 1.0
    rows, wanted = terms / scale / values[:, None] * np.sqrt(weights)[:, None], np.sqrt(weights)
    best, least = np.zeros(count), math.inf
    order = [1, 0, *range(2, count)]  # of equals, steps that grow with their tokens: a wider one may not be cheaper
    for chosen in (list(some) for size in range(1, count + 1) for some in combinations(order, size)):
        found, _, rank, _ = np.linalg.lstsq(rows[:, chosen], wanted, rcond=1e-6)
        if rank < len(chosen) or (found < 0).any():
            continue
        error = float(np.square(rows[:, chosen] @ found - wanted).sum())
        if error < least * (1 - 1e-9):
            best, least = np.zeros(count), error
            best[chosen] = found
    return [float(value) for value in best / scale]


def _factors(cost: StepCost, samples: Sequence[StepSample]) -> tuple[tuple[float, float], ...]:
    """Where the machine bends the curve: how much longer steps take than it says, by tokens, as far as that counts.

    A bend is wide, since caches fill up by and by; what a few steps have of their own is noise, in which a knee would
    be seen that isn't there. So each place is averaged with its neighbours, and little is made of few measurements.
    """
    at = np.array([math.log2(sample.tokens) for sample in samples])
    off = np.array([math.log(sample.seconds / cost.seconds(sample.tokens, sample.squares)) for sample in samples])
    weights = np.array([sample.weight for sample in samples])
    factors = []
    for place in sorted({round(2 * x) / 2 for x in at}):
        near = weights * np.exp(-np.square((at - place) / BANDWIDTH))
        mean = float((near * off).sum() / (near.sum() + DOUBT))
        factors.append((place, math.exp(math.copysign(max(0.0, abs(mean) - BEND), mean))))
    return tuple(factors) if any(factor != 1 for _, factor in factors) else ()


def _error(cost: StepCost, samples: Sequence[StepSample]) -> float:
    """The sum of squared errors of the logarithms."""
    return sum(s.weight * math.log(cost.seconds(s.tokens, s.squares) / s.seconds) ** 2 for s in samples)


def fit_linear(samples: Sequence[Sample]) -> LinearCost:
    """The cost that is nearest to what was measured, relatively; no term is negative. Nothing costs nothing."""
    found = [sample for sample in samples if sample.cost > 0]
    if not found:
        return LinearCost()
    sizes, costs, weights = np.array([(s.size, s.cost, s.weight) for s in found], dtype=np.float64).T
    each, per_unit = least_squares(np.stack([np.ones_like(sizes), sizes], axis=1), costs, weights)
    return LinearCost(each=each, per_unit=per_unit)
