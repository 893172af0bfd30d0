"""The routes of videos: one is asked for, looked after while it is made, and fetched."""

from __future__ import annotations

import os
import time
from dataclasses import replace

from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.types import Message, Receive, Scope, Send

from stepbatch.config import LimitsConfig
from stepbatch.engine.client import AsyncEngine
from stepbatch.errors import InternalError, InvalidRange, InvalidValue, NotFound, RequestError
from stepbatch.server.access import by_key
from stepbatch.server.body import Room, Share, read_body, unless_gone
from stepbatch.server.fields import GENERATIONS, MAX_PAGE, PAGE, VIDEOS
from stepbatch.server.forms import read_form
from stepbatch.server.handlers import error_response
from stepbatch.server.images import Threads
from stepbatch.server.logs import note_prompt
from stepbatch.server.metrics import Metrics
from stepbatch.server.schema import from_texts, parse_json
from stepbatch.server.video_jobs import VideoJobs
from stepbatch.server.video_request import (
    REFERENCE,
    VideoRequest,
    check_before_decoding,
    form_limits,
    parse_video,
    with_image,
)
from stepbatch.server.video_store import VARIANTS, Record, is_video_id


class VideoRoutes:
    """The routes and what they work with; ``jobs`` is ``None`` where the model makes pictures."""

    def __init__(
        self,
        engine: AsyncEngine,
        jobs: VideoJobs | None,
        metrics: Metrics,
        threads: Threads,
        limits: LimitsConfig,
        room: Room,
        idle: tuple[str, ...],
    ) -> None:
        self.engine = engine
        self.metrics = metrics
        self.threads = threads
        self.limits = limits
        self.room = room
        self._idle = idle  # fields without effect
        self._jobs = jobs

    async def create(self, request: Request) -> Response:
        """Have a video made; answers at once."""
        arrival = time.monotonic()
        code: str | None = InternalError.code
        try:
            self.engine.check()  # what is refused costs nothing more
            with self.room.share() as share:
                wanted = await self._read(request, share)
            wanted = replace(wanted, generation=by_key(request, wanted.generation))
            record = await self.jobs.submit(wanted, arrival)
            code = None  # it is counted when it ends
        except RequestError as error:
            code = error.code
            raise
        finally:
            if code:
                self.metrics.ended(code, time.monotonic() - arrival)
        return JSONResponse(record.answer())

    async def page(self, request: Request) -> Response:
        """What there is, a page of it."""
        store, given = self.jobs.store, request.query_params
        after, limit, order = given.get("after"), given.get("limit", str(PAGE)), given.get("order", "desc")
        if after is not None and not is_video_id(after):
            raise InvalidValue("after must be the id of a video", "after")
        if not (limit.isascii() and limit.isdecimal() and len(limit) < 9 and 1 <= int(limit) <= MAX_PAGE):
            raise InvalidValue(f"limit must be from 1 to {MAX_PAGE}", "limit")
        if order not in ("asc", "desc"):
            raise InvalidValue("order must be asc or desc", "order")
        records, more = await self.threads.record(lambda: store.page(after, int(limit), order == "desc"))
        ends = (records[0].id, records[-1].id) if records else (None, None)
        data = [record.answer() for record in records]
        return JSONResponse({"object": "list", "data": data, "first_id": ends[0], "last_id": ends[1], "has_more": more})

    async def retrieve(self, request: Request) -> Response:
        """How a video is."""
        return JSONResponse((await self._record(request)).answer())

    async def delete(self, request: Request) -> Response:
        """Forget a video, or stop making it."""
        id = request.path_params["video_id"]
        await self.jobs.delete(id)
        return JSONResponse({"id": id, "object": "video.deleted", "deleted": True})

    async def content(self, request: Request) -> Response:
        """A finished video's file."""
        variant = request.query_params.get("variant", "video")
        if variant not in VARIANTS:
            raise InvalidValue(f"variant must be one of {', '.join(VARIANTS)}", "variant")
        record = await self._record(request)
        if record.error:
            raise NotFound(f"the video has failed: {record.error['message']}")
        if not record.finished:
            raise NotFound(f"the video is {record.status}, at {record.progress} %; it has no content before its end")
        path = self.jobs.store.path(record.id, variant)
        try:
            status = await self.threads.run(lambda: os.stat(path))
        except FileNotFoundError:
            raise NotFound("there is no such video any more") from None
        return _File(
            path,
            stat_result=status,
            media_type=VARIANTS[variant][1],
            filename=path.name,
            content_disposition_type="inline",
            headers={"cache-control": "private", "x-content-type-options": "nosniff"},
        )

    @property
    def jobs(self) -> VideoJobs:
        """Raises ``NotFound`` where the model makes pictures."""
        if self._jobs is None:
            raise NotFound(f"there are no videos here: the model makes pictures, at {GENERATIONS}")
        return self._jobs

    async def _record(self, request: Request) -> Record:
        store, id = self.jobs.store, request.path_params["video_id"]
        return await self.threads.record(lambda: store.get(id))

    async def _read(self, request: Request, share: Share) -> VideoRequest:
        info = self.engine.info
        if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
            values = parse_json(await read_body(request, self.limits.max_body_bytes, share))
            note_prompt(request, values)
            return parse_video(values, info, self._idle, self.limits)
        form = await read_form(request, form_limits(self.limits), share)
        note_prompt(request, form.texts)
        wanted = parse_video(from_texts(form.texts, VIDEOS), info, self._idle, self.limits)
        if REFERENCE not in form.files:
            return wanted
        check_before_decoding(wanted, info)
        self.engine.check()
        (data,) = form.files[REFERENCE]
        decoding = self.threads.decode(lambda: with_image(wanted, data, self.limits.max_image_pixels, share))
        return await unless_gone(request, decoding)


class _File(FileResponse):
    """A file, or the parts of it that a ``Range`` header asks for, if it asks for what there is.

    A header that is malformed, or of another unit than bytes, is ignored, as HTTP has it.
    """

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refused = 0

        async def unless_refused(message: Message) -> None:
            nonlocal refused
            if message["type"] == "http.response.start" and message["status"] >= 400:
                refused = message["status"]
            if not refused:
                await send(message)

        await super().__call__(scope, receive, unless_refused)
        if refused == 400:
            headers = [(name, value) for name, value in scope["headers"] if name != b"range"]
            await super().__call__({**scope, "headers": headers}, receive, send)
        elif refused:
            assert self.stat_result is not None
            size = self.stat_result.st_size
            error = InvalidRange(f"the file has the bytes from 0 to {size - 1}")
            await error_response(error, {"content-range": f"bytes */{size}"})(scope, receive, send)
