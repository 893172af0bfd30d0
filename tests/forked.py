"""Python processes that begin with their modules imported: they are forked off one that has.

A server takes two seconds over its imports, an engine with a real model ten. Here a server's engine process is forked
off the server in turn; all else is as where a user starts them.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from stepbatch.bench import servers
from stepbatch.engine import process, supervisor

SERVER = ["stepbatch.server.run", "stepbatch.engine.process"]
MODELS = [*SERVER, "stepbatch.models.native", "stepbatch.engine.pipeline_runner", "stepbatch.models.pipeline"]


class Forked:
    """What of ``subprocess.Popen`` is needed, for Python with ``-c`` and code, ``-m`` and a module, or a script.

    The process leads a session of its own.

    Args:
        command: Python's path, and what it is to run.
        log: The file for its standard error.
        out: The file for its standard output.
        modules: What is imported before; it counts where this process has forked none yet.
    """

    def __init__(self, command: Sequence[str], log: Path, out: Path, modules: Sequence[str] = SERVER) -> None:
        assert command[0] == sys.executable
        for path in (log, out):
            path.write_bytes(b"")
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(modules))
        self._process = context.Process(target=_run, args=(list(command[1:]), log, out), daemon=True)
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        status = self.poll()
        if status is None:
            raise subprocess.TimeoutExpired(str(self.pid), timeout or 0.0)
        return status

    def send_signal(self, number: signal.Signals) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)
        self.wait()


@contextmanager
def starting(modules: Sequence[str]) -> Iterator[None]:
    """What ``bench.servers`` starts, where it is Python, is forked meanwhile."""
    start = servers._start

    def fork(command: Sequence[str], log: Path, out: Path) -> Any:
        return Forked(command, log, out, modules) if command[0] == sys.executable else start(command, log, out)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(servers, "_start", fork)
        yield


def _run(arguments: list[str], log: Path, out: Path) -> None:
    os.setsid()
    for path, descriptor in ((log, 2), (out, 1)):
        os.dup2(os.open(path, os.O_WRONLY), descriptor)
    asyncio.create_subprocess_exec = _fork_engine  # type: ignore[assignment]
    how = arguments.pop(0) if arguments[0] in ("-c", "-m") else ""
    what, sys.argv = arguments[0], arguments
    if how == "-c":
        exec(what, {"__name__": "__main__"})
    elif how == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, str(Path(what).parent))
        runpy.run_path(what, run_name="__main__")


async def _fork_engine(*command: str, **_: Any) -> _Engine:
    """In place of ``asyncio.create_subprocess_exec``, with which the supervisor starts the engine's process."""
    read, write = os.pipe()  # its standard input, which ends with this process
    pid = os.fork()
    if pid == 0:
        signal.set_wakeup_fd(-1)  # else its signals would wake the server
        os.setsid()
        os.close(write)
        os.dup2(read, 0)
        os.dup2(2, 1)
        try:
            process.main(*command[len(supervisor.COMMAND) :])
        except SystemExit as left:
            os._exit(int(left.code or 0))
        finally:
            os._exit(1)
    os.close(read)
    return _Engine(pid)


class _Engine:
    """What the supervisor asks of a process that it has started."""

    def __init__(self, pid: int) -> None:
        self.pid = pid

    async def wait(self) -> int:
        _, status = await asyncio.to_thread(os.waitpid, self.pid, 0)
        return os.waitstatus_to_exitcode(status)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
