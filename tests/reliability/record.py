"""What the tests of promises found, and the table of it in docs/reliability.md."""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

from stepbatch.engine.clock import cpu_name

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "reliability.md"
RESULTS = Path(__file__).parent / "soak.json"  # of the long forms, as they were last run
_TABLE = re.compile(r"(<!-- written by make soak -->\n).*?(<!-- end -->)", re.DOTALL)


@dataclass(frozen=True)
class Finding:
    """One row of the table."""

    number: int  # of the promise
    promise: str
    load: str
    faults: str
    figure: str
    seconds: float = 0.0


def save(findings: Iterable[Finding], path: Path = RESULTS) -> None:
    """Write down a run, on which machine and when; rows of promises that it didn't try stay as they were."""
    known = {(row["number"], row["promise"]): row for row in _read(path).get("findings", [])}
    known |= {(found.number, found.promise): asdict(found) for found in findings}
    rows = [known[key] for key in sorted(known)]
    machine = f"{cpu_name()}, Python {platform.python_version()}"
    path.write_text(json.dumps({"date": str(date.today()), "machine": machine, "findings": rows}, indent=2) + "\n")


def table(path: Path = RESULTS) -> str:
    """A run as Markdown."""
    run = _read(path)
    lines = [
        f"Measured on {run['date']}: {run['machine']}.",
        "",
        "| | promise | load | faults | figure | seconds |",
        "| ---: | --- | --- | --- | --- | ---: |",
    ]
    for row in run["findings"]:
        cells = [str(row[name]) for name in ("number", "promise", "load", "faults", "figure")]
        lines.append(f"| {' | '.join(cells)} | {row['seconds']:.0f} |")
    return "\n".join(lines) + "\n"


def write_table() -> None:
    """Bring the document up to date."""
    text = DOCUMENT.read_text()
    DOCUMENT.write_text(_TABLE.sub(lambda found: found[1] + table() + found[2], text))


def written_table() -> str:
    """What the document has."""
    found = _TABLE.search(DOCUMENT.read_text())
    assert found is not None
    return found[0].removeprefix(found[1]).removesuffix(found[2])


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}
