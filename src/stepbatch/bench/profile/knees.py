"""How wide a step pays at each size that was measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from stepbatch.bench.profile_file import ProfileFile, StepPoint
from stepbatch.engine.cost import StepCost
from stepbatch.engine.width import best_width


@dataclass(frozen=True)
class Knee:
    """What a size's steps are like."""

    size: str  # WIDTHxHEIGHT
    tokens: int  # of a job's sequences
    squares: int  # of their tokens, added up
    width: int  # jobs in a step that pay
    points: tuple[StepPoint, ...]  # that were measured, by jobs

    def seconds(self, cost: StepCost, jobs: int) -> float:
        """A step of so many jobs."""
        return cost.seconds(jobs * self.tokens, jobs * self.squares)

    def rate(self, cost: StepCost, jobs: int) -> float:
        """Jobs' steps a second in steps of so many jobs."""
        return jobs / self.seconds(cost, jobs)


def knees(profile: ProfileFile) -> list[Knee]:
    """Each size's, in order of their tokens."""
    by_size: dict[str, list[StepPoint]] = {}
    for point in profile.points:
        by_size.setdefault(f"{point.width}x{point.height}", []).append(point)
    found = []
    for size, points in by_size.items():
        ordered = sorted(points, key=lambda point: point.jobs)
        tokens, squares = ordered[0].tokens // ordered[0].jobs, ordered[0].squares // ordered[0].jobs
        width = best_width(profile.costs.step, tokens, squares)
        found.append(Knee(size, tokens, squares, width, tuple(ordered)))
    return sorted(found, key=lambda knee: knee.tokens)


def errors(cost: StepCost, points: Sequence[StepPoint]) -> list[float]:
    """By how much of what was measured a prediction is too high."""
    return [cost.seconds(point.tokens, point.squares) / point.seconds - 1 for point in points]
