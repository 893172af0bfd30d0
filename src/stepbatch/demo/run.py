"""``stepbatch demo``: the burst sent to a server that batches and to one that doesn't, laid out side by side."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path

from rich.console import Console
from rich.table import Table

from stepbatch.config import ModelConfig
from stepbatch.demo.burst import BURST, Answer, Figures, send, serving
from stepbatch.demo.checker import mismatch
from stepbatch.demo.scenes import parse
from stepbatch.demo.sheet import Entry, contact_sheet
from stepbatch.errors import SetupError

ROWS = (
    ("requests a second", "requests_per_second", "{:.2f}"),
    ("latency, mean (s)", "latency_mean", "{:.2f}"),
    ("latency, p50 (s)", "latency_p50", "{:.2f}"),
    ("latency, p99 (s)", "latency_p99", "{:.2f}"),
    ("jobs a step, mean", "jobs_per_step", "{:.1f}"),
)


def run_demo(folder: Path, model: ModelConfig) -> int:
    """Send the burst to both servers, write pictures, contact sheet and report; returns 1 if a request failed.

    Raises:
        SetupError: a server didn't start or has gone, or the folder can't be written.
    """
    console = Console()
    flags = model_flags(model)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with console.status(f"{len(BURST)} different requests at once, batched"):
            with serving(flags, folder / "server.log") as server:
                answers, batched = send(server, BURST)
        with console.status("the same again, one at a time"):
            with serving([*flags, "--dynamic-batch-max-size", "1"], folder / "server-single.log") as server:
                single = send(server, BURST)[1]
        entries = check(answers)
        save(folder, entries, batched, single)
    except OSError as error:
        raise SetupError(f"can't write to {folder}: {error.strerror or error}") from error
    console.print(comparison(batched, single))
    console.print(summary(entries))
    for path in (folder / "contact-sheet.png", folder / "report.json"):
        print(path)
    return 1 if batched.failed or single.failed else 0


def model_flags(model: ModelConfig) -> list[str]:
    """The flags that make a server have this model's settings."""
    flags = []
    for field in fields(model):
        value = vars(model)[field.name]
        if value != field.default:
            flags += [f"--{field.name.replace('_', '-')}", str(value)]
    return flags


def check(answers: Sequence[Answer]) -> list[Entry]:
    """Read every picture back and hold it against its prompt."""
    entries = []
    for answer in answers:
        scene = parse(answer.wish.prompt)
        wrong = None if scene is None or answer.picture is None else mismatch(answer.picture, scene)
        entries.append(Entry(answer, wrong))
    return entries


def save(folder: Path, entries: Sequence[Entry], batched: Figures, single: Figures) -> None:
    """Write the pictures, the contact sheet and the report."""
    (folder / "pictures").mkdir(exist_ok=True)
    for i, entry in enumerate(entries, start=1):
        if entry.answer.picture is not None:
            entry.answer.picture.save(folder / "pictures" / f"{i:02d}.png")
    title = f"{len(entries)} different requests, sharing every denoising step"
    subtitle = (
        f"{batched.requests_per_second:.2f} requests a second, mean latency {batched.latency_mean:.2f} s, "
        f"{batched.jobs_per_step:.1f} jobs a step on average      one at a time: "
        f"{single.requests_per_second:.2f} requests a second, mean latency {single.latency_mean:.2f} s"
    )
    contact_sheet(entries, title, subtitle).save(folder / "contact-sheet.png")
    report = {
        "batched": batched.to_json(),
        "one at a time": single.to_json(),
        "cpus": os.cpu_count(),
        "requests": [
            {**asdict(entry.answer.wish), "seconds": round(entry.answer.seconds, 4), "mismatch": entry.mismatch}
            for entry in entries
        ],
    }
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n")


def comparison(batched: Figures, single: Figures) -> Table:
    """The figures of both servers, and what the first is of the second."""
    table = Table(title=f"{batched.requests} requests at once")
    for heading in ("", "batched", "one at a time", "ratio"):
        table.add_column(heading, justify="right" if heading else "left")
    for label, name, pattern in ROWS:
        a, b = asdict(batched)[name], asdict(single)[name]
        table.add_row(label, pattern.format(a), pattern.format(b), f"{a / b:.2f}x" if b else "")
    return table


def summary(entries: Sequence[Entry]) -> str:
    """How many pictures show what their prompts say, and what is wrong with the others."""
    checked = [entry for entry in entries if entry.mismatch is not None]
    wrong = [entry for entry in checked if entry.mismatch]
    lines = [f"{len(checked) - len(wrong)} of {len(checked)} pictures show what their prompts say"]
    lines += [f"  {entry.answer.wish.prompt}: {entry.mismatch}" for entry in wrong]
    lines += [f"  {entry.answer.wish.prompt}: {entry.answer.error}" for entry in entries if entry.answer.error]
    return "\n".join(lines)
