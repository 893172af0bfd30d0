"""What ``--backend`` names: the runner that a configuration asks for."""

from __future__ import annotations

import torch

from stepbatch.config import EngineConfig
from stepbatch.engine.engine import Runner
from stepbatch.engine.runner import TorchRunner
from stepbatch.models import load_model
from stepbatch.testing import FakeRunner


def load_runner(config: EngineConfig) -> Runner:
    """The runner that a configuration asks for.

    Raises:
        SetupError: its model can't be loaded as asked.
    """
    if config.model.backend == "fake":
        return FakeRunner(config.model)
    if config.model.num_threads:
        torch.set_num_threads(config.model.num_threads)
    return TorchRunner(load_model(config), config.memory)
