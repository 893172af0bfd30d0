"""Videos in the making, with an engine that does what the test says, on real files and records."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import pytest

from stepbatch.engine.client import AsyncEngine
from stepbatch.engine.handle import Handle, JobProgress
from stepbatch.engine.messages import Output, Unit
from stepbatch.errors import EngineDied, EngineUnavailable, InvalidValue, NotFound, StorageFull
from stepbatch.request import Times
from stepbatch.server import video_jobs, video_store
from stepbatch.server.images import Threads
from stepbatch.server.metrics import Metrics
from stepbatch.server.video_jobs import VideoJobs
from stepbatch.server.video_request import parse_video
from stepbatch.server.video_store import Record, VideoStore
from stepbatch.server.wall_clock import WallClock

from .support import WaitingEngine
from .test_metrics import read

pytestmark = pytest.mark.anyio


class Made:
    """Jobs on a folder, and a look at what becomes of them."""

    def __init__(self, folder: Path, max_bytes: int = 1 << 20) -> None:
        self.engine = WaitingEngine()
        self.store = VideoStore(folder, 100, max_bytes)
        self.threads = Threads()
        self.metrics = Metrics(cast(AsyncEngine, self.engine))
        self.jobs = VideoJobs(cast(AsyncEngine, self.engine), self.store, self.metrics, self.threads)

    async def ask(self, **fields: Any) -> tuple[str, Handle]:
        record = await self.jobs.submit(parse_video({"prompt": "a cat", "seed": 1, **fields}, self.engine.info), 0.0)
        return record.id, self.engine.handles[record.id]

    async def look(self, id: str) -> Record:
        return await self.threads.record(lambda: self.store.get(id))

    async def until(self, id: str, seen: Callable[[Record], bool]) -> Record:
        async with asyncio.timeout(10):
            while not seen(record := await self.look(id)):
                await asyncio.sleep(0.01)
        return record

    async def end(self, id: str) -> Record:
        record = await self.until(id, lambda record: record.finished)
        async with asyncio.timeout(10):
            while id in self.jobs._jobs or self.jobs._tasks:  # it is counted after its record is written
                await asyncio.sleep(0.01)
        return record

    def codes(self) -> dict[str, float]:
        figures = read(self.metrics.render().decode())
        return {
            name.split('"')[1]: value
            for name, value in figures.items()
            if name.startswith("stepbatch:requests_total") and value
        }


@asynccontextmanager
async def making(folder: Path, **options: Any) -> AsyncIterator[Made]:
    made = Made(folder, **options)
    try:
        yield made
    finally:
        await made.jobs.close()
        made.threads.close()


def frames(handle: Handle) -> Output:
    width, height = handle.request.size
    count = handle.request.frames
    pixels = bytes(3 * width * height * count)
    return Output(handle.request_id, 0, 1, width, height, count, pixels, Times(queue=0.25, denoise=1.0))


async def test_a_video_s_way(tmp_path: Path) -> None:
    async with making(tmp_path) as made:
        id, handle = await made.ask(num_frames=5)
        await asyncio.sleep(0.05)
        assert (await made.look(id)).status == "queued"
        made.jobs.on_message(Unit("encode", [(id, 0), ("another", 0)], 1.0))
        await made.until(id, lambda record: (record.status, record.progress) == ("in_progress", 0))
        seen = []
        for step, percent in ((1, 33), (2, 66), (3, 99)):
            handle.tell(JobProgress(0, step, 3))
            seen.append((await made.until(id, lambda record, percent=percent: record.progress == percent)).status)
        assert seen == ["in_progress"] * 3
        assert list(made.store.files.iterdir()) == []
        handle.tell(frames(handle))
        record = await made.end(id)
        assert (record.status, record.progress, record.error) == ("completed", 100, None)
        assert record.about["timings"] == {"queue": 0.25, "encode": 0.0, "denoise": 1.0, "decode": 0.0}
        assert (record.about["num_frames"], record.about["seconds"], record.about["fps"]) == (5, "0.625", 8)
        assert made.codes() == {"ok": 1}


async def test_progress_never_falls_though_the_engine_begins_anew(tmp_path: Path) -> None:
    async with making(tmp_path) as made:
        id, handle = await made.ask()
        made.jobs.on_message(Unit("encode", [(id, 0)], 1.0))
        for step in (1, 2, 3):
            handle.tell(JobProgress(0, step, 4))
        await made.until(id, lambda record: record.progress == 75)
        for step in (1, 2):
            handle.tell(JobProgress(0, step, 4))
            await asyncio.sleep(0.03)
            assert (await made.look(id)).progress == 75
        handle.tell(JobProgress(0, 4, 4))
        assert (await made.until(id, lambda record: record.progress != 75)).progress == 99


@pytest.mark.parametrize(
    "error", [EngineDied("twice"), EngineUnavailable("the engine is shutting down"), InvalidValue("too long", "prompt")]
)
async def test_a_failure_is_written_down(tmp_path: Path, error: Any) -> None:
    async with making(tmp_path) as made:
        id, handle = await made.ask()
        handle.tell(JobProgress(0, 1, 2))
        handle.fail(error)
        record = await made.end(id)
        assert record.status == "failed"
        assert record.error is not None
        assert (record.error["code"], record.error["message"]) == (error.code, error.message)
        assert made.codes() == {error.code: 1}


@pytest.mark.parametrize("variant", ["video", "thumbnail", "spritesheet"])
async def test_a_full_disk_fails_the_video_and_leaves_nothing(
    tmp_path: Path, variant: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with making(tmp_path) as made:
        id, handle = await made.ask()
        made.store.parts(id)[variant].symlink_to("/dev/full")
        with caplog.at_level(logging.ERROR):
            handle.tell(frames(handle))
            record = await made.end(id)
        assert record.error is not None
        assert record.error["code"] == "storage_full"
        assert "No space left" in caplog.text
        assert list(made.store.files.iterdir()) == []
        other, handle = await made.ask()
        handle.tell(frames(handle))
        assert (await made.end(other)).status == "completed"


async def test_a_video_larger_than_all_room_fails(tmp_path: Path) -> None:
    async with making(tmp_path, max_bytes=100) as made:
        id, handle = await made.ask()
        handle.tell(frames(handle))
        record = await made.end(id)
        assert record.error is not None
        assert record.error["code"] == "storage_full"
        assert "--video-disk-mb leaves 100" in record.error["message"]
        assert list(made.store.files.iterdir()) == []


async def test_a_deleted_video_is_made_no_further(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with making(tmp_path) as made:
        id, handle = await made.ask()
        await made.jobs.delete(id)
        assert handle.ended
        with pytest.raises(NotFound):
            await made.jobs.delete(id)
        id, handle = await made.ask()
        handle.tell(frames(handle))
        await made.jobs.delete(id)  # while its file is written
    assert list(made.store.files.iterdir()) == []
    assert made.codes() == {"request_cancelled": 2}
    assert "could not be made" not in caplog.text


async def test_a_video_that_another_server_deletes_is_made_no_further(tmp_path: Path) -> None:
    async with making(tmp_path) as made, making(tmp_path) as other:
        id, handle = await made.ask()
        made.jobs.on_message(Unit("denoise", [(id, 0)], 1.0))
        handle.tell(JobProgress(0, 1, 4))
        await made.until(id, lambda record: record.progress == 25)
        await other.jobs.delete(id)
        assert not handle.ended
        handle.tell(JobProgress(0, 2, 4))
        async with asyncio.timeout(5):
            await handle.wait()
    assert made.codes() == {"request_cancelled": 1}


async def test_an_ending_that_can_not_be_written_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(video_store, "BUSY_SECONDS", 0.05)
    monkeypatch.setattr(video_jobs, "RETRY_SECONDS", 0.05)
    async with making(tmp_path) as made:
        id, handle = await made.ask()
        holder = sqlite3.connect(tmp_path / "videos.sqlite3", isolation_level=None)
        holder.execute("BEGIN IMMEDIATE")
        handle.fail(EngineDied("twice"))
        async with asyncio.timeout(10):
            while "can't be written: database is locked" not in caplog.text:
                await asyncio.sleep(0.01)
        assert (await made.look(id)).status == "failed"  # it is told before it is written down
        query = "SELECT status FROM videos"
        assert holder.execute(query).fetchall() == [("queued",)]
        holder.execute("ROLLBACK")
        async with asyncio.timeout(10):
            while holder.execute(query).fetchall() != [("failed",)]:
                await asyncio.sleep(0.01)
        holder.close()


async def test_what_has_no_record_is_not_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video_store, "BUSY_SECONDS", 0.05)
    async with making(tmp_path) as made:
        holder = sqlite3.connect(tmp_path / "videos.sqlite3", isolation_level=None)
        holder.execute("BEGIN IMMEDIATE")
        with pytest.raises(StorageFull):
            await made.ask()
        holder.close()
        (handle,) = made.engine.handles.values()
        assert handle.ended


async def test_what_is_left_at_the_end_has_failed(tmp_path: Path) -> None:
    async with making(tmp_path) as made:
        made.jobs.start()
        waiting, _ = await made.ask()
        done, handle = await made.ask()
        handle.tell(frames(handle))
        await asyncio.sleep(0)
    store = VideoStore(tmp_path, 100, 1 << 20)
    assert store.get(waiting).status == "failed"
    assert store.get(done).status == "completed"
    store.close()


async def test_what_expires_is_deleted_without_a_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video_jobs, "TIDY_SECONDS", 0.02)
    async with making(tmp_path) as made:
        made.jobs.start()
        id, handle = await made.ask()
        handle.tell(frames(handle))
        await made.end(id)
        assert len(list(made.store.files.iterdir())) == 3
        made.store.clock = WallClock(lambda: 4e9)
        async with asyncio.timeout(5):
            while list(made.store.files.iterdir()):
                await asyncio.sleep(0.01)
