"""The checkpoints, each written when it is first asked for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

Checkpoints = Callable[[str], Path]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    from tests.pipelines import checkpoints

    folder = tmp_path_factory.mktemp("pipelines")

    def written(kind: str) -> Path:
        return folder / kind if (folder / kind).exists() else checkpoints.write(kind, folder / kind)

    return written
