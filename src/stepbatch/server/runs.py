"""Which of the servers that share a folder are still there: each holds the lock of a file for as long as it runs."""

from __future__ import annotations

import fcntl
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Runs:
    """This server's run, and what became of the others. The system lets go of a lock however its holder ends.

    Args:
        folder: Where the locked files are; it is made if it isn't there.

    Raises:
        OSError: it can't be written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.id = secrets.token_hex(8)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with self.alone():
            self._lock = os.open(self._path(self.id), os.O_RDWR | os.O_CREAT, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep other servers from beginning meanwhile: between making its file and locking it, one would look dead."""
        lock = os.open(self.folder / "beginning.lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)

    def ended(self, run: str) -> bool:
        """Whether a run is over, in whatever way."""
        if run == self.id:
            return False
        try:
            lock = os.open(self._path(run), os.O_RDONLY)
        except FileNotFoundError:
            return True
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: whoever else looks is not taken for the run
        except BlockingIOError:
            return False
        finally:
            os.close(lock)
        return True

    def sweep(self) -> None:
        """Remove the files of runs that are over."""
        with self.alone():
            for path in self.folder.glob("*.run"):
                if self.ended(path.stem):
                    path.unlink(missing_ok=True)

    def close(self) -> None:
        """End this run."""
        self._path(self.id).unlink(missing_ok=True)
        os.close(self._lock)

    def _path(self, run: str) -> Path:
        return self.folder / f"{run}.run"
