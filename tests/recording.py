"""A runner that keeps what each job had before it was decoded, for comparing numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from stepbatch import EngineConfig, GenerationRequest
from stepbatch.engine.engine import Engine, Tick
from stepbatch.engine.runner import TorchRunner
from stepbatch.errors import RequestError
from stepbatch.request import Job


class RecordingRunner(TorchRunner):
    """Keeps final latents and the jobs of each step."""

    final: dict[tuple[str, int], torch.Tensor]
    steps: list[list[tuple[str, int]]]

    def denoise(self, jobs: Sequence[Job], tick: Tick) -> None:
        super().denoise(jobs, tick)
        self.__dict__.setdefault("steps", []).append([job.id for job in jobs])

    def decode(self, jobs: Sequence[Job], seconds: float = math.inf) -> list[bytes | RequestError | None]:
        for job in jobs:
            self.__dict__.setdefault("final", {})[job.id] = self.latents(job).clone()
        return super().decode(jobs, seconds)


def run(engine: Engine, requests: Sequence[GenerationRequest]) -> list[list[torch.Tensor]]:
    """The final latents of each request's outputs, ``[N, C]``."""
    runner = engine.runner
    assert isinstance(runner, RecordingRunner)
    runner.final = {}
    outputs = engine.generate(requests)
    return [[runner.final[o.request_id, o.index] for o in of_request] for of_request in outputs]


def make_engine(runner: TorchRunner, config: EngineConfig | None = None) -> Engine:
    """An engine over a recording runner that shares the model of ``runner``."""
    return Engine(RecordingRunner(runner.model), config or EngineConfig())
