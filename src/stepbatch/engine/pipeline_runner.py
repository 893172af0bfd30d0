"""Runs whole calls of a pipeline: all steps of jobs that have the same signature, from prompts to pixels."""

from __future__ import annotations

import resource
from collections.abc import Hashable, Sequence

import torch

from stepbatch.engine.engine import Tick
from stepbatch.errors import RequestError
from stepbatch.models.pipeline import Pipeline
from stepbatch.request import GenerationRequest, Job


class PipelineRunner:
    """The runner of what has no native model.

    Args:
        pipeline: The loaded checkpoint.
    """

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline = pipeline
        self.info = pipeline.info
        self.whole_calls = True
        self._drawn: dict[tuple[str, int], bytes | RequestError] = {}

    def check(self, request: GenerationRequest) -> None:
        self.pipeline.check(request)

    def tokens(self, request: GenerationRequest) -> int:
        return self.pipeline.tokens(request)

    def signature(self, request: GenerationRequest) -> Hashable:
        return self.pipeline.signature(request)

    def shares(self, request: GenerationRequest) -> bool:
        return self.pipeline.shares(request)

    def encode(self, jobs: Sequence[Job]) -> None:
        """Nothing: the call does it."""

    @torch.inference_mode()
    def denoise(self, jobs: Sequence[Job], tick: Tick) -> None:
        outcomes = self.pipeline.draw([job.request for job in jobs], [job.seed for job in jobs], tick)
        for job, outcome in zip(jobs, outcomes, strict=True):
            if not job.ended:
                self._drawn[job.id] = outcome if isinstance(outcome, RequestError) else _pixels(outcome)

    def decode(self, jobs: Sequence[Job]) -> list[bytes | RequestError]:
        return [self._drawn[job.id] for job in jobs]

    def forget(self, job: Job) -> None:
        self._drawn.pop(job.id, None)

    def peak_memory_mb(self) -> float:
        if self.pipeline.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.pipeline.device) / 2**20
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def _pixels(frames: torch.Tensor) -> bytes:
    return frames.mul(255).round().to(torch.uint8).numpy().tobytes()
