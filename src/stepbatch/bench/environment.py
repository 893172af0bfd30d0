"""What figures depend on besides the code: the machine and the versions."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from stepbatch import __version__
from stepbatch.engine.clock import cpu_name


def environment(packages: Sequence[str]) -> dict[str, Any]:
    """The machine and the versions of Python, stepbatch and ``packages``."""
    return {
        "date": now(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),  # over 0 before the start: something else was running
        "platform": platform.platform(terse=True),
        "python": platform.python_version(),
        "stepbatch": __version__,
        **{name: found for name in packages if (found := _version(name))},
    }


def now() -> str:
    """The time, ISO 8601 in UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
