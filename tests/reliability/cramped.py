"""An engine process whose model has no memory for wide steps, and finds that out in their midst."""

from __future__ import annotations

import sys

import torch

from stepbatch.config import EngineConfig
from stepbatch.engine import process
from stepbatch.engine.engine import Runner
from stepbatch.engine.runner import Batch, TorchRunner
from stepbatch.models.native import load_model

ROOM = 450  # rows of latents, about six pictures of 128x128
OFTEN = 20  # which one of so many shared steps has no room in any case, as if something else took it


class Cramped(TorchRunner):
    """Raises when most of a step has been done."""

    shared = 0  # steps

    def _predict(self, batch: Batch) -> torch.Tensor:
        velocity = super()._predict(batch)
        self.shared += len(batch.jobs) > 1
        if len(batch.latents) > ROOM or (len(batch.jobs) > 1 and self.shared % OFTEN == 0):
            raise MemoryError("as if there were no more")
        return velocity


def load(config: EngineConfig) -> Runner:
    return Cramped(load_model(config), config.memory)


if __name__ == "__main__":
    process.load_runner = load
    process.main(*sys.argv[1:])
