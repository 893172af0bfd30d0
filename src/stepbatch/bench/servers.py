"""Servers of whatever kind, started for a benchmark and stopped after it."""

from __future__ import annotations

import http.client
import os
import re
import shlex
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn
from urllib.parse import urlsplit

from stepbatch.errors import SetupError

GRACE_SECONDS = 15.0  # from SIGTERM to SIGKILL
ORPHANS_SECONDS = 3.0  # likewise, for what outlives the process that was started
GONE_SECONDS = 30.0  # how long a killed process is waited for: a driver may hold on to it
ANSWER_SECONDS = 5.0  # to a question whether the server is up
LOOK_SECONDS = 0.1  # between two looks whether something is so by now
LAST_LINES = 5  # of a log, shown in an error

_ADDRESS = re.compile(r"http://(\[[0-9a-fA-F:]+\]|[\w.-]+):(\d+)")


class Server:
    """A server in a process of its own, with a group of processes of its own.

    Args:
        process: The leader of the group.
        base_url: Where the server will answer; empty if it says so itself, on its standard output.
        log: What it writes to its standard error.
        out: What it writes to its standard output.
    """

    def __init__(self, process: subprocess.Popen[bytes], base_url: str, log: Path, out: Path) -> None:
        self.base_url = base_url
        self._process = process
        self._log = log
        self._out = out

    def wait_until_ready(self, timeout: float) -> None:
        """Wait until the server answers.

        Raises:
            SetupError: it ended, or doesn't answer within ``timeout`` seconds.
        """
        deadline = time.monotonic() + timeout
        while not self._ready():
            self.check()
            if time.monotonic() >= deadline:
                where = f"at {self.base_url}" if self.base_url else "and did not say where it listens"
                raise SetupError(f"the server did not answer within {timeout:g} s {where}{self._last_words()}")
            time.sleep(LOOK_SECONDS)

    def check(self) -> None:
        """Raise ``SetupError`` if the server has ended."""
        status = self._process.poll()
        if status is not None:
            how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
            raise SetupError(f"the server {how}{self._last_words()}")

    def stop(self) -> None:
        """End every process of the group: gently, if they listen."""
        try:
            self._signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(GRACE_SECONDS)
                self._wait_for_orphans(ORPHANS_SECONDS)
        finally:  # an impatient second Ctrl-C comes here too
            self._signal(signal.SIGKILL)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(GONE_SECONDS)

    def _ready(self) -> bool:
        self.base_url = self.base_url or self._printed_address()
        if not self.base_url:
            return False
        status = _ask(self.base_url, "/health")
        status = _ask(self.base_url, "/v1/models") if status in (404, 405) else status
        return status in (200, 401, 403)  # up, if not for those without a key

    def _printed_address(self) -> str:
        lines = self._out.read_text(errors="replace").rpartition("\n")[0]  # the last may be half written
        found = _ADDRESS.search(lines)
        if found is None:
            return ""
        host = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}.get(found[1], found[1])
        return f"http://{host}:{found[2]}"

    def _last_words(self) -> str:
        for path in (self._log, self._out):
            lines = [line for line in path.read_text(errors="replace").splitlines() if line.strip()]
            if lines:
                return ": " + "\n".join(lines[-LAST_LINES:])
        return "; it wrote nothing"

    def _signal(self, number: int) -> bool:
        """Send a signal to the group; whether there is a group."""
        try:
            os.killpg(self._process.pid, number)
        except (ProcessLookupError, PermissionError):  # macOS answers so if only zombies are left
            return False
        return True

    def _wait_for_orphans(self, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        while self._signal(0) and time.monotonic() < deadline:
            time.sleep(LOOK_SECONDS)


@contextmanager
def running(
    command: Sequence[str], log: Path, *, base_url: str = "", ready_timeout: float = 300.0, index: int = 0
) -> Iterator[Server]:
    """A server that answers, for as long as the context lasts; see ``started``.

    Raises:
        SetupError: it can't be started, ended, or doesn't answer within ``ready_timeout`` seconds.
    """
    with started(command, log, base_url=base_url, index=index) as server:
        server.wait_until_ready(ready_timeout)
        yield server


@contextmanager
def started(command: Sequence[str], log: Path, *, base_url: str = "", index: int = 0) -> Iterator[Server]:
    """A server that was started but need not answer yet, so that several can load their models at the same time.

    The server is up when ``/health``, or ``/v1/models`` where there is no such route, answers 200. When the context is
    left, or this process is told to end by SIGTERM or SIGHUP, every process of the server's group is ended; processes
    that moved to another session have to follow by themselves.

    Args:
        command: The program and its arguments; ``{port}`` in them becomes a free port, ``{index}`` the ``index``.
        log: The file for its standard error; standard output goes to one beside it that ends in ``.out``.
        base_url: The server's address; without it, that of ``{port}``, or else the first that the server prints on
            standard output.
        index: Tells several servers of one command apart.

    Raises:
        SetupError: it can't be started, or something else answers at its address.
    """
    if base_url and _ask(base_url, "/health") is not None:
        raise SetupError(f"something answers at {base_url} already, before the server is started")
    if any("{port}" in word for word in command):
        port = (urlsplit(base_url).port if base_url else None) or free_port()
        base_url = base_url or f"http://127.0.0.1:{port}"
        command = [word.replace("{port}", str(port)) for word in command]
    command = [word.replace("{index}", str(index)) for word in command]
    out = log.with_suffix(".out")
    with ExitStack() as stack:
        stack.enter_context(_ending_by_signals())
        server = Server(_start(command, log, out), base_url, log, out)
        stack.callback(server.stop)
        yield server


def free_port() -> int:
    """A port of the loopback interface that nothing listens on."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def _start(command: Sequence[str], log: Path, out: Path) -> subprocess.Popen[bytes]:
    try:
        with log.open("wb") as errors, out.open("wb") as output:
            return subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=errors, start_new_session=True
            )
    except OSError as error:
        raise SetupError(f"can't start {shlex.join(command)}: {error}") from error


def _ask(base_url: str, path: str) -> int | None:
    """The status of the answer to a GET; ``None`` if there is none."""
    parts = urlsplit(base_url)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = kind(parts.hostname or "", parts.port, timeout=ANSWER_SECONDS)
    try:
        connection.request("GET", f"{parts.path.rstrip('/')}{path}")
        return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


@contextmanager
def _ending_by_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP unwind this process as Ctrl-C does, where they would end it on the spot."""
    if threading.current_thread() is not threading.main_thread():  # which alone may set handlers
        yield
        return
    handlers = {number: signal.signal(number, _leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    signal.signal(number, signal.SIG_IGN)  # one is enough; what it started is being ended
    raise SystemExit(128 + number)
