"""The engine in this process, for use as a library."""

from __future__ import annotations

from stepbatch.config import EngineConfig
from stepbatch.engine.backends import load_runner
from stepbatch.engine.engine import Engine
from stepbatch.engine.warmup import remembered


def load_engine(config: EngineConfig | None = None) -> Engine:
    """Load a model, the bundled one without ``config``, into an engine for ``Engine.generate``.

    Raises:
        SetupError: the model can't be loaded as asked.
    """
    config = config or EngineConfig()
    runner = load_runner(config)
    return Engine(runner, config.undelayed(), costs=remembered(runner, config))
