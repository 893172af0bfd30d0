"""What work costs, in seconds and bytes: a few terms each. Plain figures, without torch and clocks.

``engine.probe`` measures them, ``engine.learning`` fits them and corrects them as the engine runs, the scheduler and
the door predict from them.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Sequence

import msgspec

from stepbatch.request import Job

LEAST_WORK = 1e-9  # seconds a token, so that no job is free, whatever the fit says


class StepCost(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds of one denoising step, by the tokens of its sequences.

    ``max(host, streamed, base + per_token * sum(n) + per_square * sum(n ** 2))``, times a factor that depends on
    ``sum(n)``: caches and kernels bend what would be straight.
    """

    host: float = 0.0  # seconds that the host needs to launch a step, whatever is in it
    streamed: float = 0.0  # seconds to bring weights over that don't stay on the device
    base: float = 0.0
    per_token: float = 0.0
    per_square: float = 0.0
    factors: tuple[tuple[float, float], ...] = ()  # (log2 of tokens, factor), ascending; straight in between

    def seconds(self, tokens: int, squares: int) -> float:
        """How long a step of so many tokens, and squares of sequences' tokens, takes."""
        straight = self.base + self.per_token * tokens + self.per_square * squares
        return max(self.host, self.streamed, straight) * self.factor(tokens)

    def work(self, tokens: int, squares: int) -> float:
        """What these sequences add to a step that is wide already, seconds; never nothing."""
        return max(self.per_token, LEAST_WORK) * tokens + self.per_square * squares

    def rate(self, tokens: int, squares: int) -> float:
        """Work a second of such a step, which is at most about one; 0 as long as nothing is known."""
        seconds = self.seconds(tokens, squares)
        return self.work(tokens, squares) / seconds if seconds else 0.0

    def factor(self, tokens: int) -> float:
        """How much longer a step of so many tokens takes than the formula says."""
        if not self.factors:
            return 1.0
        at = math.log2(max(1, tokens))
        after = bisect_left(self.factors, (at, 0.0))
        if after == 0:
            return self.factors[0][1]
        if after == len(self.factors):
            return self.factors[-1][1]
        (left, low), (right, high) = self.factors[after - 1], self.factors[after]
        return low + (high - low) * (at - left) / (right - left)


class LinearCost(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds, or bytes, of things that are done one by one: so much each, and so much for a unit of their size."""

    each: float = 0.0
    per_unit: float = 0.0

    def of(self, size: float) -> float:
        """What a thing of this size costs."""
        return self.each + self.per_unit * size


class Costs(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a model on its device. It crosses the process boundary, so that the door knows it too."""

    known: bool = False  # whether it was measured: the default says nothing
    step: StepCost = StepCost()
    prompt: LinearCost = LinearCost()  # encoding one, by its tokens, seconds
    image: LinearCost = LinearCost()  # encoding an input image, by its pixels, seconds
    decode: LinearCost = LinearCost()  # an output, by the pixels of all its frames, seconds
    step_memory: LinearCost = LinearCost()  # bytes: of the loaded model, and for each token of a step
    decode_memory: LinearCost = LinearCost()  # bytes beyond the loaded model, by an output's pixels
    beside: bool = False  # whether it was measured to be quicker to decode beside steps than between them

    def step_of(self, jobs: Sequence[Job]) -> float:
        """Seconds of a denoising step of these jobs."""
        return self.step.seconds(sum(job.tokens for job in jobs), sum(job.squares for job in jobs))

    def encode_of(self, job: Job) -> float:
        """Seconds of encoding a job's request, its prompts and its images, of which none was seen before."""
        prompts, images = self.prompt.each * prompts_of(job), job.request.images
        return prompts + len(images) * self.image.of(job.pixels) if images else prompts

    def decode_of(self, jobs: Iterable[Job]) -> float:
        """Seconds of decoding these jobs' outputs, one after the other."""
        pixels = [job.pixels for job in jobs]
        return len(pixels) * self.decode.each + sum(pixels) * self.decode.per_unit


UNKNOWN = Costs()


def prompts_of(job: Job) -> int:
    """How many prompts a job's request brings. The empty negative prompt is encoded once, for all requests."""
    return 2 if len(job.lengths) > 1 and job.request.negative_prompt else 1
