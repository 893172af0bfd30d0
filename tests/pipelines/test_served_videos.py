"""Pipelines that make videos, served over HTTP: a burst that shares one call gets what each request gets alone."""

from __future__ import annotations

import pytest
from tests.pipelines.bursts import hold
from tests.pipelines.conftest import Checkpoints
from tests.pipelines.server import serving

# diffusers' own: some of its noise schedules hand torch's tensors to numpy
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.mark.parametrize("kind", ["wan", "ltx-image-to-video"])
def test_a_burst_gets_what_each_gets_alone(
    kind: str, checkpoint: Checkpoints, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path, folder = checkpoint(kind), tmp_path_factory.mktemp("server")
    with serving(path, folder, "--video-dir", str(folder / "videos")) as server:
        hold(kind, server, path)
