"""Writing down in docs/models.md how close our latents came to diffusers' own."""

from __future__ import annotations

import math
import re
from pathlib import Path

DOCUMENT = Path(__file__).parents[2] / "docs" / "models.md"
COLUMNS = ("alone", "in company", "bfloat16: company")
_TABLE = re.compile(r"(<!-- written by the tests -->\n).*?(<!-- end -->)", re.DOTALL)

MEASURED: dict[tuple[str, str], float] = {}  # the largest differences of this run


def note(column: str, variant: str, difference: float) -> None:
    """Keep a difference, if it is the largest of its row and column."""
    key = variant, column
    MEASURED[key] = max(difference, MEASURED.get(key, 0.0))


def write_table() -> None:
    """Bring the table up to date, once a whole test run has measured all of its rows."""
    text = DOCUMENT.read_text()
    table = _TABLE.search(text)
    assert table is not None
    rows = {variant for variant, _ in MEASURED}
    known = {line.split("|")[1].strip() for line in table[0].splitlines()[3:-1]}
    if not rows or not known <= rows:
        return
    lines = [f"| variant | {' | '.join(COLUMNS)} |", "| --- |" + " --- |" * len(COLUMNS)]
    for variant in sorted(rows):
        cells = [_rounded_up(MEASURED.get((variant, column))) for column in COLUMNS]
        lines.append(f"| {variant} | {' | '.join(cells)} |")
    new = _TABLE.sub(lambda found: found[1] + "\n".join(lines) + "\n" + found[2], text)
    if new != text:
        DOCUMENT.write_text(new)


def _rounded_up(value: float | None) -> str:
    """To the next power of ten, so that the table is the same on every machine."""
    if value is None:
        return ""
    return f"1e{math.ceil(math.log10(value))}" if value > 0 else "0"
