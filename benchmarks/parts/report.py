"""Tables to read, and JSON to keep."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from parts.common import Case, Effort, Figure, told
from stepbatch.bench import environment as machine

STYLES = {True: "green", False: "bold red", None: ""}
PACKAGES = ("torch", "diffusers", "transformers")


def environment(model: str, effort: Effort) -> dict[str, Any]:
    """What the figures depend on besides the code."""
    return machine.environment(PACKAGES) | {"model": model, "effort": asdict(effort)}


def show(console: Console, title: str, cases: Sequence[Case]) -> None:
    """Print a table, a case a row."""
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("case")
    for figure in cases[0].figures:
        table.add_column(figure.name, justify="right")
    for case in cases:
        table.add_row(case.name, *map(_cell, case.figures))
    console.print(table)


def show_grid(console: Console, title: str, cases: Sequence[Case]) -> None:
    """Print the steps' table: a mixture a row, a width a column, and the least of those with a goal."""
    table = Table(title=title, title_justify="left", title_style="bold")
    rows: dict[str, dict[int, Figure]] = {}
    for case in cases:
        s = case.settings
        row = f"{told(s['threads'])}, {'guided' if s['guided'] else 'unguided'}, {s['sizes']}"
        rows.setdefault(row, {})[s["jobs"]] = case.figures[0]
    table.add_column("jobs")
    for jobs in next(iter(rows.values())):
        table.add_column(str(jobs), justify="right")
    for row, figures in rows.items():
        table.add_row(row, *map(_cell, figures.values()))
    console.print(table)
    least = min((case for case in cases if case.figures[0].met is not None), key=lambda case: case.figures[0].value)
    console.print(f"least: {_cell(least.figures[0])} ({least.name})\n")


def _cell(figure: Figure) -> str:
    goals = [f"{sign}{goal:g}" for sign, goal in (("≥", figure.at_least), ("≤", figure.at_most)) if goal is not None]
    text = " ".join([f"{figure.value:.2f}", *goals])
    style = STYLES[figure.met]
    return f"[{style}]{text}[/]" if style else text


def save(path: Path, environment: Mapping[str, Any], parts: Mapping[str, Sequence[Case]]) -> None:
    """Write everything that was measured."""
    path.parent.mkdir(parents=True, exist_ok=True)
    measured = {title: [_to_json(case) for case in cases] for title, cases in parts.items()}
    path.write_text(json.dumps(_rounded({"environment": environment, "parts": measured}), indent=1) + "\n")


def _to_json(case: Case) -> dict[str, Any]:
    figures = {f.name: {**asdict(f), "met": f.met} for f in case.figures}
    for figure in figures.values():
        del figure["name"]
    return {"case": case.name, "settings": case.settings, "figures": figures, "raw": case.raw}


def _rounded(value: Any) -> Any:
    """Seconds to the microsecond."""
    if isinstance(value, float):
        return round(value, 6)
    if isinstance(value, Mapping):
        return {key: _rounded(v) for key, v in value.items()}
    return [_rounded(v) for v in value] if isinstance(value, list | tuple) else value
