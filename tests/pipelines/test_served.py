"""Pipelines of every kind, served over HTTP: a burst that shares one call gets what each of its requests gets alone.

The engine is in a thread here. ``test_stream.py`` and ``tests/server/test_serve_lines.py`` have it where users have it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.pipelines import engine_thread
from tests.pipelines.asked import asked_of, requests
from tests.pipelines.bursts import DIFFERENT, ROUNDED, apart, least_apart, load, reference
from tests.pipelines.checkpoints import KINDS
from tests.pipelines.conftest import Checkpoints
from tests.pipelines.server import Serving, serving_here

from stepbatch.engine import supervisor

# diffusers' own: some of its noise schedules hand torch's tensors to numpy
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

BURST = 3


@pytest.fixture(params=[kind for kind in KINDS if kind != "stable-diffusion"])  # it is test_stream.py's
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def server(kind: str, checkpoint: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Serving]:
    monkeypatch.setattr(supervisor, "_spawn", engine_thread.spawn)
    with serving_here(checkpoint(kind), BURST, tmp_path / "videos") as started:
        yield started


def test_a_burst_gets_what_each_gets_alone(server: Serving, kind: str, checkpoint: Checkpoints, tmp_path: Path) -> None:
    [asked] = asked_of(kind)
    wanted = requests(asked, BURST)
    together = server.ask_all(wanted)
    assert server.calls() == (1, BURST)
    alone = [server.ask(request) for request in wanted]
    assert server.calls() == (1 + BURST, 2 * BURST)
    assert max(apart(ours, one) for ours, one in zip(together, alone, strict=True)) <= ROUNDED
    assert apart(together[1], reference(asked, load(checkpoint(kind)), wanted[1], tmp_path)) <= ROUNDED
    assert least_apart(together) > DIFFERENT
