"""Promise 18: between server and engine process go messages of known types, where nobody else can reach."""

from __future__ import annotations

import asyncio
import os
import pickle
import socket
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zmq

from stepbatch.config import EngineConfig, ModelConfig
from stepbatch.engine import supervisor
from stepbatch.engine.client import AsyncEngine
from stepbatch.engine.messages import Refused, encode
from stepbatch.request import GenerationRequest

from .record import Finding
from .serving import Served, address, children

LISTENING = "0A"  # in /proc/net/tcp
ENGINE = """
import os, sys
from stepbatch.engine import process
messages, serve = {messages!r}, process.serve
count = len(os.listdir({starts!r}))
open(os.path.join({starts!r}, str(count)), "w").close()
def sending(runner, config, link, *more, **named):
    link._socket.send(messages[count])
    serve(runner, config, link, *more, **named)
if count < len(messages):
    process.serve = sending
process.main(*sys.argv[1:])
"""  # each process sends another of the messages first


class Payload:
    """What says that it was unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return os.mkdir, (str(self.trace),)


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    server = Served()
    try:
        yield server
    finally:
        server.kill()


def engine_socket(server: Served) -> Path:
    """Where the processes meet, as the engine process was told."""
    command = Path(f"/proc/{server.engine_pid()}/cmdline").read_text().split("\0")
    return Path(next(word for word in command if word.startswith("ipc://")).removeprefix("ipc://"))


def test_nobody_else_can_reach_the_engine(server: Served, note: Callable[[Finding], None]) -> None:
    path = engine_socket(server)
    assert stat.S_ISSOCK(path.stat().st_mode)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert path.parent.stat().st_uid == os.geteuid()
    listening = [found for pid in family(server.pid) for found in listeners(pid)]
    assert listening == [address(server.url)[1]]
    figure = "socket 0600 in a directory 0700; one listening TCP socket in all processes, the server's own"
    note(Finding(18, "process boundary", "1 server", "none", figure))


def test_pickles_sent_to_the_socket_are_not_read(
    server: Served, tmp_path: Path, note: Callable[[Finding], None]
) -> None:
    trace, pid = tmp_path / "trace", server.engine_pid()
    path, data = engine_socket(server), pickle.dumps(Payload(trace))
    for _ in range(20):
        with socket.socket(socket.AF_UNIX) as stranger:  # speaks no ZeroMQ
            stranger.connect(str(path))
            stranger.sendall(data * 100)
    with zmq.Context() as context:  # does, and is one too many
        with context.socket(zmq.PAIR) as peer:
            peer.setsockopt(zmq.LINGER, 0)
            peer.connect(f"ipc://{path}")
            for _ in range(20):
                peer.send(data)
            assert not peer.poll(200)
    assert server.generate().status_code == 200
    assert not trace.exists()
    assert server.engine_pid() == pid
    note(Finding(18, "pickles from strangers", "40 messages", "sent to the socket", "not read; the server goes on"))


@pytest.mark.anyio
async def test_pickles_between_the_processes_are_not_read(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    size: Callable[[int, int], int],
    note: Callable[[Finding], None],
) -> None:
    """Were one of them taken over, it could not take over the other: the engine process is ended and replaced."""
    pickled, starts = pickle.dumps(Payload(tmp_path / "trace")), tmp_path / "starts"
    starts.mkdir()
    sent = [pickled, not_text(), b"", b"\x81" * 10_000, pickled * 1000][: size(2, 5)]
    code = ENGINE.format(messages=sent, starts=str(starts))
    (tmp_path / "engine.py").write_text(code)
    monkeypatch.setattr(supervisor, "COMMAND", (sys.executable, str(tmp_path / "engine.py")))
    engine = AsyncEngine(EngineConfig(model=ModelConfig(backend="fake", fake_step_ms=2)))
    await engine.start()
    try:
        await until(lambda: engine.ready and engine.restarts == len(sent))
        assert engine._process
        await engine._process._socket.send(pickled)
        request = GenerationRequest(prompt="a cat", width=64, height=64, num_inference_steps=2)
        assert len(await engine.submit(request).outputs()) == 1
        assert engine.restarts == len(sent) + 1
    finally:
        await engine.stop()
    assert not (tmp_path / "trace").exists()
    figure = "its process is replaced each time; what is asked for meanwhile finishes"
    note(Finding(18, "pickles between processes", f"{len(sent) + 1} messages", "to and from the engine", figure))


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.01)


def not_text() -> bytes:
    """A message of the right form whose text is no UTF-8."""
    return encode(Refused("abc")).replace(b"abc", b"\xff\xfe\xfd")


def family(pid: int) -> list[int]:
    return [pid, *(found for child in children(pid) for found in family(child))]


def listeners(pid: int) -> list[int]:
    """The ports of a process's listening TCP sockets."""
    links = (os.readlink(f"/proc/{pid}/fd/{name}") for name in os.listdir(f"/proc/{pid}/fd"))
    inodes = {link[8:-1] for link in links if link.startswith("socket:[")}
    ports = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == LISTENING and fields[9] in inodes:
                ports.append(int(fields[1].rpartition(":")[2], 16))
    return ports
