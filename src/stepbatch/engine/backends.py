"""What ``--backend`` names: the runner that a configuration asks for.

What a backend needs is imported with it: torch and a model's family take seconds, and a fake model needs neither.
"""

from __future__ import annotations

import logging

from stepbatch.config import EngineConfig
from stepbatch.engine.engine import Runner
from stepbatch.errors import NotNative
from stepbatch.testing import FakeRunner

log = logging.getLogger(__name__)


def load_runner(config: EngineConfig) -> Runner:
    """The runner that a configuration asks for.

    Raises:
        SetupError: its model can't be loaded as asked.
    """
    if config.model.backend == "fake":
        return FakeRunner(config.model)
    if config.model.num_threads:
        import torch

        torch.set_num_threads(config.model.num_threads)
    if config.model.backend == "diffusers":
        return _pipeline_runner(config)
    try:
        return _native_runner(config)
    except NotNative as error:
        if config.model.backend == "native":
            raise
        log.warning("%s; diffusers runs its pipeline", error)
    return _pipeline_runner(config)


def _native_runner(config: EngineConfig) -> Runner:
    from stepbatch.engine.runner import TorchRunner
    from stepbatch.models.native import load_model

    runner = TorchRunner(load_model(config), config.memory)
    if config.batching.dynamic_batch_delay_ms > 0:
        log.warning("--dynamic-batch-delay-ms has no effect: a native model's requests join its next step")
    return runner


def _pipeline_runner(config: EngineConfig) -> Runner:
    from stepbatch.engine.pipeline_runner import PipelineRunner
    from stepbatch.models.checkpoint import find_checkpoint
    from stepbatch.models.pipeline import Pipeline

    return PipelineRunner(Pipeline(config, find_checkpoint(config.model)))
