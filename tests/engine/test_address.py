import fcntl
import os
import socket
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from stepbatch.engine import address
from stepbatch.engine.address import private_address, remove, sweep


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary files are."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.fixture
def bound() -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as server:
        yield server


def path_of(ipc: str) -> str:
    return ipc.removeprefix("ipc://")


def test_an_address_is_private_and_gone_afterwards(folder: Path, bound: socket.socket) -> None:
    with private_address() as ipc:
        bound.bind(path_of(ipc))
        (directory,) = folder.iterdir()
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
        assert [file.name for file in directory.iterdir()] == ["engine"]
    assert list(folder.iterdir()) == []


def test_what_a_killed_process_left_goes_at_the_next_start(folder: Path, bound: socket.socket) -> None:
    left = Path(tempfile.mkdtemp(prefix=address.PREFIX))  # nobody holds its lock
    bound.bind(str(left / "engine"))
    with private_address() as ipc:
        assert list(folder.iterdir()) == [Path(path_of(ipc)).parent]


def test_what_is_in_use_or_somebody_elses_stays(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with private_address() as ipc:
        (folder / "stepbatch-cache-1").mkdir()
        sweep()
        assert Path(path_of(ipc)).parent.exists()
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    left = Path(tempfile.mkdtemp(prefix=address.PREFIX))
    link = folder / f"{address.PREFIX}link"
    link.symlink_to(folder / "stepbatch-cache-1")
    sweep()
    assert sorted(folder.iterdir()) == sorted([left, link, folder / "stepbatch-cache-1"])


def test_only_what_was_made_here_is_removed(folder: Path) -> None:
    left = Path(tempfile.mkdtemp(prefix=address.PREFIX))
    (left / "notes").touch()
    sweep()
    assert (left / "notes").exists()
    remove(f"ipc://{folder / 'nothing' / 'engine'}")


@pytest.mark.parametrize("moment", ["before it is opened", "before it is locked"])
def test_a_directory_that_is_swept_before_it_is_locked_is_made_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    make, lock, swept = tempfile.mkdtemp, fcntl.flock, []

    def made(prefix: str) -> str:
        directory = make(prefix=prefix)
        if moment == "before it is opened" and not swept:
            swept.append(Path(directory))
            Path(directory).rmdir()
        return directory

    def locked(descriptor: int, operation: int) -> None:
        if moment == "before it is locked" and not swept:
            swept.extend(folder.iterdir())
            swept[0].rmdir()
        lock(descriptor, operation)

    monkeypatch.setattr(tempfile, "mkdtemp", made)
    monkeypatch.setattr(fcntl, "flock", locked)
    with private_address() as ipc:
        assert Path(path_of(ipc)).parent.exists()
        assert Path(path_of(ipc)).parent not in swept
    assert list(folder.iterdir()) == []
