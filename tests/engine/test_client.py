import asyncio
import logging
import os
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

import pytest

from stepbatch.config import BatchingConfig, EngineConfig, ModelConfig
from stepbatch.engine import client, supervisor
from stepbatch.engine.client import AsyncEngine, Patience
from stepbatch.engine.handle import Handle, JobProgress
from stepbatch.engine.messages import Cancelled, FromEngine, Output, Progress, Submit, Unit, encode
from stepbatch.errors import (
    DeadlineExceeded,
    EngineDied,
    EngineUnavailable,
    GenerationFailed,
    InvalidValue,
    RequestCancelled,
    RequestError,
    SetupError,
)
from stepbatch.request import GenerationRequest
from stepbatch.testing import FakeRunner

pytestmark = pytest.mark.anyio

SHORT = Patience(silence=1.7, factor=0.01)  # an idle engine is heard once a second


@pytest.fixture(autouse=True)
async def nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncGenerator[None, None]:
    """Whatever a test does: no file, no child process and no task outlives the engine."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(client, "SHORTEST_PAUSE", 0.01)
    monkeypatch.setattr(supervisor, "LEAVE_SECONDS", 0.2)
    tasks, others = len(asyncio.all_tasks()), children()
    yield
    assert list(tmp_path.iterdir()) == []
    assert len(asyncio.all_tasks()) <= tasks
    assert children() <= others  # those are servers of other tests' modules


def children() -> set[int]:
    """The processes that this one has started and not waited for."""
    tasks = Path("/proc/self/task").iterdir()
    return {int(pid) for task in tasks for pid in (task / "children").read_text().split()}


def config(step_ms: float = 5.0, size: int = 8) -> EngineConfig:
    return EngineConfig(
        model=ModelConfig(backend="fake", fake_step_ms=step_ms), batching=BatchingConfig(dynamic_batch_max_size=size)
    )


@asynccontextmanager
async def running(
    step_ms: float = 5.0, size: int = 8, patience: Patience | None = None
) -> AsyncIterator[tuple[AsyncEngine, list[FromEngine]]]:
    """A started engine, and every message that comes from its process."""
    engine, messages = AsyncEngine(config(step_ms, size), patience), list[FromEngine]()
    engine.on_message = messages.append
    await engine.start()
    try:
        yield engine, messages
    finally:
        await engine.stop()


def ask(prompt: str, n: int = 1, steps: int = 4) -> GenerationRequest:
    return GenerationRequest(prompt=prompt, n=n, num_inference_steps=steps)


def is_correct(handle: Handle, outputs: list[Output]) -> bool:
    assert handle.request.seed is not None
    assert handle.request.width is not None
    assert handle.request.height is not None
    size = handle.request.width, handle.request.height
    seeds = [handle.request.seed + index for index in range(handle.request.n)]
    return [output.pixels for output in outputs] == [
        FakeRunner.pixels(handle.request.prompt, seed, *size) for seed in seeds
    ]


async def answers(handles: list[Handle]) -> list[list[Output] | BaseException]:
    async with asyncio.timeout(20):
        return await asyncio.gather(*(handle.outputs() for handle in handles), return_exceptions=True)


async def until(condition: Callable[[], object], seconds: float = 10.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)


def kill(engine: AsyncEngine, number: signal.Signals = signal.SIGKILL) -> None:
    assert engine.pid is not None
    os.kill(engine.pid, number)


def starting_with(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """Have the engine process run ``code`` first; it can replace ``process.load_runner``."""
    script = f"import sys\nfrom stepbatch.engine import process\n{code}\nprocess.main(*sys.argv[1:])"
    monkeypatch.setattr(supervisor, "COMMAND", (sys.executable, "-c", script))


async def test_many_requests_at_once_all_get_their_own_pictures() -> None:
    async with running() as (engine, messages):
        assert engine.ready
        assert engine.info.id == "fake"
        handles = [engine.submit(ask(f"prompt {i}", n=1 + i % 3, steps=1 + i % 5)) for i in range(40)]
        for handle, answer in zip(handles, await answers(handles), strict=True):
            assert isinstance(answer, list)
            assert is_correct(handle, answer)
        assert 2 < max(len(unit.jobs) for unit in messages if isinstance(unit, Unit)) <= 8  # by how fast they come
        assert engine.stats.steps > 0
        assert engine.restarts == 0
    assert not engine.ready


async def test_events_are_every_step_and_then_the_outputs() -> None:
    async with running() as (engine, _):
        handle = engine.submit(ask("x", n=2, steps=3), "my-name")
        events = [event async for event in handle.events()]
        progress = [event for event in events if isinstance(event, JobProgress)]
        assert Counter(progress) == Counter(JobProgress(i, step, 3) for i in range(2) for step in (1, 2, 3))
        outputs = [event for event in events if isinstance(event, Output)]
        assert events[-1] is outputs[-1]
        assert outputs[0].request_id == "my-name"
        assert await handle.outputs() == sorted(outputs, key=lambda output: output.index)


async def test_a_bad_request_is_refused_at_the_door() -> None:
    async with running() as (engine, _):
        with pytest.raises(InvalidValue, match="width"):
            engine.submit(GenerationRequest(prompt="x", width=17, height=16))
        engine.submit(ask("x", steps=500), "name")
        with pytest.raises(InvalidValue, match="id"):
            engine.submit(ask("y"), "name")


async def test_a_failure_ends_the_request_and_no_other() -> None:
    async with running() as (engine, _):
        bad, good = engine.submit(ask("[raise-denoise]", n=3)), engine.submit(ask("good"))
        with pytest.raises(GenerationFailed):
            await bad.outputs()
        with pytest.raises(GenerationFailed):
            async for _ in bad.events():
                pass
        assert is_correct(good, await good.outputs())
        with pytest.raises(InvalidValue) as caught:
            await engine.submit(ask("[long]")).outputs()
        assert caught.value.param == "prompt"


async def test_a_cancelled_request_is_in_no_later_unit() -> None:
    async with running(step_ms=20) as (engine, messages):
        handle, mate = engine.submit(ask("x", n=2, steps=500)), engine.submit(ask("mate", steps=12))
        await until(lambda: any(isinstance(message, Progress) for message in messages))
        seen = len(messages)
        engine.cancel(handle.request_id)
        engine.cancel(handle.request_id)
        engine.cancel("nobody")
        with pytest.raises(RequestCancelled):
            await handle.outputs()
        assert is_correct(mate, await mate.outputs())
        later = messages[seen:]
        gone = next(i for i, message in enumerate(later) if isinstance(message, Cancelled))
        units = [[job[0] for job in unit.jobs] for unit in later if isinstance(unit, Unit)]
        assert sum(handle.request_id in unit for unit in units) <= 1  # the one that was under way
        assert not any(
            isinstance(message, Unit | Progress) and any(job[0] == handle.request_id for job in message.jobs)
            for message in later[gone:]
        )
        await until(lambda: engine.stats.running == 0)
        again = engine.submit(ask("again"), handle.request_id)  # the id is free once the engine has let go of it
        assert is_correct(again, await again.outputs())


async def test_who_stops_waiting_cancels_the_request() -> None:
    async with running() as (engine, messages):
        waited, streamed, iterated = (engine.submit(ask("x", steps=1000)) for _ in range(3))
        task = asyncio.create_task(waited.outputs())
        async with aclosing(streamed.events()) as events:
            async for _ in events:
                break
        async for _ in iterated.events():
            break
        task.cancel()
        await asyncio.wait({task})
        for handle in (waited, streamed, iterated):
            with pytest.raises(RequestCancelled):
                await handle.outputs()
        await until(lambda: sum(isinstance(message, Cancelled) for message in messages) == 3)
        await until(lambda: engine.stats.running == 0)


async def test_a_killed_engine_loses_nothing() -> None:
    async with running(step_ms=10) as (engine, messages):
        handles = [engine.submit(ask(f"prompt {i}", n=1 + i % 2, steps=1 + i % 7)) for i in range(32)]
        await until(lambda: any(isinstance(message, Output) for message in messages))
        kill(engine)
        await until(lambda: not engine.ready)
        held = engine.submit(ask("in between"))
        assert engine.pid is None
        assert engine.stats.waiting > 0
        assert engine.stats.running == 0
        for handle, answer in zip([*handles, held], await answers([*handles, held]), strict=True):
            assert isinstance(answer, list)
            assert is_correct(handle, answer)
        outputs = Counter((o.request_id, o.index) for o in messages if isinstance(o, Output))
        assert engine.restarts == 1
        assert engine.ready
        assert set(outputs.values()) == {1}
        assert len(outputs) == 49


async def test_a_request_that_kills_the_engine_gets_no_third_try() -> None:
    async with running() as (engine, _):
        handles = [engine.submit(ask(f"prompt {i}", steps=3)) for i in range(12)]
        poison = engine.submit(ask("[die]", n=2))
        found = await answers([poison, *handles])
        assert isinstance(found[0], EngineDied)
        assert all(isinstance(answer, list) for answer in found[1:])
        await until(lambda: engine.restarts == 2)  # the mates may be done before


async def test_a_request_that_hangs_the_engine_gets_no_third_try() -> None:
    async with running(patience=SHORT) as (engine, _):
        await engine.submit(ask("x")).outputs()
        mates, poison = [engine.submit(ask(f"mate {i}")) for i in range(3)], engine.submit(ask("[hang]"))
        found = await answers([poison, *mates])
        assert isinstance(found[0], EngineDied)
        assert all(isinstance(answer, list) for answer in found[1:])
        await until(lambda: engine.restarts == 2)  # the mates may be done before


async def test_a_pause_of_this_process_is_no_hang() -> None:
    async with running(patience=SHORT) as (engine, _):
        handle = engine.submit(ask("x", steps=1000))
        await asyncio.sleep(0.1)
        time.sleep(2.0)  # noqa: ASYNC251  nothing is read meanwhile
        await asyncio.sleep(0.5)
        assert engine.ready
        assert engine.restarts == 0
        assert not handle.ended


async def test_ctrl_c_is_for_the_parent() -> None:
    async with running() as (engine, _):
        kill(engine, signal.SIGINT)
        kill(engine, signal.SIGTERM)
        handle = engine.submit(ask("x"))
        assert is_correct(handle, await handle.outputs())
        assert engine.restarts == 0


async def test_a_refused_start_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    starting_with(
        monkeypatch,
        "from stepbatch.errors import CheckpointError\n"
        "def load(config): raise CheckpointError('no such checkpoint')\n"
        "process.load_runner = load",
    )
    engine = AsyncEngine(config())
    with pytest.raises(SetupError, match=r"^no such checkpoint$"):
        await engine.start()
    assert not engine.ready
    with pytest.raises(EngineUnavailable):
        engine.submit(ask("x"))


async def test_a_death_while_starting_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    starting_with(monkeypatch, "sys.exit(3)")
    with pytest.raises(SetupError, match=r"^the engine process ended with status 3 while it was starting$"):
        await AsyncEngine(config()).start()


async def test_a_start_that_takes_too_long_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    starting_with(monkeypatch, "import time; process.load_runner = lambda config: time.sleep(60)")
    with pytest.raises(SetupError, match="said nothing"):
        await AsyncEngine(config(), Patience(load=0.5)).start()


async def test_a_cancelled_start_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    starting_with(monkeypatch, "import time; process.load_runner = lambda config: time.sleep(60)")
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.3):
            await AsyncEngine(config()).start()


async def test_an_engine_that_cannot_be_restarted_ends_what_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running() as (engine, _):
        handle = engine.submit(ask("x", steps=1000))
        starting_with(monkeypatch, "sys.exit(3)")
        kill(engine)
        with pytest.raises(EngineUnavailable):
            await handle.outputs()
        assert engine.state == "failed"
        assert engine.pid is None
        with pytest.raises(EngineUnavailable):
            engine.submit(ask("y"))


async def test_a_request_that_kills_the_engine_when_it_is_looked_at_is_known_by_that() -> None:
    async with running() as (engine, _):
        other = engine.submit(ask("x", steps=50))
        with pytest.raises(EngineDied, match="twice"):
            await engine.submit(ask("[die-check]")).outputs()
        assert is_correct(other, await other.outputs())
        assert not other.suspects
        assert engine.restarts == 2


async def test_a_request_that_kills_the_engine_before_any_work_ends_too(monkeypatch: pytest.MonkeyPatch) -> None:
    starting_with(
        monkeypatch,
        "import os\ntake = process.Link.take\n"
        "def die(self):\n    message = take(self)\n"
        "    'unreadable' in str(message) and os._exit(9)\n    return message\n"
        "process.Link.take = die",
    )
    async with running() as (engine, _):
        with pytest.raises(EngineDied):
            await engine.submit(ask("unreadable")).outputs()
        handle = engine.submit(ask("x"))
        assert is_correct(handle, await handle.outputs())


async def test_stop_gives_what_is_in_flight_its_time() -> None:
    async with running(step_ms=20) as (engine, _):
        quick, slow = engine.submit(ask("quick", steps=8)), engine.submit(ask("slow", steps=1000))
        stopping = asyncio.create_task(engine.stop(drain_seconds=1.0))
        await asyncio.sleep(0)
        assert not engine.ready
        with pytest.raises(EngineUnavailable, match="shutting down"):
            engine.submit(ask("late"))
        engine.admission.backlog = 1e9
        with pytest.raises(EngineUnavailable, match="shutting down"):
            engine.check()  # and not that there is too much to do
        assert is_correct(quick, await quick.outputs())
        with pytest.raises(EngineUnavailable):
            await slow.outputs()
        await stopping


async def test_stop_ends_soon_when_nothing_is_in_flight() -> None:
    async with running() as (engine, _):
        began = time.monotonic()
        await engine.stop(drain_seconds=30)
        await engine.stop()
        assert time.monotonic() - began < 5


async def test_stop_ends_an_engine_that_does_not_listen() -> None:
    async with running() as (engine, messages):
        handle = engine.submit(ask("[hang]"))
        await until(lambda: messages and isinstance(messages[-1], Unit) and messages[-1].kind == "denoise")
        await engine.stop()
        with pytest.raises(EngineUnavailable):
            await handle.outputs()


async def test_an_engine_killed_while_it_writes_its_record_is_started_again() -> None:
    async with running(step_ms=50) as (engine, messages):
        handle = engine.submit(ask("x", steps=20))
        await until(lambda: any(isinstance(message, Progress) for message in messages))
        kill(engine, signal.SIGSTOP)
        assert engine._process
        os.pwrite(engine._process._record.fileno(), b"\0\0\1\0torn", 0)
        kill(engine)
        assert is_correct(handle, await handle.outputs())
        assert engine.restarts == 1


async def test_a_message_that_cannot_be_read_ends_the_engine_process() -> None:
    async with running() as (engine, _):
        assert engine._process
        engine._process.send = lambda message: None  # type: ignore[method-assign]
        await engine._process._socket.send(encode(Submit("x", ask("x"), [0], 0.0))[:-3])
        await until(lambda: engine.restarts)
        handle = engine.submit(ask("x"))
        assert is_correct(handle, await handle.outputs())


async def test_every_request_ends_once_however_often_the_engine_is_killed() -> None:
    async with running(step_ms=2) as (engine, _):
        handles = []
        for round_ in range(3):
            handles += [engine.submit(ask(f"{round_} {i} {'[nan]' * (i == 3)}", steps=1 + i)) for i in range(6)]
            await asyncio.sleep(0.02 * round_)
            kill(engine)
            await until(lambda: not engine.ready)
            await until(lambda: engine.ready)
        for handle, answer in zip(handles, await answers(handles), strict=True):
            if isinstance(answer, RequestError):
                assert "[nan]" in handle.request.prompt or isinstance(answer, EngineDied)
            else:
                assert isinstance(answer, list)
                assert is_correct(handle, answer)


SECOND_START = """
import os, signal, sys
from stepbatch.engine import process
from stepbatch.engine.messages import Stats
from stepbatch.errors import DeviceLost
load = process.load_runner
def load_or_not(config):
    if os.path.exists({flag!r}):
        os.remove({flag!r})
        {fault}
    return load(config)
process.load_runner = load_or_not
process.main(*sys.argv[1:])
"""


def failing_to_restart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fault: str) -> None:
    """Have the next engine process, and no other, do ``fault`` as it loads."""
    (tmp_path / "fault").touch()
    script = SECOND_START.format(flag=str(tmp_path / "fault"), fault=fault)
    monkeypatch.setattr(supervisor, "COMMAND", (sys.executable, "-c", script))


async def test_deadlines_hold_while_there_is_no_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    async with running(patience=Patience(reload=4.0, factor=0.01)) as (engine, messages):
        failing_to_restart(monkeypatch, tmp_path, "os.kill(os.getpid(), signal.SIGSTOP)")
        before = engine.submit(GenerationRequest(prompt="before", num_inference_steps=1000, timeout=60.0))
        late = engine.submit(GenerationRequest(prompt="late", num_inference_steps=20, timeout=1.0))
        await until(lambda: any(isinstance(message, Progress) for message in messages))
        kill(engine)
        await until(lambda: not engine.ready)
        held = [engine.submit(GenerationRequest(prompt="held", n=2, timeout=t)) for t in (0.8, 60.0, None)]
        for handle in (late, held[0]):
            with pytest.raises(DeadlineExceeded):
                await handle.outputs()
            assert time.monotonic() < handle.arrival + 2.0
        assert engine.state == "restarting"
        assert engine.stats.waiting == 5
        engine.cancel(before.request_id)
        for handle in held[1:]:
            assert is_correct(handle, await handle.outputs())


@pytest.mark.parametrize(
    "fault",
    [
        "import time; time.sleep(60)",
        "os.kill(os.getpid(), 40)",
        "raise DeviceLost('gone')",
        "process.Link.send(sys._getframe(1).f_locals['link'], Stats())",
    ],
    ids=["hangs", "dies by a real-time signal", "loses its device", "talks nonsense"],
)
async def test_a_restart_that_fails_is_tried_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fault: str) -> None:
    async with running(patience=Patience(reload=2.0, factor=0.01)) as (engine, _):
        failing_to_restart(monkeypatch, tmp_path, fault)
        handle = engine.submit(ask("x", steps=50))
        kill(engine)
        assert is_correct(handle, await handle.outputs())
        assert not (tmp_path / "fault").exists()
        assert engine.restarts == 1


async def test_a_device_that_is_lost_at_the_start_ends_the_process_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without waiting for anything, be it threads or a driver."""
    starting_with(
        monkeypatch,
        "import threading, time\nfrom stepbatch.errors import DeviceLost\n"
        "threading.Thread(target=time.sleep, args=(60,)).start()\n"
        "def warm_up(*_): raise DeviceLost('gone')\nprocess.warm_up = warm_up",
    )
    with pytest.raises(SetupError, match=r"^the engine process ended with status 1 while it was starting$"):
        await AsyncEngine(config(), Patience(load=20)).start()


async def test_a_longer_first_start_gives_later_ones_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    starting_with(
        monkeypatch, "import time; load = process.load_runner; process.load_runner = lambda c: time.sleep(1) or load(c)"
    )
    async with running(patience=Patience(reload=0.1)) as (engine, _):
        kill(engine)
        await until(lambda: engine.restarts)
        assert engine.restarts == 1
        assert engine.ready


async def test_what_can_not_be_dealt_with_ends_the_process_and_not_the_server(caplog: pytest.LogCaptureFixture) -> None:
    async with running() as (engine, _):
        broken: list[FromEngine] = []

        def break_once(message: FromEngine) -> None:
            if isinstance(message, Progress) and not broken:
                broken.append(message)
                raise KeyError("nobody thought of this")

        engine.on_message = break_once
        handle = engine.submit(ask("x", n=2, steps=50))
        with caplog.at_level(logging.ERROR):
            assert is_correct(handle, await handle.outputs())
        assert engine.restarts == 1
        assert "nobody thought of this" in caplog.text


async def test_a_failure_of_an_unknown_kind_is_one_of_the_model_s(monkeypatch: pytest.MonkeyPatch) -> None:
    starting_with(
        monkeypatch,
        "import msgspec\nfrom stepbatch.engine.messages import Failure\nsend = process.Link.send\n"
        "def rename(self, m):\n"
        "    send(self, msgspec.structs.replace(m, code='new') if isinstance(m, Failure) else m)\n"
        "process.Link.send = rename",
    )
    async with running() as (engine, _):
        with pytest.raises(GenerationFailed):
            await engine.submit(ask("[raise-denoise]")).outputs()
        assert engine.restarts == 0
