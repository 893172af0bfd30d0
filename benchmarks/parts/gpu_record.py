"""What is to be measured, and what came of it: JSON, written again after every measurement.

A part has one file, ``PART.json``; in it, each model has an entry, the last that was measured.
"""

from __future__ import annotations

import json
import os
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import msgspec

from stepbatch.errors import StepbatchError

Part = Literal["card", "steps", "burst", "offload"]
Size = tuple[int, int]  # width and height, pixels

# what goes wrong in a measurement and leaves the others be: the device, the libraries' versions, too little memory
FAULTS = (
    RuntimeError,
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    AssertionError,
    ImportError,
    OSError,
    StepbatchError,
)


class Task(msgspec.Struct, frozen=True, kw_only=True):
    """One part, of one model, and how it is measured."""

    part: Part
    model: str  # the name of packaged configs; "card" where it is about the device alone
    device: str = "auto"
    small: bool = False
    quick: bool = False  # a little of everything, to see that it runs
    sizes: tuple[Size, ...] = ((512, 512), (1024, 1024))
    batch: tuple[int, ...] = (1, 2, 4, 8)
    burst_prompts: int = 64
    burst_steps: int = 4  # 0 is the model's default
    folder: str  # of the results

    @property
    def title(self) -> str:
        return self.part if self.part == "card" else f"{self.part} {self.model}"


def load(folder: Path, part: str) -> dict[str, Any]:
    """The entries of a part, by model; none if nothing has been measured."""
    path = folder / f"{part}.json"
    entries: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return entries


class Record:
    """The entry of a task, on disk as soon as it is known.

    Args:
        task: What is measured.
        seconds: How long it should take.
        about: What the figures depend on besides the code.
    """

    def __init__(self, task: Task, seconds: float, about: dict[str, Any]) -> None:
        self.task = task
        self.measures: list[dict[str, Any]] = []
        self._began = time.monotonic()
        self._seconds = seconds
        settings = {k: v for k, v in msgspec.to_builtins(task).items() if k not in ("part", "model", "folder")}
        self._entry: dict[str, Any] = {
            "state": "running",
            "environment": about,
            "settings": settings | {"budget_seconds": round(seconds, 1)},
            "measures": self.measures,
        }
        self._write()

    @property
    def left(self) -> float:
        """Seconds until the task should be done."""
        return self._seconds - (time.monotonic() - self._began)

    def add(self, what: str, **values: Any) -> None:
        """Keep a measurement."""
        self.measures.append({"measure": what, **values})
        print(f"  {what}: {_line(values)}", flush=True)
        self._write()

    @contextmanager
    def measuring(self, what: str, **values: Any) -> Iterator[dict[str, Any]]:
        """Keep what the context puts into the dict, or the error that ends it."""
        began = time.monotonic()
        try:
            yield values
        except FAULTS as error:
            traceback.print_exc()
            values["error"] = told(error)
        values["measuring_seconds"] = round(time.monotonic() - began, 2)
        self.add(what, **values)

    def has_time(self, what: str, seconds: float, **values: Any) -> bool:
        """Whether so many seconds are left; if not, that is kept."""
        if self.left >= seconds:
            return True
        self.add(what, **values, skipped=f"{max(0.0, self.left):.0f} s are left and it takes about {seconds:.0f}")
        return False

    def end(self) -> None:
        """Close the entry."""
        self._entry["state"] = "done"
        self._write()

    def fail(self, error: BaseException) -> None:
        """Close the entry with what went wrong."""
        traceback.print_exception(error)
        self._entry |= {"state": "failed", "error": told(error)}
        self._write()

    def _write(self) -> None:
        self._entry["seconds"] = round(time.monotonic() - self._began, 2)
        put(self.task, self._entry)


def put(task: Task, entry: dict[str, Any]) -> None:
    """Write a task's entry into its part's file, whole or not at all."""
    folder = Path(task.folder)
    entries = load(folder, task.part) | {task.model: entry}
    folder.mkdir(parents=True, exist_ok=True)
    new = folder / f".{task.part}.json"
    new.write_text(json.dumps(_rounded(entries), indent=1) + "\n")
    os.replace(new, folder / f"{task.part}.json")


def close(task: Task, state: str, error: str) -> None:
    """Write down how a task ended whose process couldn't any more; what it had measured stays."""
    entry = load(Path(task.folder), task.part).get(task.model, {})
    running = entry.get("state") == "running"
    put(task, (entry if running else {"measures": []}) | {"state": state, "error": error})


def told(error: BaseException) -> str:
    """An error in a line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"[:500]


def of(measures: Sequence[dict[str, Any]], what: str) -> list[dict[str, Any]]:
    """The measurements of a kind that came to something."""
    return [m for m in measures if m["measure"] == what and "error" not in m and "skipped" not in m]


def _line(values: dict[str, Any]) -> str:
    """To be read while it runs."""
    shown = {name: value for name, value in values.items() if not isinstance(value, list | dict)}
    return ", ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in shown.items()
    )


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(v) for key, v in value.items()}
    return [_rounded(v) for v in value] if isinstance(value, list | tuple) else value
