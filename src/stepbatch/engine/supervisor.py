"""One engine process as its parent sees it: started, listened to, ended, and nothing of it left behind."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from typing import Any, BinaryIO

import msgspec
import zmq
import zmq.asyncio

from stepbatch.config import API_KEY_VARIABLE, EngineConfig, LogConfig
from stepbatch.engine.address import private_address
from stepbatch.engine.messages import FromEngine, Ready, Refused, Shutdown, ToEngine, Unit, decode_from_engine, encode
from stepbatch.engine.process import LENGTH_BYTES
from stepbatch.errors import SetupError, StepbatchError

COMMAND = (sys.executable, "-m", "stepbatch.engine.process")
SLICE_SECONDS = 1.0
LEAVE_SECONDS = 1.0  # that a process gets to leave by itself when told to
KILL_SECONDS = 10.0  # that a killed process is waited for
LAST_WORDS_SECONDS = 0.1  # that messages of a dead process may still need to come through


class EngineGone(StepbatchError):
    """The engine process ended by itself, or was ended because it hung.

    Args:
        message: What happened, to go on after "the engine process".
        unit: The unit of work that it began last, if it began any.
    """

    def __init__(self, message: str, unit: Unit | None) -> None:
        super().__init__(message)
        self.unit = unit


class EngineProcess:
    """A running engine process; made by ``engine_process``."""

    def __init__(self, process: asyncio.subprocess.Process, socket: zmq.asyncio.Socket, record: BinaryIO) -> None:
        self.pid = process.pid
        self._process = process
        self._socket = socket
        self._record = record
        self._exited = asyncio.create_task(process.wait())
        self._receiving: asyncio.Future[bytes] | None = None

    @property
    def ended(self) -> bool:
        """Whether it is gone, though what it said last may still have to be read."""
        return self._exited.done()

    def send(self, message: ToEngine) -> None:
        """Send without waiting: there is no limit on what is under way, and a dead process's messages are dropped."""
        self._socket.send(encode(message))

    async def loaded(self, patience: float) -> Ready:
        """Wait up to ``patience`` seconds for the model to be loaded.

        Raises:
            SetupError: the process refused its configuration, died or took too long.
        """
        try:
            message = await self.receive(patience)
        except EngineGone as gone:
            raise SetupError(f"the engine process {gone} while it was starting") from gone
        if isinstance(message, Refused):
            raise SetupError(message.message)
        if not isinstance(message, Ready):
            raise SetupError(f"the engine process said {type(message).__name__} while it was starting")
        return message

    async def receive(self, patience: float) -> FromEngine:
        """The next message.

        Raises:
            EngineGone: the process ended, or said nothing for ``patience`` seconds, whereupon it was killed.
        """
        if self._receiving is None:
            self._receiving = asyncio.ensure_future(self._socket.recv())
        waited = 0.0
        while not self._receiving.done():
            if waited >= patience:
                await self.end()
                raise EngineGone(f"said nothing for {patience:.0f} s and was killed", self.last_unit())
            # Slices that were waited are counted rather than time that has passed: if this process was stopped or the
            # machine slept, the engine may be well and its messages still to be read.
            seconds = min(SLICE_SECONDS, patience - waited)
            both: set[asyncio.Future[Any]] = {self._receiving, self._exited}
            await asyncio.wait(both, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            waited += seconds
            if self._exited.done() and not self._receiving.done():
                await asyncio.wait({self._receiving}, timeout=LAST_WORDS_SECONDS)
                if not self._receiving.done():
                    raise EngineGone(_describe(self._exited.result()), self.last_unit())
        data, self._receiving = self._receiving.result(), None
        try:
            return decode_from_engine(data)
        except msgspec.DecodeError as error:
            raise EngineGone(f"sent something that can't be read: {error}", self.last_unit()) from error

    def kill(self) -> None:
        if not self._exited.done():
            self._process.kill()

    async def leave(self) -> None:
        """End the process: gently, if it listens."""
        if not self._exited.done():
            self.send(Shutdown())
            await asyncio.wait({self._exited}, timeout=LEAVE_SECONDS)
        await self.end()

    async def end(self) -> None:
        """Kill the process and wait until it is gone, but not for ever: a driver may hold on to it."""
        self.kill()
        await asyncio.wait({self._exited}, timeout=KILL_SECONDS)

    def last_unit(self) -> Unit | None:
        """What it began last; ``None`` also if it was killed while it wrote that down, and so had not begun it."""
        descriptor = self._record.fileno()
        length = int.from_bytes(os.pread(descriptor, LENGTH_BYTES, 0), "big")
        try:
            message = decode_from_engine(os.pread(descriptor, length, LENGTH_BYTES))
        except msgspec.DecodeError:
            return None
        return message if isinstance(message, Unit) else None


@asynccontextmanager
async def engine_process(config: EngineConfig, log: LogConfig) -> AsyncIterator[EngineProcess]:
    """Start an engine process; it is gone, with its socket and files, when the context is left.

    Raises:
        SetupError: it can't be started on this machine.
    """
    with ExitStack() as stack:
        try:
            address = stack.enter_context(private_address())
            record = stack.enter_context(_flight_record())
            context = stack.enter_context(zmq.asyncio.Context())
            socket = context.socket(zmq.PAIR)
            stack.callback(socket.close, linger=0)
            socket.set_hwm(0)
            socket.bind(address)
            os.chmod(address.removeprefix("ipc://"), 0o600)
            process = await _spawn(config, log, address, record)
        except (OSError, zmq.ZMQError) as error:
            raise SetupError(f"can't start the engine process: {error}") from error
        engine = EngineProcess(process, socket, record)
        stack.callback(engine.kill)  # for when the wait below is cancelled
        try:
            yield engine
        finally:
            await engine.leave()


async def _spawn(config: EngineConfig, log: LogConfig, address: str, record: BinaryIO) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *COMMAND,
        address,
        str(record.fileno()),
        msgspec.json.encode(config).decode(),
        msgspec.json.encode(log).decode(),
        env={
            name: value for name, value in os.environ.items() if name != API_KEY_VARIABLE
        },  # no business of the engine's
        stdin=asyncio.subprocess.PIPE,  # never written to: its end tells the process that this one is gone
        stdout=2,  # what a library prints must not get between the lines of this process's output
        pass_fds=(record.fileno(),),
        start_new_session=True,  # Ctrl-C in a terminal is for this process alone
    )


def _flight_record() -> BinaryIO:
    """A file that both processes have open: in memory, where there is such a thing, as a disk may be full."""
    if sys.platform == "linux":
        return open(os.memfd_create("stepbatch-record"), "r+b")
    return tempfile.TemporaryFile()


def _describe(status: int) -> str:
    if status >= 0:
        return f"ended with status {status}"
    names = {int(number): number.name for number in signal.Signals}  # real-time signals have none but at the ends
    return f"was killed by {names.get(-status, f'signal {-status}')}"
