import atexit
import gc
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
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

# processes are started by the hundred, and where nothing is kept each compiles what it imports
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# a shell's jobs in the background ignore Ctrl-C, and so would every process that is started from here
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN and threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)

# how long an example takes says something about the machine, not about the code; what few miss, another run finds
settings.register_profile("untimed", deadline=None, max_examples=12)
settings.load_profile("untimed")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--soak", action="store_true", help="run the long forms of tests/reliability")


def pytest_collection_finish() -> None:
    """Keep all that was imported out of garbage collection, which would take half a second each time."""
    gc.collect()
    gc.freeze()


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


@pytest.fixture(scope="module")
def forked_servers() -> Iterator[None]:
    """Servers that ``bench.servers`` starts begin with their modules imported."""
    from tests import forked

    with forked.starting(forked.SERVER):
        yield


@pytest.fixture(scope="module")
def forked_models() -> Iterator[None]:
    """Likewise those with real models."""
    from tests import forked

    with forked.starting(forked.MODELS):
        yield


# long files, whose servers are forked off one process that takes long to begin
MODELS = {"test_gpu_benchmark.py", "test_peers.py", "test_serve_lines.py", "test_stream.py"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """These first, before that process has begun without what they need, and so that none is left at the end."""
    items.sort(key=lambda item: item.path.name not in MODELS)


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """All tests of a file in one process, and all of these files."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file: str = super()._split_scope(nodeid)
            return "models" if Path(file).name in MODELS else file

    return Scheduling(config, log)
