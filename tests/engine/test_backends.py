import logging

import pytest

from stepbatch.config import BatchingConfig, EngineConfig, ModelConfig
from stepbatch.engine.backends import load_runner
from stepbatch.engine.runner import TorchRunner
from stepbatch.testing import FakeRunner


def test_the_fake_one_is_fake() -> None:
    assert isinstance(load_runner(EngineConfig(model=ModelConfig(backend="fake"))), FakeRunner)


@pytest.mark.parametrize(("delay_ms", "warned"), [(0.0, False), (5.0, True)])
def test_a_delay_that_a_native_model_has_no_use_for_is_told(
    delay_ms: float, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        runner = load_runner(EngineConfig(batching=BatchingConfig(dynamic_batch_delay_ms=delay_ms)))
    assert isinstance(runner, TorchRunner)
    assert ("--dynamic-batch-delay-ms has no effect" in caplog.text) is warned
