"""Runs whole calls of a pipeline: all steps of jobs that have the same signature, from prompts to pixels."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import torch

from stepbatch.engine import device_memory
from stepbatch.engine.clock import DeviceClock
from stepbatch.engine.device_errors import device_errors
from stepbatch.engine.engine import Tick
from stepbatch.engine.meter import Encoded
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
        self.clock = DeviceClock(pipeline.device, waits=True)  # a call returns pixels, so it is over then
        self._drawn: dict[tuple[str, int], bytes | RequestError] = {}

    def check(self, request: GenerationRequest) -> None:
        self.pipeline.check(request)

    def lengths(self, request: GenerationRequest) -> tuple[int, ...]:
        return (self.pipeline.tokens(request),)

    def signature(self, request: GenerationRequest) -> Hashable:
        return self.pipeline.signature(request)

    def shares(self, request: GenerationRequest) -> bool:
        return self.pipeline.shares(request)

    def encode(self, jobs: Sequence[Job]) -> Encoded:
        return Encoded(0, [])  # the call does it

    @torch.inference_mode()
    @device_errors()
    def denoise(self, jobs: Sequence[Job], tick: Tick) -> None:
        outcomes = self.pipeline.draw([job.request for job in jobs], [job.seed for job in jobs], tick)
        for job, outcome in zip(jobs, outcomes, strict=True):
            if not job.ended:
                self._drawn[job.id] = outcome if isinstance(outcome, RequestError) else _pixels(outcome)

    def decode(self, jobs: Sequence[Job], seconds: float = math.inf) -> list[bytes | RequestError | None]:
        return [self._drawn[job.id] for job in jobs]

    def decode_beside(self, jobs: Sequence[Job]) -> list[bytes | RequestError | None]:
        return self.decode(jobs)

    def forget(self, job: Job) -> None:
        self._drawn.pop(job.id, None)

    def peak_memory_mb(self) -> float:
        return device_memory.peak_mb(self.pipeline.device)

    def memory_budget(self) -> float:
        return device_memory.budget(self.pipeline.device)

    def streamed_seconds(self) -> float:
        return 0.0  # it is part of what calls take

    def free_memory(self) -> None:
        device_memory.release(self.pipeline.device)


def _pixels(frames: torch.Tensor) -> bytes:
    return frames.mul(255).round().to(torch.uint8).numpy().tobytes()
