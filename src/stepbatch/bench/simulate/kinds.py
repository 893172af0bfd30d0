"""What requests of a kind are to the scheduler, and what they cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from stepbatch.bench.simulate.curves import Curve
from stepbatch.engine.cost import Costs
from stepbatch.engine.forecast import lengths
from stepbatch.engine.width import WIDEST
from stepbatch.request import GenerationRequest, Job


@dataclass(frozen=True, eq=False)
class Kind:
    """Requests that are alike but for when they come."""

    request: GenerationRequest  # resolved
    lengths: tuple[int, ...]  # tokens of each of a job's sequences
    encode: float  # seconds, of the request
    decode: float  # seconds, of an output
    goal: float | None = None  # seconds that it may take

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def squares(self) -> int:
        return sum(length * length for length in self.lengths)

    def work(self, costs: Costs) -> float:
        """What an output's steps add to steps that are wide already, seconds."""
        return self.request.steps * costs.step.work(self.tokens, self.squares)

    def alone(self, costs: Costs) -> float:
        """Seconds that a request takes where there is no other."""
        request, step = self.request, costs.step
        together = request.steps * step.seconds(request.n * self.tokens, request.n * self.squares)
        return self.encode + together + request.n * self.decode


def make_kind(request: GenerationRequest, curve: Curve, goal: float | None = None) -> Kind:
    """A kind of a request, which the curve's model makes of it as the server's door does.

    Raises:
        InvalidValue: the model can't serve it.
    """
    request, costs = request.resolve(curve.model), curve.costs
    job = Job("", 0, request, lengths(request, curve.model), 0.0)
    return Kind(request, job.lengths, costs.encode_of(job), costs.decode.of(job.pixels), goal)


def pace(kinds: Sequence[Kind], weights: Sequence[float], costs: Costs, widest: int | None = None) -> float:
    """The most work a second that steps of such a mixture do.

    Args:
        kinds: What the mixture is of.
        weights: How many requests of each there are, in proportion.
        costs: Of a step.
        widest: Jobs in a step.
    """
    outputs = [weight * kind.request.n * kind.request.steps for kind, weight in zip(kinds, weights, strict=True)]
    total = sum(outputs)
    tokens = sum(kind.tokens * count for kind, count in zip(kinds, outputs, strict=True)) / total
    squares = sum(kind.squares * count for kind, count in zip(kinds, outputs, strict=True)) / total
    sizes = [(round(jobs * tokens), round(jobs * squares)) for jobs in range(1, (widest or WIDEST) + 1)]
    return max(costs.step.rate(*size) for size in sizes)


def capacity(kinds: Sequence[Kind], weights: Sequence[float], costs: Costs, widest: int | None = None) -> float:
    """Requests a second that a replica gets through where there are always enough of them."""
    fastest = pace(kinds, weights, costs, widest)
    seconds = [share(kind, costs, fastest) for kind in kinds]
    return sum(weights) / sum(weight * each for weight, each in zip(weights, seconds, strict=True))


def share(kind: Kind, costs: Costs, fastest: float) -> float:
    """Seconds of a replica that a request takes, where steps are as wide as they may be."""
    return kind.encode + kind.request.n * (kind.work(costs) / fastest + kind.decode)
