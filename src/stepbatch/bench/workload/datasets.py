"""Prompts in the layouts in which they are published."""

from __future__ import annotations

from pathlib import Path

from stepbatch.bench.options import DatasetOptions
from stepbatch.bench.workload.entries import Entry, Task
from stepbatch.bench.workload.files import PROMPT_COLUMNS, guess, lines, read_text, rows, wrong_layout
from stepbatch.bench.workload.prompts import made_up
from stepbatch.bench.workload.traces import read_trace
from stepbatch.bench.workload.vbench import read_vbench
from stepbatch.demo.burst import BURST
from stepbatch.errors import OptionError

RANDOM_PROMPTS = 100  # where no number is asked for


def read(options: DatasetOptions, task: Task) -> list[Entry]:
    """Every entry of a dataset, once, in its order; a trace's in the order of time.

    Args:
        options: Which, and where it is. Of ``random``, there are as many as are asked for.
        task: Decides which of a folder's files is taken, and whether images are looked for.

    Raises:
        OptionError: there is no such file, or what is in it is laid out differently; the message names the line.
    """
    if options.dataset in ("demo", "random"):
        if options.dataset_path:
            raise OptionError(f"--dataset-path has no use with --dataset {options.dataset}")
        return _random(options) if options.dataset == "random" else _demo()
    if not options.dataset_path:
        raise OptionError(f"--dataset-path is needed for --dataset {options.dataset}")
    path = Path(options.dataset_path)
    if options.dataset == "vbench":
        return read_vbench(path, task)
    text = read_text(path, "--dataset-path")
    if options.dataset == "trace":
        return read_trace(path, text, options.seed or 0)
    readers = {"parti": _parti, "drawbench": _drawbench, "text": _text}
    entries = [Entry(prompt=prompt) for prompt in readers[options.dataset](path, text)]
    if not entries:
        raise OptionError(f"{path}:1: there are no prompts in the file")
    return entries


def _demo() -> list[Entry]:
    return [
        Entry(
            prompt=wish.prompt,
            width=wish.width,
            height=wish.height,
            num_inference_steps=wish.steps,
            guidance_scale=wish.guidance,
            seed=wish.seed,
        )
        for wish in BURST
    ]


def _random(options: DatasetOptions) -> list[Entry]:
    prompts = made_up(options.num_prompts or RANDOM_PROMPTS, options.seed or 0)
    return [Entry(prompt=prompt) for prompt in prompts]


def _text(path: Path, text: str) -> list[str]:
    if guess(text) != "text":
        raise wrong_layout(path, text, "text", "a prompt a line")
    return [line for _, line in lines(text)]


def _parti(path: Path, text: str) -> list[str]:
    """PartiPrompts.tsv: quotes are part of its prompts, which are never quoted themselves."""
    table = rows(path, text, delimiter="\t", quoted=False)
    _, header = next(table, (1, []))
    if header[:2] != ["Prompt", "Category"]:
        raise wrong_layout(path, text, "parti", "tabs between Prompt, Category, Challenge and Note on the first line")
    return [_cell(path, line, row, 0) for line, row in table]


def _drawbench(path: Path, text: str) -> list[str]:
    table = rows(path, text)
    header = [name.strip() for name in next(table, (1, []))[1]]
    column = next((header.index(name) for name in PROMPT_COLUMNS if name in header), None)
    if column is None:
        raise wrong_layout(path, text, "drawbench", "CSV with Prompts,Category on the first line")
    return [_cell(path, line, row, column) for line, row in table]


def _cell(path: Path, line: int, row: list[str], column: int) -> str:
    if column >= len(row) or not row[column].strip():
        raise OptionError(f"{path}:{line}: there is no prompt on the line")
    return row[column]
