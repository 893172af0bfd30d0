"""An engine process that hangs is seen and replaced; one that is slow is left alone."""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from stepbatch.config import EngineConfig, ModelConfig, WarmupConfig
from stepbatch.engine import supervisor
from stepbatch.engine.client import AsyncEngine, Patience
from stepbatch.engine.messages import FromEngine, Unit
from stepbatch.errors import EngineDied
from stepbatch.request import GenerationRequest
from stepbatch.testing import FakeRunner

from .inside import until
from .record import Finding

pytestmark = pytest.mark.anyio

PTRACE_SEIZE, PTRACE_INTERRUPT = 0x4206, 0x4207
WAIT_FOR_THREADS = 0x40000000  # __WALL of waitpid(2)
SLOW = """
import sys
from stepbatch.engine import process
from stepbatch.testing import FakeRunner, WholeCallRunner

def load(config):
    kind, _, seconds = config.model.served_model_name.partition(" ")
    runner = WholeCallRunner(config.model) if kind == "call" else FakeRunner(config.model)
    runner.decode_seconds = float(seconds or 0) if kind == "decode" else 0.0
    return runner

process.load_runner = load
process.main(*sys.argv[1:])
"""


class Hearing(AsyncEngine):
    """An engine that remembers the unit of work that was announced last, and by which process."""

    unit, announcer = Unit("", [], 0.0), 0

    def hear(self, message: FromEngine) -> None:
        if isinstance(message, Unit):
            self.unit, self.announcer = message, self.pid or 0


@pytest.fixture
def patience(soak: bool) -> Patience:
    """In the short form, little: an engine without work is heard once a second."""
    return Patience() if soak else Patience(silence=1.7)


@asynccontextmanager
async def running(patience: Patience, model: ModelConfig, warmup: bool = True) -> AsyncIterator[Hearing]:
    engine = Hearing(EngineConfig(model=model, warmup=WarmupConfig(warmup=warmup, profile_cache="off")), patience)
    engine.on_message = engine.hear
    await engine.start()
    try:
        yield engine
    finally:
        await engine.stop()


async def draw(engine: AsyncEngine, prompt: str, steps: int = 1) -> None:
    """Have a picture made, and see that it is the right one."""
    request = GenerationRequest(prompt=prompt, seed=7, num_inference_steps=steps)
    [output] = await engine.submit(request).outputs()
    assert output.pixels == FakeRunner.pixels(prompt, 7, output.width, output.height)


def stop_thread(thread: int) -> None:
    """Stop one thread of a process for good, as if it had died in a place where it holds nothing."""
    seized = threading.Event()

    def hold() -> None:
        trace = ctypes.CDLL(None, use_errno=True).ptrace
        for request in (PTRACE_SEIZE, PTRACE_INTERRUPT):
            assert trace(request, thread, None, None) == 0, os.strerror(ctypes.get_errno())
        os.waitpid(thread, WAIT_FOR_THREADS)  # until it has stopped
        seized.set()
        with suppress(ChildProcessError):  # who waits for the process as a whole may be quicker
            os.waitpid(thread, WAIT_FOR_THREADS)  # and until it is killed: it isn't gone before its tracer knows

    threading.Thread(target=hold, daemon=True).start()
    assert seized.wait(10)


async def stop(engine: Hearing) -> None:
    assert engine.pid
    os.kill(engine.pid, signal.SIGSTOP)


async def stop_in_step(engine: Hearing) -> None:
    working = asyncio.create_task(draw(engine, "long", steps=300))
    await until(lambda: engine.stats.running == 1)
    await stop(engine)
    await until(lambda: engine.restarts)
    await working


async def stop_io_thread(engine: Hearing) -> None:
    assert engine.pid
    threads = Path(f"/proc/{engine.pid}/task").iterdir()
    [thread] = [thread for thread in threads if (thread / "comm").read_text() == "ZMQbg/IO/0\n"]
    await asyncio.to_thread(stop_thread, int(thread.name))


async def stop_main_thread(engine: Hearing) -> None:
    assert engine.pid
    await asyncio.to_thread(stop_thread, engine.pid)


async def spin(engine: Hearing) -> None:
    working = asyncio.create_task(draw(engine, "[spin]"))
    first = engine.pid
    await until(lambda: engine.announcer not in (0, first) and engine.unit.kind == "denoise")  # once more, alone
    assert engine.restarts == 1
    os.kill(engine.announcer, signal.SIGKILL)  # one that has done nothing yet may take a minute for its first step
    with pytest.raises(EngineDied):
        await working


FAULTS = (stop, stop_in_step, stop_io_thread, stop_main_thread, spin)


async def test_a_hung_engine_is_seen_and_replaced(patience: Patience, note: Callable[[Finding], None]) -> None:
    async def hang(fault: Callable[[Hearing], object]) -> float:
        """The seconds until it is seen, less those that the engine may take."""
        async with running(patience, ModelConfig(backend="fake", fake_step_ms=5)) as engine:
            await draw(engine, "first")
            pid, began = engine.pid, time.monotonic()
            task = asyncio.ensure_future(fault(engine))  # type: ignore[arg-type]
            await until(lambda: not engine.ready)
            seconds = time.monotonic() - began
            allowed = max(patience.silence, patience.factor * engine.unit.seconds)
            await task
            await draw(engine, "afterwards")
            assert engine.pid != pid
            assert engine.restarts == (2 if fault is spin else 1)
            assert seconds < allowed + 3.0, fault
            return seconds - allowed

    late = max(await asyncio.gather(*(hang(fault) for fault in FAULTS)))
    figure = f"seen {max(late, 0.0):.1f} s after max({patience.silence:g} s, 3 x the announced unit) at most, replaced"
    faults = "SIGSTOP idle and in a step, endless loop, dead I/O thread, dead main thread"
    note(Finding(2, "engine hung", "1 running", faults, figure))


async def test_a_slow_engine_is_left_alone(
    patience: Patience, soak: bool, monkeypatch: pytest.MonkeyPatch, note: Callable[[Finding], None]
) -> None:
    monkeypatch.setattr(supervisor, "COMMAND", (sys.executable, "-c", SLOW))
    seconds = 8.0 if soak else 2.0
    assert seconds > patience.silence

    async def slow(kind: str) -> None:
        step_ms = 1.0 if kind == "decode" else 1000 * seconds
        model = ModelConfig(backend="fake", fake_step_ms=step_ms, served_model_name=f"{kind} {seconds}")
        async with running(patience, model, warmup=False) as engine:
            await draw(engine, "while nothing is known of how long it takes")
            await draw(engine, "now something is")
            assert engine.restarts == 0, kind

    await asyncio.gather(*(slow(kind) for kind in ("step", "decode", "call")))
    figure = f"none taken for hung: a step, a decode and a whole call of {seconds:g} s each"
    note(Finding(2, "engine slow", "2 pictures, one by one", "units longer than the patience", figure))
