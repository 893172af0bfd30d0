"""Traces: timestamps with requests, as JSON Lines, as CSV, or as lines that read ``Request(name=value, ...)``."""

from __future__ import annotations

import ast
import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from stepbatch.bench.workload.entries import FIELDS, Entry, parse
from stepbatch.bench.workload.files import lines, rows, wrong_layout
from stepbatch.bench.workload.prompts import made_up
from stepbatch.errors import OptionError

LAYOUTS = "a JSON object a line, CSV with the fields' names on its first line, or Request(name=value, ...) a line"
PROSE = ("prompt", "text", "negative_prompt")  # a number in there is text all the same

Row = tuple[int, dict[str, Any]]  # the line's number, values by name


MILLISECONDS = 1e11  # since 1970: a year in seconds that nobody will see


def read_trace(path: Path, text: str, seed: int) -> list[Entry]:
    """Every request, in the order of time, the first at 0 seconds. Without timestamps, the order is the file's.

    Args:
        path: Where it is; images' paths are relative to its folder, or else to the current one.
        text: What it says.
        seed: Of the prompts that are made up where it has none.

    Raises:
        OptionError: a line is none of its layout, or only some have timestamps; the message names the line.
    """
    _, first = next(lines(text))
    reader = _calls if first.startswith("Request(") else _objects if first.startswith("{") else _table
    found = [(line, parse(values, f"{path}:{line}")) for line, values in reader(path, text)]
    if not found:
        raise OptionError(f"{path}:1: there are no requests in the file")
    _shift(path, found)
    prompts = made_up(len(found), seed)
    entries = [
        _entry(path, line, {"prompt": prompt, **fields}) for (line, fields), prompt in zip(found, prompts, strict=True)
    ]
    return sorted(entries, key=lambda entry: entry.timestamp or 0.0)


def _shift(path: Path, found: list[Row]) -> None:
    """Make the timestamps seconds since the first."""
    times = [fields["timestamp"] for _, fields in found if "timestamp" in fields]
    if times and min(times) > MILLISECONDS:
        raise OptionError(f"{path}: timestamps are seconds, and {min(times):g} looks like milliseconds")
    first = min(times, default=0.0)
    for line, fields in found if times else ():
        if "timestamp" not in fields:
            raise OptionError(f"{path}:{line}: there is no timestamp, while other lines have one")
        fields["timestamp"] -= first


def _entry(path: Path, line: int, fields: dict[str, Any]) -> Entry:
    images = []
    for name in fields.pop("images", ()):
        places = path.parent / name, Path(name)
        found = next((place for place in places if os.path.isfile(place)), None)  # Path's raises if it is too long
        if found is None:
            raise OptionError(f"{path}:{line}: there is no image {name:.200}")
        images.append(found)
    return Entry(images=tuple(images), **fields)


def _objects(path: Path, text: str) -> Iterator[Row]:
    for number, line in lines(text):
        try:
            yield number, msgspec.json.decode(line, type=dict[str, Any])
        except (msgspec.DecodeError, RecursionError) as error:
            raise OptionError(f"{path}:{number}: this is not a JSON object: {error}") from None


def _table(path: Path, text: str) -> Iterator[Row]:
    table = rows(path, text)
    names = [name.strip() for name in next(table, (1, []))[1]]
    if not set(names) & set(FIELDS) or len(set(names)) < len(names):
        raise wrong_layout(path, text, "trace", LAYOUTS)
    for number, row in table:
        if len(row) > len(names):
            raise OptionError(f"{path}:{number}: there are {len(row)} values for {len(names)} names; quote commas")
        yield number, {name: _cell(name, cell) for name, cell in zip(names, row, strict=False) if cell.strip()}


def _cell(name: str, cell: str) -> Any:
    """What a table's cell says as JSON; if it isn't, its text."""
    if name in PROSE:
        return cell
    try:
        return msgspec.json.decode(cell)
    except (msgspec.DecodeError, RecursionError):
        return cell.strip()


def _calls(path: Path, text: str) -> Iterator[Row]:
    """vLLM-Omni's layout, each line the representation of a Python object. Nothing of it is run."""
    for number, line in lines(text):
        try:
            yield number, _keywords(line)
        except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
            message = "this is not Request(name=value, ...) with numbers, text, lists or dicts for values"
            raise OptionError(f"{path}:{number}: {message}") from None


def _keywords(line: str) -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of backslashes in a prompt
        call = ast.parse(line, mode="eval").body
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.func.id != "Request" or call.args:
        raise ValueError("no call of Request")
    if not all(keyword.arg for keyword in call.keywords):
        raise ValueError("** has no name")
    values = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
    sent: dict[str, Any] = json.loads(json.dumps(values, allow_nan=False))  # what JSON can't say can't be sent
    return sent
