"""What this process's children hold, on Linux."""

from __future__ import annotations

import os
import re
from pathlib import Path


def resident_mb() -> float:
    """The memory of all processes that this one has started, and that they have started, MiB."""
    return sum(_resident_mb(pid) for pid in _descendants(os.getpid()))


def _descendants(pid: int) -> list[int]:
    found = [int(child) for child in _read(f"/proc/{pid}/task/{pid}/children").split()]
    return found + [one for child in found for one in _descendants(child)]


def _resident_mb(pid: int) -> float:
    found = re.search(r"VmRSS:\s+(\d+) kB", _read(f"/proc/{pid}/status"))
    return int(found[1]) / 1024 if found else 0.0


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except (FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
        return ""
