from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that would be written, as they are then."""
    from tests.bench.figures import watched  # here, for it takes a second to import

    return watched(monkeypatch, written=False)
