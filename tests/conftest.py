import os
import sys
from pathlib import Path

import pytest
from hypothesis import settings

from stepbatch.config import EngineConfig, ModelConfig

# a tiny model gains nothing from threads, which wait for each other on a busy machine; subprocesses read it too
os.environ.setdefault("OMP_NUM_THREADS", "1")

# how long an example takes says something about the machine, not about the code
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


def pytest_sessionfinish(exitstatus: int) -> None:
    if exitstatus == 0 and "tests.models.parity" in sys.modules:
        from tests.models import parity

        parity.write_table()


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


# torch is imported where it is used: many tests do without


@pytest.fixture(scope="session")
def z_image_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.models import tiny

    return tiny.z_image(tmp_path_factory.mktemp("checkpoints") / "tiny-z-image")


@pytest.fixture(scope="session")
def z_image_runner(z_image_path: Path):  # type: ignore[no-untyped-def] # its type would import torch
    from stepbatch.engine.runner import TorchRunner
    from stepbatch.models import load_model

    return TorchRunner(load_model(EngineConfig(model=ModelConfig(model_path=str(z_image_path)))))
