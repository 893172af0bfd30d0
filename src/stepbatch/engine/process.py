"""The engine process: messages in from a socket, the engine's loop, messages out.

Started by ``engine.supervisor`` as ``python -m stepbatch.engine.process ADDRESS RECORD CONFIG LOG``: the socket's
address, the number of an open file for the flight record, and the ``EngineConfig`` and ``LogConfig`` as JSON. Standard
input is a pipe that the parent holds open for as long as it lives. Exit status 0 when told to leave, 2 when it can't
start as configured.
"""

from __future__ import annotations

import ctypes
import logging
import math
import os
import signal
import sys
import threading
import time

import msgspec
import zmq

from stepbatch.config import EngineConfig, LogConfig
from stepbatch.engine.address import remove
from stepbatch.engine.backends import load_runner
from stepbatch.engine.cost import UNKNOWN, Costs
from stepbatch.engine.engine import Engine, Runner
from stepbatch.engine.messages import (
    Cancel,
    FromEngine,
    Ready,
    Refused,
    Shutdown,
    Submit,
    Unit,
    decode_to_engine,
    encode,
)
from stepbatch.engine.warmup import warm_up
from stepbatch.errors import DeviceLost, SetupError
from stepbatch.garbage import settle
from stepbatch.logs import set_up

log = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 1.0
LENGTH_BYTES = 4  # of the flight record's prefix
PR_SET_PDEATHSIG = 1  # of prctl(2)


class Link:
    """The engine process's end of the socket, and its flight record.

    The socket's own thread sends what ``send`` hands it, so a message can be lost if the process dies right after.
    Which unit of work was under way must not be, so each is also written to a file, which outlives the process.
    """

    def __init__(self, address: str, record: int) -> None:
        self._record = record
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PAIR)
        self._socket.set_hwm(0)  # bounded by the requests that were let in at the door
        self._socket.connect(address)
        self.last_sent = 0.0  # monotonic seconds

    def send(self, message: FromEngine) -> None:
        data = encode(message)
        if isinstance(message, Unit):
            self._write(data)
        self._socket.send(data)
        self.last_sent = time.monotonic()

    def note(self, unit: Unit) -> None:
        """Write a unit of work down that nobody needs to be told of, unless the process ends in it."""
        self._write(encode(unit))

    def pending(self, seconds: float = 0.0) -> bool:
        """Whether there is a message to take; waits up to ``seconds`` for one."""
        return bool(self._socket.poll(math.ceil(seconds * 1000)))

    def take(self) -> Submit | Cancel | Shutdown:
        return decode_to_engine(self._socket.recv())

    def close(self, linger_seconds: float) -> None:
        """Leave; wait up to ``linger_seconds`` until what was sent is out."""
        self._socket.close(linger=int(linger_seconds * 1000))
        self._context.term()

    def _write(self, unit: bytes) -> None:
        os.pwrite(self._record, len(unit).to_bytes(LENGTH_BYTES, "big") + unit, 0)


def serve(runner: Runner, config: EngineConfig, link: Link, costs: Costs = UNKNOWN) -> None:
    """Run the engine until it is told to leave, which raises ``SystemExit``."""

    def drain() -> None:
        while link.pending():
            message = link.take()
            if isinstance(message, Shutdown):
                sys.exit(0)
            elif isinstance(message, Cancel):
                engine.cancel(message.request_id)
            else:
                link.note(Unit("check", [(message.request_id, index) for index in message.indices], 0.0))
                engine.submit(message)
            if time.monotonic() - link.last_sent > HEARTBEAT_SECONDS:  # thousands to read in must not look like a hang
                engine.heartbeat()

    engine = Engine(runner, config, emit=link.send, poll=drain, costs=costs)
    while True:
        drain()
        wait = engine.step()
        if wait:
            engine.heartbeat()
            link.pending(min(wait, HEARTBEAT_SECONDS))


def start(config: EngineConfig, link: Link) -> tuple[Runner, Costs]:
    """Load the model and find out what it costs; a refusal is told, and raises ``SystemExit``."""
    try:
        runner = load_runner(config)
    except SetupError as error:
        link.send(Refused(str(error)))
        link.close(linger_seconds=5.0)
        sys.exit(2)
    found: list[Costs] = []
    Engine.attempt(lambda: found.append(warm_up(runner, config)))  # what can't be measured is learned as it runs
    costs = found[0] if found else UNKNOWN
    settle()
    link.send(Ready(runner.info, costs))
    return runner, costs


def leave_with_parent(address: str) -> None:
    """End this process, also in the middle of a computation, when the parent's end of standard input is closed."""
    while os.read(0, 4096):
        pass
    remove(address)  # the parent was killed, so nobody else tidies up
    os._exit(1)


def die_with_parent() -> None:
    """Have the system kill this process with its parent, be it stopped or in a call that never lets go of the GIL."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def main(address: str, record: str, config_json: str, log_json: str) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):  # they reach the whole group or service; the parent decides
        signal.signal(number, lambda *_: None)  # not SIG_IGN, which processes started from here would inherit
    die_with_parent()
    threading.Thread(target=leave_with_parent, args=(address,), daemon=True).start()  # it may have ended before that
    set_up(msgspec.json.decode(log_json, type=LogConfig), "engine")
    config = msgspec.json.decode(config_json, type=EngineConfig)
    link = Link(address, int(record))
    try:
        runner, costs = start(config, link)
        serve(runner, config, link, costs)
    except DeviceLost as error:
        log.error("the device is lost: %s", error)
        link.close(linger_seconds=1.0)
        os._exit(1)  # at once: a driver in this state may never let go
    finally:
        link.close(linger_seconds=0.0)


if __name__ == "__main__":
    main(*sys.argv[1:])
