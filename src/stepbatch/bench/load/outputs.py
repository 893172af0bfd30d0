"""What came, after the run: every picture and video is decoded and held against what was asked for."""

from __future__ import annotations

import asyncio
import binascii
import io
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote_to_bytes, urljoin, urlsplit

import aiohttp

from stepbatch.bench.load.api import BadOutput, Expected, Found
from stepbatch.bench.load.client import Driven
from stepbatch.bench.load.target import open_session, resolve
from stepbatch.bench.load.wire import FAULTS, Wire, shortened, words
from stepbatch.bench.results import Record
from stepbatch.errors import InvalidValue, SetupError
from stepbatch.image_files import read_picture

MAX_PIXELS = 1 << 28  # of a picture
STAGES = ("encode", "denoise", "decode")
AT_ONCE = 4  # answers that are in memory and decoded at the same time

T = TypeVar("T")


@dataclass(frozen=True)
class Shape:
    """What an output is."""

    width: int  # pixels
    height: int  # pixels
    frames: int  # 1 of a picture

    @property
    def megapixels(self) -> float:
        """Over all frames."""
        return self.width * self.height * self.frames / 1e6


async def check_outputs(
    driven: Driven, folder: Path | None = None, progress: Callable[[int], None] = lambda checked: None
) -> None:
    """Decode all that came, and complete the records: what isn't as it should be makes a request ``invalid``.

    Args:
        driven: What came of a load.
        folder: Outputs that can be decoded are written there, as INDEX-NUMBER.png, jpg, webp or mp4.
        progress: Called with the number of requests that have been looked at.

    Raises:
        SetupError: the folder can't be written.
    """
    headers = resolve(driven.target).headers
    answered = [record for record in driven.records if record.outcome == "ok"]
    with ThreadPoolExecutor(min(AT_ONCE, os.cpu_count() or 1)) as pool:
        async with open_session(headers) as ours, open_session(()) as others:
            checker = _Checker(driven, folder, pool, ours, others)
            todo = enumerate(answered, start=1)
            try:
                async with asyncio.TaskGroup() as group:
                    for _ in range(AT_ONCE):
                        group.create_task(_work_off(todo, checker, progress))
            except ExceptionGroup as errors:
                raise errors.exceptions[0] from None


async def _work_off(todo: Iterator[tuple[int, Record]], checker: _Checker, progress: Callable[[int], None]) -> None:
    for number, record in todo:
        await checker.check(record)
        progress(number)


class _Checker:
    """Looks at one answer at a time; what takes long is done by the pool's threads.

    Args:
        ours: A session that sends the servers what they need to know us.
        others: One that doesn't, for URLs that lead elsewhere.
    """

    def __init__(
        self,
        driven: Driven,
        folder: Path | None,
        pool: ThreadPoolExecutor,
        ours: aiohttp.ClientSession,
        others: aiohttp.ClientSession,
    ) -> None:
        self._driven = driven
        self._folder = folder
        self._pool = pool
        self._ours = ours
        self._others = others

    async def check(self, record: Record) -> None:
        """Complete a record."""
        request, answer = self._driven.requests[record.index], self._driven.answers[record.index]
        try:
            body = await self._apart(lambda: self._driven.spool.read(answer.body))
            found = await self._apart(lambda: request.api.read(body, answer.told))
            _tell(record, found.told)
            files = await self._files(found, record.server)
            await self._apart(lambda: self._judge(record, files, request.expected, request.api.is_video))
        except BadOutput as error:
            record.outcome, record.error = "invalid", shortened(str(error))

    async def _apart(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    async def _files(self, found: Found, server: str) -> list[bytes | BadOutput]:
        return [await self._fetch(output, server) if isinstance(output, str) else output for output in found.outputs]

    async def _fetch(self, url: str, server: str) -> bytes | BadOutput:
        """The file behind a URL, which may hold it itself, lead elsewhere, or be a mere path on the server."""
        if url.startswith("data:"):
            return _data_url(url)
        url = urljoin(f"{server}/", url)
        if urlsplit(url).scheme not in ("http", "https"):
            return BadOutput(f"has a url that is none of a server: {url}")
        session = self._ours if urlsplit(url)[:2] == urlsplit(server)[:2] else self._others
        try:
            async with asyncio.timeout(self._driven.target.timeout):
                answer = await Wire(session, server, self._driven.spool).get(url, in_memory=True)
        except (*FAULTS, UnicodeError) as error:  # the latter of a host that can be none
            return BadOutput(f"can't be fetched: {words(error)}")
        return answer.told if answer.outcome == "ok" else BadOutput(f"can't be fetched: {answer.error}")

    def _judge(self, record: Record, files: Sequence[bytes | BadOutput], expected: Expected, is_video: bool) -> None:
        """Decode all files of a request, keep those that can be, and raise ``BadOutput`` if any isn't as it should."""
        faults = []
        for number, file in enumerate(files):
            try:
                shape, kind = _decode(file, is_video)
                record.outputs += 1
                record.megapixels += shape.megapixels
                self._save(f"{record.index:04}-{number}.{kind}", file)
                _compare(shape, expected)
            except BadOutput as fault:
                faults.append(f"output {number} {fault}")
        if len(files) != expected.count:
            faults.insert(0, f"the number of outputs is {len(files)}, not {expected.count}")
        if faults:
            raise BadOutput("; ".join(faults))

    def _save(self, name: str, file: bytes | BadOutput) -> None:
        if self._folder is None or isinstance(file, BadOutput):
            return
        try:
            (self._folder / name).write_bytes(file)
        except OSError as error:
            raise SetupError(f"--save-outputs: can't write {self._folder / name}: {error.strerror or error}") from error


def read_video(data: bytes) -> Shape:
    """Decode every frame of a video.

    Raises:
        BadOutput: it can't be.
    """
    import av  # optional: a run without videos needs none

    sizes = []
    try:
        with av.open(io.BytesIO(data), "r") as container:
            stated = container.streams.video[0].frames if container.streams.video else 0
            sizes = [(frame.width, frame.height) for frame in container.decode(video=0)]
    except (av.FFmpegError, IndexError, ValueError) as error:
        raise BadOutput(f"can't be decoded: {shortened(str(error))}") from None
    if not sizes or len(sizes) < stated:
        raise BadOutput(f"is damaged: {len(sizes)} of {stated or 'no'} frames can be decoded")
    return Shape(*sizes[0], len(sizes))


def _decode(file: bytes | BadOutput, is_video: bool) -> tuple[Shape, str]:
    """An output's shape, and its file's extension."""
    if isinstance(file, BadOutput):
        raise file
    if is_video:
        return read_video(file), "webm" if file.startswith(b"\x1a\x45\xdf\xa3") else "mp4"
    try:
        size = read_picture(file, MAX_PIXELS, "", "").colours.size
    except InvalidValue as error:
        raise BadOutput(error.message.strip()) from None
    kinds = {b"\x89": "png", b"\xff": "jpg"}
    return Shape(*size, 1), kinds.get(file[:1], "webp")


def _compare(shape: Shape, expected: Expected) -> None:
    width, height = expected.width or shape.width, expected.height or shape.height
    if (shape.width, shape.height) != (width, height):
        raise BadOutput(f"is {shape.width}x{shape.height}, where {width}x{height} was asked for")
    if expected.frames not in (None, shape.frames):
        raise BadOutput(f"has {shape.frames} frames, where {expected.frames} were asked for")


def _data_url(url: str) -> bytes | BadOutput:
    about, _, data = url.partition(",")
    try:
        raw = unquote_to_bytes(data)
        return binascii.a2b_base64(raw) if about.endswith(";base64") else raw
    except ValueError as error:
        return BadOutput(f"is no base64: {error}")


def _tell(record: Record, told: Mapping[str, Any]) -> None:
    """Write down what the server tells of a request besides its outputs."""
    times = told.get("timings")
    times = times if isinstance(times, dict) else {}
    record.queue_s = _number(times.get("queue"))
    record.service_s = _number(told.get("inference_time_s"))  # with the waits between stages
    stages = [stage for name in STAGES if (stage := _number(times.get(name))) is not None]
    if record.service_s is None and stages:
        record.service_s = sum(stages)
    places = (told, told.get("usage"), told.get("metrics"))
    peaks = [_number(place.get("peak_memory_mb")) for place in places if isinstance(place, dict)]
    record.peak_memory_mb = next((peak for peak in peaks if peak is not None), None)


def _number(value: Any) -> float | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if is_number else None
