from pathlib import Path

import pytest
from tests.models import tiny

from stepbatch.config import EngineConfig, ModelConfig
from stepbatch.engine.runner import TorchRunner
from stepbatch.models import load_model


@pytest.fixture(scope="session")
def z_image_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.z_image(tmp_path_factory.mktemp("checkpoints") / "tiny-z-image")


@pytest.fixture(scope="session")
def z_image_runner(z_image_path: Path) -> TorchRunner:
    return TorchRunner(load_model(EngineConfig(model=ModelConfig(model_path=str(z_image_path)))))
