"""The server is killed: nothing of it goes on, and the next one finds nothing in its way."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import httpx

from .record import Finding
from .serving import Served, alive, children, listens, until

SHARED_MEMORY = Path("/dev/shm")


def working(server: Served, crowd: ThreadPoolExecutor, prompt: str = "long") -> None:
    """Have it work on something that doesn't end."""
    crowd.submit(_ask, server.url, prompt)
    until(lambda: server.metric("num_requests_running") + server.metric("num_requests_waiting"))


def _ask(url: str, prompt: str) -> None:
    body = {"prompt": prompt, "num_inference_steps": 1000}
    with suppress(httpx.HTTPError):  # it is killed meanwhile
        httpx.post(f"{url}/v1/images/generations", json=body, timeout=60)


def left(folder: Path) -> set[str]:
    """What there is of files, sockets and shared memory."""
    sockets = [line.split()[-1] for line in Path("/proc/net/unix").read_text().splitlines()]
    return {
        *(str(path) for path in folder.rglob("*")),
        *(f"socket {path}" for path in sockets if path.startswith(str(folder))),
        *(str(path) for path in SHARED_MEMORY.glob("*stepbatch*")),
        *(str(path) for path in SHARED_MEMORY.glob("torch_*")),
    }


@dataclass(frozen=True)
class Fault:
    """How a server ends."""

    number: signal.Signals
    engine: signal.Signals | None = None  # sent to the engine process right before

    def __str__(self) -> str:
        return f"{self.number.name} with an engine that got {self.engine.name}" if self.engine else self.number.name

    def strike(self, server: Served) -> float:
        """The seconds until no process that it started is there."""
        started = children(server.pid)
        assert started
        if self.engine:
            os.kill(server.engine_pid(), self.engine)
        server.signal(self.number)
        server.process.wait()
        return until(lambda: not any(map(alive, started)))


STOPPED = Fault(signal.SIGKILL, signal.SIGSTOP)  # its engine can't see to itself
ALL = Fault(signal.SIGKILL, signal.SIGKILL)  # as containers are killed
FAULTS = (Fault(signal.SIGKILL), Fault(signal.SIGSEGV), STOPPED, ALL)


def test_nothing_outlives_a_killed_server(
    serve: Callable[..., Served], tmp_path: Path, soak: bool, note: Callable[[Finding], None]
) -> None:
    faults = 10 * FAULTS if soak else (STOPPED, ALL)
    seconds: list[float] = []
    server = serve(env={"TMPDIR": str(tmp_path)})
    usual = len(left(tmp_path))
    with ThreadPoolExecutor(len(faults)) as crowd:
        for fault in faults:
            working(server, crowd)
            seconds.append(fault.strike(server))
            assert not listens(server.url)
            server = serve(env={"TMPDIR": str(tmp_path)})
            assert len(left(tmp_path)) == usual, fault
    server.signal(signal.SIGTERM)
    assert server.process.wait(10) == 0
    assert left(tmp_path) == set()
    assert max(seconds) < 5.0
    figure = f"no child after {max(seconds):.2f} s; no socket, shared memory or file after the next start"
    struck = ", ".join(dict.fromkeys(map(str, faults)))
    note(Finding(3, "server killed", "1 running", f"{len(faults)} times: {struck}", figure))
