"""What the scheduler has chosen for one step of the engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

from stepbatch.request import Job


@dataclass(frozen=True, eq=False)
class Plan:
    """What one engine step does, in this order. ``denoise`` includes the jobs of ``encode``."""

    decode: list[Job] = field(default_factory=list)
    encode: list[Job] = field(default_factory=list)
    denoise: list[Job] = field(default_factory=list)
    wait: float = 0.0  # seconds until there will be something to do, where there is nothing now
    holds: Callable[[], int] = lambda: 1  # what ``steps`` asks

    @cached_property
    def steps(self) -> int:
        """For how many steps it would be the same, if nobody comes or leaves; only the first has others' units.

        It is to be asked for before the plan is carried out, and the engine doesn't: it takes one step after the other.
        """
        return self.holds()

    def __bool__(self) -> bool:
        return bool(self.denoise or self.decode)
