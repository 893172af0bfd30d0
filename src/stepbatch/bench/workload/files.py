"""Files that prompts are read from: their text, and which layout it looks like."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NoReturn

from stepbatch.errors import OptionError

PROMPT_COLUMNS = ("Prompts", "Prompt", "prompts", "prompt")


def read_text(path: Path, flag: str) -> str:
    """A file's text, which is UTF-8, with a byte order mark or without.

    Raises:
        OptionError: there is no such file, it can't be read, is something else or has nothing in it.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise OptionError(f"{flag}: there is no file {path}") from None
    except OSError as error:
        raise OptionError(f"{flag}: can't read {path}: {error.strerror or error}") from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise OptionError(f"{path}:{line}: the file is not text in UTF-8") from None
    if not text.strip():
        raise OptionError(f"{path}:1: there is nothing in the file")
    return text


def lines(text: str) -> Iterator[tuple[int, str]]:
    """Each line that isn't blank, stripped, with its number."""
    for number, line in enumerate(text.split("\n"), start=1):  # splitlines would also split at U+2028 and the like
        if line.strip():
            yield number, line.strip()


def rows(path: Path, text: str, delimiter: str = ",", quoted: bool = True) -> Iterator[tuple[int, list[str]]]:
    """Each row of a table that isn't blank: the number of its last line, and its cells.

    Raises:
        OptionError: the quotes don't match.
    """
    quoting: Literal[0, 3] = csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, quoting=quoting, strict=True)
    try:
        for row in reader:
            if any(cell.strip() for cell in row):
                yield reader.line_num, row
    except csv.Error as error:
        raise OptionError(f"{path}:{reader.line_num}: {error}") from None


def parse_json(text: str, source: str, is_file: bool) -> Any:
    """What JSON says.

    Raises:
        OptionError: it isn't JSON; the message names the source, and, of a file, the line.
    """
    try:
        value = json.loads(text, parse_constant=_refuse)
        json.dumps(value, ensure_ascii=False).encode()  # half of a surrogate pair can't be sent
        return value
    except json.JSONDecodeError as error:
        where = f"{source}:{error.lineno}" if is_file else source
        raise OptionError(f"{where}: this is not JSON: {error.msg}, column {error.colno}") from None
    except (ValueError, RecursionError) as error:
        raise OptionError(f"{source}: this is not JSON: {error}") from None


def guess(text: str) -> str:
    """The dataset whose layout a text seems to have."""
    _, first = next(lines(text))
    columns = [column.strip() for column in first.split(",")]
    if first.startswith("[") and ('"prompt_en"' in text or '"caption"' in text):
        return "vbench"
    if first.startswith(('{"', "Request(")) or "timestamp" in columns:
        return "trace"
    if first.split("\t")[0] == "Prompt" and "\t" in first:
        return "parti"
    return "drawbench" if columns[0] in PROMPT_COLUMNS and "Category" in columns else "text"


def wrong_layout(path: Path, text: str, dataset: str, expected: str) -> OptionError:
    """The error of a file that isn't laid out as the dataset is."""
    looks = guess(text)
    hint = "" if looks == dataset else f"; it looks like --dataset {looks}"
    return OptionError(f"{path}:1: --dataset {dataset} expects {expected}{hint}")


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is none of its numbers")
