"""What a probe has found of a model, and the costs that are nearest to it."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

import msgspec

from stepbatch.engine.cost import Costs, LinearCost
from stepbatch.engine.fitting import SPREAD, Sample, StepSample, fit_linear, fit_step

MIXED = 0.3  # how much a step of several sizes counts beside one of equal jobs, which it is slower than
QUICKER = 0.95  # of a decoding and a step one after the other, that the two take at most where it pays to overlap them


class StepPoint(msgspec.Struct, frozen=True, kw_only=True):
    """A step that was measured: so many jobs of one size."""

    width: int  # pixels
    height: int
    jobs: int
    tokens: int  # of all sequences
    squares: int  # of their tokens, added up
    seconds: float


class Measured(msgspec.Struct, kw_only=True):
    """What was measured."""

    points: list[StepPoint] = []
    mixed: list[StepSample] = []  # steps of several sizes
    host: float = 0.0  # seconds that launching a step takes, where the host doesn't compute itself
    streamed: float = 0.0  # seconds that a step's weights are on their way, where they don't stay on the device
    prompts: list[float] = []  # seconds of each
    images: list[Sample] = []  # by pixels, seconds
    decodes: list[Sample] = []  # by the pixels of all frames, seconds
    step_memory: list[Sample] = []  # by tokens, bytes
    decode_memory: list[Sample] = []  # by the pixels of all frames, bytes beyond the loaded model
    beside: float = 1.0  # what a step takes with a decoding beside it, of what it takes with one before it
    seconds: float = 0.0  # that all of it took

    def costs(self) -> Costs:
        """The costs that are nearest to it; steps of one size say nothing of others, and so nothing at all."""
        steps = [StepSample(tokens=p.tokens, squares=p.squares, seconds=p.seconds) for p in self.points] + self.mixed
        if max((s.tokens for s in steps), default=0) < SPREAD * min((s.tokens for s in steps), default=1):
            return Costs()
        return Costs(
            known=True,
            step=fit_step(steps, self.host, self.streamed),
            prompt=LinearCost(each=_quiet(self.prompts) if self.prompts else 0.0),
            image=fit_linear(self.images or self.decodes),  # through the VAE, one way or the other
            decode=fit_linear(self.decodes),
            step_memory=fit_linear(self.step_memory),
            decode_memory=fit_linear(self.decode_memory),
            beside=self.beside < QUICKER,
        )


def _quiet(seconds: Sequence[float]) -> float:
    """Of the same thing done a few times, the mean of the quicker half: whatever else the machine does only adds."""
    return fmean(sorted(seconds)[: (len(seconds) + 1) // 2])
