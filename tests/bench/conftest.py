from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@pytest.fixture(autouse=True)
def _frozen_again() -> Iterator[None]:
    """A load client unfreezes at its end what it froze, and all that was imported with it."""
    yield
    gc.freeze()


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that would be written, as they are then."""
    from tests.bench.figures import watched  # here, for it takes a second to import

    return watched(monkeypatch, written=False)
