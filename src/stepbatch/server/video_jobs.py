"""Videos in the making: a task for each sees it from the engine through its file to its record's one ending."""

from __future__ import annotations

import asyncio
import logging
import os
import sqlite3
import time
from collections.abc import Mapping
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stepbatch.duration import seconds_of
from stepbatch.engine.client import AsyncEngine
from stepbatch.engine.handle import Handle
from stepbatch.engine.messages import FromEngine, Output, Unit
from stepbatch.errors import EngineUnavailable, InternalError, InvalidValue, RequestCancelled, RequestError, StorageFull
from stepbatch.race import done_before
from stepbatch.server.images import Threads, predicted
from stepbatch.server.metrics import Metrics
from stepbatch.server.video_request import VideoRequest
from stepbatch.server.video_store import Record, VideoStore, new_video_id
from stepbatch.video_files import spritesheet, thumbnail, write_mp4

TIDY_SECONDS = 60.0  # between two looks for what has expired
WRITING_SECONDS = 5.0  # that videos may still be written for once all in flight must have ended
RETRY_SECONDS = 1.0  # until a record's ending that couldn't be written is tried again

log = logging.getLogger(__name__)


@dataclass(eq=False)
class _Job:
    """A video that the engine works on, or that is being written."""

    id: str
    handle: Handle
    arrival: float  # seconds on the monotonic clock, when the request came in at the door
    progress: int = -1  # percent, as the record has it
    deleted: bool = False
    making: asyncio.Task[None] | None = None
    begun: asyncio.Event = field(default_factory=asyncio.Event)  # set by the first unit of work


class VideoJobs:
    """The videos that this server makes.

    Args:
        engine: Makes the frames.
        store: Keeps files and records.
        metrics: Counts how each ends.
        threads: Where files are written, and where the store works.
    """

    def __init__(self, engine: AsyncEngine, store: VideoStore, metrics: Metrics, threads: Threads) -> None:
        self.engine = engine
        self.store = store
        self.metrics = metrics
        self.threads = threads
        self._jobs: dict[str, _Job] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._tidying: asyncio.Task[None] | None = None
        self._closing = asyncio.Event()

    def start(self) -> None:
        """Begin to look, now and then, for what has expired."""
        self._tidying = asyncio.create_task(self._tidy(), name="video tidying")

    async def close(self) -> bool:
        """End what the engine still works on, finish what is being written, and let go of the store.

        What isn't written ``WRITING_SECONDS`` after the engine was to have ended all has failed, but the thread that
        writes can't be told. Returns whether there is none that does.
        """
        self._closing.set()
        for id in list(self._jobs):
            self.engine.cancel(id)
        if self._tasks:
            left = self.engine.stop_by + WRITING_SECONDS - time.monotonic()
            await asyncio.wait(self._tasks, timeout=max(left, 0.0))
        late = [job.making for job in self._jobs.values() if job.making]
        for making in late:
            making.cancel()
        await asyncio.gather(*self._tasks, *([self._tidying] if self._tidying else []))
        await self.threads.record(self.store.close)
        return not late

    async def submit(self, wanted: VideoRequest, arrival: float) -> Record:
        """Have a video made; returns its record, before anything has been done.

        Raises:
            RequestError: it can't be made.
        """
        id, kept = new_video_id(), False
        try:
            handle = self.engine.submit(wanted.generation, id)
        except InvalidValue as error:
            raise wanted.blame(error) from None
        self._jobs[id] = job = _Job(id, handle, arrival)
        try:
            record = await self.threads.record(lambda: self.store.add(id, self._about(wanted, handle)))
            kept = True
        finally:
            if not kept:
                self.engine.cancel(id)
                del self._jobs[id]
        task = asyncio.create_task(self._see_through(job), name=f"video {id}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return record

    async def delete(self, id: str) -> None:
        """Forget a video, and stop making it; raises what the store's ``delete`` does."""
        if id in self._jobs:
            self._jobs[id].deleted = True
        try:
            await self.threads.record(lambda: self.store.delete(id))
        finally:
            self.engine.cancel(id)

    def on_message(self, message: FromEngine) -> None:
        """Notice which videos the engine has begun to work on."""
        if isinstance(message, Unit):
            for id, _ in message.jobs:
                if id in self._jobs:
                    self._jobs[id].begun.set()

    async def _see_through(self, job: _Job) -> None:
        """Make a video, and write down how that ended, whatever it was."""
        job.making = making = asyncio.create_task(self._make(job))
        try:
            await asyncio.wait({making})
        finally:
            making.cancel()
            self.engine.cancel(job.id)
            del self._jobs[job.id]
        error = (
            _deleted() if job.deleted else _given_up() if making.cancelled() else _as_request_error(making.exception())
        )
        self.metrics.ended(error.code if error else "ok", time.monotonic() - job.arrival)
        if error:
            await self._fail(job.id, error)

    async def _make(self, job: _Job) -> None:
        output = await self._output(job)
        seconds = time.monotonic() - job.handle.arrival
        if job.handle.predicted:
            self.metrics.predicted(job.handle.predicted.total, seconds)
        fps = job.handle.request.fps
        assert fps is not None
        parts = self.store.parts(job.id)
        await self.threads.write(lambda: _write(parts, output, fps))
        more = self._figures(output, seconds)
        if not await self.threads.record(lambda: self.store.finish(job.id, more)):
            raise _deleted()

    async def _output(self, job: _Job) -> Output:
        """The frames, when they are there; until then, the record is told of every step."""
        await done_before(job.handle.wait(), job.begun.wait())
        if not job.handle.ended:
            await self._tell(job, 0)
        outputs = []
        async with aclosing(job.handle.events()) as events:
            async for event in events:
                if isinstance(event, Output):
                    outputs.append(event)
                else:
                    await self._tell(job, min(99, 100 * event.step // event.steps))  # 100 is the file
        (output,) = outputs
        return output

    async def _tell(self, job: _Job, progress: int) -> None:
        """Put progress into the record; never less than before, though steps begin anew where the engine does.

        Where there is no room for it, it is left out: by the time the video is made, there may be.

        Raises:
            RequestCancelled: the record was deleted, by another server.
        """
        if progress > job.progress:
            job.progress = progress
            with suppress(StorageFull):
                if not await self.threads.record(lambda: self.store.advance(job.id, progress)):
                    raise _deleted()

    async def _fail(self, id: str, error: RequestError) -> None:
        """Write down why there will be no video. Where there is no room even for that, go on trying."""
        while True:
            try:
                await self.threads.record(lambda: self.store.fail(id, error))
                return
            except (sqlite3.Error, OSError, StorageFull) as problem:
                log.error("the record of %s can't be written: %s", id, problem)
            if await self._closes_within(RETRY_SECONDS):
                return  # whoever opens the folder next sees that this server has ended

    async def _tidy(self) -> None:
        while not await self._closes_within(TIDY_SECONDS):
            try:
                await self.threads.record(self.store.tidy)
            except (sqlite3.Error, OSError, StorageFull) as error:
                log.error("videos that have expired can't be deleted: %s", error)

    async def _closes_within(self, seconds: float) -> bool:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._closing.wait()
        return self._closing.is_set()

    def _about(self, wanted: VideoRequest, handle: Handle) -> dict[str, Any]:
        """What is known of a video from the start."""
        info, request = self.engine.info, handle.request
        assert request.fps is not None
        width, height = request.size
        idle = [name for name in request.without_effect(info) if getattr(wanted.generation, name) is not None]
        return {
            "model": info.id,
            "prompt": request.prompt,
            "seconds": seconds_of(request.frames, request.fps),
            "size": f"{width}x{height}",
            "num_frames": request.frames,
            "fps": request.fps,
            "seed": request.seed,
            "ignored": [*wanted.ignored, *idle],
            "predicted": predicted(handle.predicted),
        }

    def _figures(self, output: Output, seconds: float) -> dict[str, Any]:
        times = output.times
        return {
            "inference_time_s": round(seconds - times.queue, 6),
            "peak_memory_mb": self.engine.stats.peak_memory_mb,
            "timings": {
                "queue": round(times.queue, 6),
                "encode": round(times.encode, 6),
                "denoise": round(times.denoise, 6),
                "decode": round(times.decode, 6),
            },
        }


def _deleted() -> RequestCancelled:
    return RequestCancelled("the video was deleted")


def _given_up() -> EngineUnavailable:
    return EngineUnavailable("the server stopped before the video was written")


def _write(parts: Mapping[str, Path], output: Output, fps: int) -> None:
    write_mp4(parts["video"], output, fps)
    parts["thumbnail"].write_bytes(thumbnail(output))
    parts["spritesheet"].write_bytes(spritesheet(output))
    for part in parts.values():  # a record that says completed must not come to the disk before them
        with part.open("rb") as file:
            os.fsync(file)


def _as_request_error(error: BaseException | None) -> RequestError | None:
    """What a caller is told of an error."""
    if error is None or isinstance(error, RequestError):
        return error
    log.error("a video could not be made", exc_info=error)
    if isinstance(error, OSError | sqlite3.Error):
        return StorageFull("the video can't be written: the server's log has more")
    return InternalError("internal error; the server's log has more")
