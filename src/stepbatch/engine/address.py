"""Where the engine process's socket is: in a private directory, held by a lock for as long as its server lives.

Whoever is killed can't tidy up. The system lets go of a lock however its holder ends, so whoever starts next knows
which directories nobody needs any more.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

PREFIX = "stepbatch-ipc-"  # short: the path of a socket may have 107 bytes
SOCKET = "engine"


@contextmanager
def private_address() -> Iterator[str]:
    """An address for a socket that only this user can reach; the directory is gone when the context is left.

    Raises:
        OSError: there is no place for it.
    """
    sweep()
    with ExitStack() as stack:
        directory, lock = _locked_directory()
        stack.callback(os.close, lock)
        address = f"ipc://{directory / SOCKET}"
        stack.callback(remove, address)
        yield address


def remove(address: str) -> None:
    """Remove an address's socket and directory, as far as they are still there."""
    path = Path(address.removeprefix("ipc://"))
    with suppress(OSError):
        path.unlink(missing_ok=True)
        path.parent.rmdir()


def sweep() -> None:
    """Remove what this user's processes have left that are no more."""
    for directory in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with suppress(OSError), ExitStack() as stack:  # it is another user's, or its lock is held
            descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            stack.callback(os.close, descriptor)
            if os.fstat(descriptor).st_uid == os.geteuid():
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                remove(f"ipc://{directory / SOCKET}")


def _locked_directory() -> tuple[Path, int]:
    """A new directory and the descriptor that its lock goes with."""
    while True:
        directory = Path(tempfile.mkdtemp(prefix=PREFIX))
        with suppress(FileNotFoundError):  # between its making and its locking, it looks abandoned, and may be swept
            descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
            with suppress(OSError):  # file systems without locks: then it isn't swept either
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            if directory.exists():
                return directory, descriptor
            os.close(descriptor)
