"""Who comes: how busy that keeps the machine, and how fast long waits get rarer. No torch and no clock."""

from __future__ import annotations

import math

PART = 0.65  # of gamma that boosts go by: the less, the more the mean gains and the longest waits lose
MEMORY = 512  # jobs that count; the older, the less
FEW = 16  # jobs from which the load can't be told yet
USUAL_LOAD = 0.8  # is taken for it then
LEAST_LOAD, MOST_LOAD = 0.6, 0.9  # that are reckoned with: where less comes, few wait; more can't last
PAUSE = 8.0  # jobs' seconds: what a time in which nobody comes counts for at most, or nights would make days calm
CHANGE = 1.25  # the factor by which the decay has to be off before another takes its place


class Traffic:
    """Learns, from who comes, what the policy ``boost`` goes by.

    The chance that a job waits longer than ``t`` seconds falls as ``exp(-gamma * t)``, where ``gamma`` solves
    ``rate * (mean(exp(gamma * seconds)) - 1) = gamma`` for jobs that come by chance. Here that is expanded as far as
    the third moment, which makes it a quadratic equation, and at low loads a ``gamma`` that is a little large.
    """

    def __init__(self) -> None:
        self.decay = 0.0  # of boosts, a second; 0 as long as nothing is known
        self._count = 0.0
        self._moments = [0.0, 0.0, 0.0]  # means of a job's seconds, their squares and their cubes
        self._usual = 0.0  # mean of the seconds that a job takes in steps as wide as is usual
        self._gap = 0.0  # mean between two that come
        self._last = -math.inf

    def came(self, arrival: float, seconds: float, usual: float) -> bool:
        """Take note of a job.

        Args:
            arrival: When it came.
            seconds: Of the machine that it takes, its share of steps that are as wide as pays.
            usual: Seconds that it takes in steps as wide as is usual.

        Returns:
            Whether ``decay`` is another now.
        """
        if not seconds > 0:  # nobody knows
            return False
        gap, self._last = max(0.0, arrival - self._last), max(self._last, arrival)
        self._count = min(self._count + 1, MEMORY)
        weight = 1 / self._count
        self._moments = [mean + (seconds**n - mean) * weight for n, mean in enumerate(self._moments, 1)]
        self._usual += (usual - self._usual) * weight
        if self._count > 1:
            self._gap += (min(gap, PAUSE * self._moments[0]) - self._gap) / (self._count - 1)
        wanted = self._wanted()
        if self.decay / CHANGE < wanted < self.decay * CHANGE:
            return False
        self.decay = wanted
        return True

    @property
    def _load(self) -> float:
        """The share of the time in which the machine has work."""
        if self._count < FEW:
            return USUAL_LOAD
        load = self._moments[0] / self._gap if self._gap > 0 else math.inf
        return min(max(load, LEAST_LOAD), MOST_LOAD)

    def _wanted(self) -> float:
        """A part of gamma.

        More of it where steps are wide: there those who take longest are those with the most steps, and not who waits.
        """
        mean, square, cube = self._moments
        load = self._load
        rate = load / mean
        a, b = rate * cube / 6, rate * square / 2  # a * gamma**2 + b * gamma = 1 - load
        gamma = (math.sqrt(b * b + 4 * a * (1 - load)) - b) / (2 * a)
        width = max(1.0, self._usual / mean)
        return PART * gamma * math.cbrt(width)
