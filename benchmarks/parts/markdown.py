"""Text and tables of the pages that benchmarks write."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence


def paragraphs(text: str) -> str:
    """Each filled to the width of the page."""
    return "\n\n".join(
        textwrap.fill(part, 120, break_long_words=False, break_on_hyphens=False) for part in text.strip().split("\n\n")
    )


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns of text, all to the left."""
    lines = [f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])
