"""A server in a process of its own, as an operator would start it, to be hurt."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

FAKE = ("--backend", "fake", "--log-level", "warning")  # takes a fixed time a step, and starts without torch


class Served:
    """``stepbatch serve`` with flags of ``serve``, on a free port; what it writes to stderr is in a file.

    Without ``--backend`` it is the fake one; name ``--model-path`` for a real one.
    """

    def __init__(self, *flags: str, env: dict[str, str] | None = None) -> None:
        given = flags if "--model-path" in flags or "--backend" in flags else (*FAKE, *flags)
        self._log = tempfile.NamedTemporaryFile(prefix="stepbatch-test-", suffix=".log")  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, "-W", "error", "-m", "stepbatch", "serve", "--port", "0", *given],
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env={**os.environ, **(env or {})},
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line.startswith("stepbatch serves"), (line, self.log)
        self.url = line.split()[-1]
        self.http = httpx.Client(base_url=self.url, timeout=60)

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def log(self) -> str:
        """What it has written to stderr."""
        return Path(self._log.name).read_text()

    def engine_pid(self, seconds: float = 30.0) -> int:
        """The engine process's; waits until there is one."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            for pid in children(self.pid):
                command = _read(f"/proc/{pid}/cmdline").split("\0")
                if "stepbatch.engine.process" in command:
                    return pid
            time.sleep(0.01)
        raise AssertionError("the server has no engine process")

    def generate(self, **fields: Any) -> httpx.Response:
        """Ask for a picture, with few steps unless given others."""
        body = {"prompt": "a cat", "size": "16x16", "num_inference_steps": 2, **fields}
        return self.http.post("/v1/images/generations", json=body)

    def metric(self, name: str) -> float:
        """The value of a metric without labels."""
        found = re.search(rf"^stepbatch:{name} (\S+)$", self.http.get("/metrics").text, re.MULTILINE)
        assert found, name
        return float(found[1])

    def disconnect(self) -> None:
        """Close all connections that are kept."""
        self.http.close()
        self.http = httpx.Client(base_url=self.url, timeout=60)

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        """End it, in whatever state it is; a stopped process is killed too."""
        self.http.close()
        self.process.kill()
        self.process.communicate()
        self._log.close()


def until(condition: Callable[[], object], seconds: float = 30.0) -> float:
    """Wait for something to come true; the seconds that it took."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds, "it has not come true"
        time.sleep(0.005)
    return time.monotonic() - began


def until_not_ready(server: Served) -> tuple[float, float]:
    """Wait until ``/ready`` says 503.

    Returns:
        The seconds after which nobody was told 200 who asked, and those until the first 503 was there. Between them are
        what client and machine take.
    """
    began, last = time.monotonic(), 0.0
    while True:
        asked = time.monotonic() - began
        if server.http.get("/ready").status_code == 503:
            return last, time.monotonic() - began
        assert asked < 30.0, "it is still ready"
        last = asked


def run_first(folder: Path, code: str) -> dict[str, str]:
    """An environment in which every Python process runs some code before all else."""
    (folder / "sitecustomize.py").write_text(code)
    return {"PYTHONPATH": os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))}


def address(url: str) -> tuple[str, int]:
    """Host and port."""
    host, _, port = url.removeprefix("http://").rpartition(":")
    return host, int(port)


def listens(url: str) -> bool:
    """Whether somebody takes connections there."""
    with socket.socket() as client:
        return client.connect_ex(address(url)) == 0


def children(pid: int) -> list[int]:
    """The processes that a process has started."""
    return [int(child) for child in _read(f"/proc/{pid}/task/{pid}/children").split()]


def alive(pid: int) -> bool:
    """Whether a process is there, and no zombie."""
    return _read(f"/proc/{pid}/stat").rpartition(")")[2].split()[:1] not in ([], ["Z"])


def descriptors(pid: int) -> int:
    """How many files and sockets a process has open."""
    return len(os.listdir(f"/proc/{pid}/fd"))


def resident_mb(pid: int) -> float:
    """The memory that a process holds, MiB."""
    found = re.search(r"VmRSS:\s+(\d+) kB", _read(f"/proc/{pid}/status"))
    return int(found[1]) / 1024 if found else 0.0


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""
