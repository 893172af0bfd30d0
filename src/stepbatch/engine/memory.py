"""How many tokens a step may have, as far as memory goes: predicted, lowered where it was too much, raised slowly."""

from __future__ import annotations

import math

from stepbatch.engine.cost import Costs

SPARE = 0.05  # of the memory, for what is not foreseen
LOWERED = 0.75  # to this part of what was too much
RAISED = 1.1  # by this factor, after each
PATIENCE, MOST_PATIENCE = 60.0, 3600.0  # seconds; twice as long after each time that it was too much


def tokens_within(costs: Costs, budget: float, pixels: int) -> float:
    """The most tokens in a step that leave room for a decoding.

    Args:
        costs: With what memory steps and decoding need, if that is known.
        budget: Memory that there is for the model and all that it does, bytes.
        pixels: Of the output that is decoded.
    """
    if not costs.step_memory.per_unit:
        return math.inf
    room = (1 - SPARE) * budget - costs.step_memory.each - costs.decode_memory.of(pixels)
    return max(1.0, room / costs.step_memory.per_unit)


class TokenLimit:
    """The most tokens that a step may have; a job that has more by itself runs all the same.

    Args:
        most: As many as are predicted to fit.
    """

    def __init__(self, most: float = math.inf) -> None:
        self.tokens = self._most = most
        self._too_many = math.inf  # the fewest that were too many
        self._patience = PATIENCE
        self._raise_at = math.inf

    def lower(self, tokens: int, now: float) -> None:
        """A step of so many tokens was out of memory."""
        self.tokens = min(self.tokens, max(1.0, LOWERED * tokens))
        self._too_many = min(self._too_many, tokens)
        self._raise_at = now + self._patience
        self._patience = min(2 * self._patience, MOST_PATIENCE)

    def at(self, now: float) -> float:
        """The limit now: what was out of memory once may not be for ever, since others use the device too."""
        while now >= self._raise_at:
            self._raise_at += self._patience
            self.tokens = min(RAISED * self.tokens, self._most)
            if self.tokens >= 2 * self._too_many or self.tokens == self._most:
                self.tokens, self._too_many, self._raise_at = self._most, math.inf, math.inf
        return self.tokens
