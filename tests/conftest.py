import atexit
import os
import signal
import tempfile
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from tests.models import parity_table

from stepbatch.config import EngineConfig, ModelConfig

# a tiny model gains nothing from threads, which wait for each other on a busy machine; subprocesses read it too
os.environ.setdefault("OMP_NUM_THREADS", "1")

# what steps cost is measured once for all tests, and in nobody's own cache; workers and subprocesses read it too
if "PYTEST_XDIST_WORKER" not in os.environ:
    _cache = tempfile.TemporaryDirectory(prefix="stepbatch-cache-")
    atexit.register(_cache.cleanup)
    os.environ["XDG_CACHE_HOME"] = _cache.name

# a shell's jobs in the background ignore Ctrl-C, and so would every process that is started from here
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN and threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)

# how long an example takes says something about the machine, not about the code; fifty of each find what a run can
settings.register_profile("untimed", deadline=None, max_examples=50)
settings.load_profile("untimed")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--soak", action="store_true", help="run the long forms of tests/reliability")


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Bring the table of parity up to date; where the tests run in several processes, the first one does it for all."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        measured = [[*key, difference] for key, difference in parity_table.MEASURED.items()]
        session.config.workeroutput["parity"] = measured  # type: ignore[attr-defined]
    elif exitstatus == 0:
        parity_table.write_table()


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_testnodedown(node: Any, error: object) -> None:
    """Take in what a process that ran tests has measured."""
    if error is None:
        for variant, column, difference in node.workeroutput["parity"]:
            parity_table.note(column, variant, difference)


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
    from stepbatch.models.native import load_model

    return TorchRunner(load_model(EngineConfig(model=ModelConfig(model_path=str(z_image_path)))))


LONG = {"test_ownership.py", "test_peers.py", "test_gpu_benchmark.py", "test_serve_lines.py", "test_stream.py"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, so that none is left to one process at the end."""
    items.sort(key=lambda item: item.path.name not in LONG)
