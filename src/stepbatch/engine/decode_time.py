"""How long outputs are decoded before a step. Plain figures, without torch and clocks.

The engine goes by ``decode_room``; what runs ahead of it, or simulates it, decodes by ``PredictedDecoding``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from stepbatch.engine.cost import Costs
from stepbatch.engine.plan import Plan
from stepbatch.engine.scheduler import DECODE_STEPS
from stepbatch.request import Job

SLICE_SECONDS = 0.1  # that decoding may keep others waiting, even if a step takes less
ROUNDING = 1e-9  # seconds by which a slice may be over: what sums of seconds are off by isn't worth another


def decode_room(plan: Plan, costs: Costs, last_step: float = 0.0) -> float:
    """Seconds that decoding may take before a plan's step: about twice as long as that; endless if it is short.

    What is left then pauses until the next step. In whole calls nothing pauses.

    Args:
        last_step: Seconds that the last step took, for as long as costs aren't known.
    """
    if not plan.decode or plan.decode[0].signature is not None:
        return math.inf
    decode = costs.decode_of(plan.decode) if costs.known else math.inf
    if decode <= SLICE_SECONDS:
        return math.inf
    step = costs.step_of(plan.denoise) if costs.known else last_step
    room = max(DECODE_STEPS * step, SLICE_SECONDS) if plan.denoise else SLICE_SECONDS
    return math.inf if decode <= room else room


@dataclass(eq=False, slots=True)
class Decoded:
    """What decoding has come to before a plan's step, or before some steps of the same plan."""

    seconds: float = 0.0
    done: list[tuple[Job, float]] = field(default_factory=list)  # each with the seconds until it was
    steps: int = 1  # before how many steps that was, as long each time


class PredictedDecoding:
    """Decodes as the engine does, where everything takes what was predicted; at most one job is paused."""

    def __init__(self) -> None:
        self._paused: Job | None = None
        self._left = 0.0  # seconds, of what is paused

    def go_on(self, plan: Plan, costs: Costs, steps: int = 1) -> Decoded:
        """Decode before a plan's step; or before each of several, as long as no job is done.

        Args:
            steps: How many at most.
        """
        if not plan.decode:
            return Decoded()
        room = decode_room(plan, costs)
        if room == math.inf:
            seconds = sum([self._take_up(job, costs) for job in plan.decode])
            return Decoded(seconds, [(job, seconds) for job in plan.decode])
        decoded = Decoded()
        for job in plan.decode:
            left = self._take_up(job, costs)
            if decoded.seconds + left > room + ROUNDING:
                if not decoded.done:
                    decoded.steps = max(1, min(steps, math.ceil((left - ROUNDING) / room) - 1))
                spent = decoded.steps * room - decoded.seconds
                self._paused, self._left = job, left - spent
                decoded.seconds += spent
                break
            decoded.seconds += left
            decoded.done.append((job, decoded.seconds))
        return decoded

    def _take_up(self, job: Job, costs: Costs) -> float:
        """Seconds that a job's decoding still takes; another that is paused is given up, as the engine does it."""
        left = self._left if job is self._paused else costs.decode.of(job.pixels)
        self._paused = None
        return left
