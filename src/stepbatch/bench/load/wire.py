"""Exchanges over HTTP whose answers go to a file, unread, so that neither memory nor time goes to them under load."""

from __future__ import annotations

import errno
import json
import os
import re
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import aiohttp
from aiohttp.http_exceptions import HttpProcessingError

from stepbatch.bench.results import Outcome
from stepbatch.errors import SetupError

# what can go wrong with an exchange, but for cancellation
FAULTS = (aiohttp.ClientError, HttpProcessingError, OSError)
EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.EADDRNOTAVAIL, errno.ENOBUFS)  # ours, not the server's
MAX_ERROR = 300  # characters
MAX_ERROR_BYTES = 1 << 16  # of a body that tells an error
CHUNK = 1 << 16  # bytes that are given to a socket at once

Extents = tuple[tuple[int, int], ...]  # offset, length


class Spool:
    """An anonymous temporary file that answers are added to, piece by piece as they come.

    Raises:
        SetupError: there is no place for one.
    """

    def __init__(self) -> None:
        try:
            self._file = tempfile.TemporaryFile(prefix="stepbatch-", buffering=0)  # noqa: SIM115 # close() closes it
        except OSError as error:
            raise _no_room(error) from error
        self._end = 0

    def append(self, chunk: bytes) -> int:
        """Add a piece, mostly to the page cache; returns its offset.

        Raises:
            SetupError: there is no room left.
        """
        offset, rest = self._end, memoryview(chunk)
        self._end += len(chunk)
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            raise _no_room(error) from error
        return offset

    def read(self, extents: Extents) -> bytes:
        """The pieces, joined. May be called by any thread."""
        return b"".join(os.pread(self._file.fileno(), length, offset) for offset, length in extents)

    def close(self) -> None:
        """Delete the file."""
        self._file.close()


@dataclass(frozen=True)
class Answer:
    """What came of an exchange, or of several that make one request."""

    outcome: Outcome
    ended: float  # time.perf_counter() at the last byte that the caller waits for
    status: int | None = None
    error: str = ""
    retry_after: float | None = None  # seconds, as the server tells it
    body: Extents = ()  # in the spool
    told: bytes = b""  # JSON that the server told besides, or a body that was wanted in memory


class Wire:
    """The way to one server.

    Args:
        session: Whose connections are used.
        base: The server's address.
        spool: Where answers go.
        poll_interval: Seconds between two looks at what takes time.
    """

    def __init__(self, session: aiohttp.ClientSession, base: str, spool: Spool, poll_interval: float = 0.25) -> None:
        self.base = base
        self.poll_interval = poll_interval
        self._session = session
        self._spool = spool

    async def post(self, path: str, body: Sequence[bytes], content_type: str, in_memory: bool = False) -> Answer:
        """Send a body, given in pieces, and keep what comes.

        Raises:
            FAULTS: the connection failed, or what came was no HTTP, or ended early.
            SetupError: there is no room for it.
        """
        headers = {"Content-Type": content_type, "Content-Length": str(sum(map(len, body)))}
        data = body[0] if len(body) == 1 and len(body[0]) <= CHUNK else _Stream(body)
        request = self._session.post(self.base + path, data=data, headers=headers, allow_redirects=False)
        return await self._answer(request, in_memory)

    async def get(self, path: str, in_memory: bool = False) -> Answer:
        """Fetch a path, or a URL. Raises as ``post`` does."""
        return await self._answer(self._session.get(path if "://" in path else self.base + path), in_memory)

    async def _answer(self, request: Any, in_memory: bool) -> Answer:
        async with request as response:
            if not 200 <= response.status < 300:
                body = await _head(response.content)
                error = error_message(body) or f"HTTP {response.status} {response.reason or ''}".strip()
                if 300 <= response.status < 400:  # not followed: a benchmark is of the address that it was given
                    where = response.headers.get("Location", "nowhere")
                    error = shortened(f"HTTP {response.status}: redirected to {where}")
                wait = retry_after(response.headers)
                return Answer(outcome(response.status), time.perf_counter(), response.status, error, wait)
            if in_memory:
                told = await response.read()
                return Answer("ok", time.perf_counter(), response.status, told=told)
            extents: list[tuple[int, int]] = []
            async for chunk in response.content.iter_any():
                _extend(extents, self._spool.append(chunk), len(chunk))
            return Answer("ok", time.perf_counter(), response.status, body=tuple(extents))


class _Stream:
    """A body's pieces, cut so that a socket can take them one by one; large files among them are never copied."""

    def __init__(self, pieces: Iterable[bytes]) -> None:
        self._chunks = self._cut(pieces)

    def __aiter__(self) -> _Stream:
        return self

    async def __anext__(self) -> memoryview:
        chunk = next(self._chunks, None)
        if chunk is None:
            raise StopAsyncIteration
        return chunk

    @staticmethod
    def _cut(pieces: Iterable[bytes]) -> Iterator[memoryview]:
        for piece in pieces:
            view = memoryview(piece)
            for start in range(0, len(view), CHUNK):
                yield view[start : start + CHUNK]


def _no_room(error: OSError) -> SetupError:
    return SetupError(f"can't keep answers in a temporary file (see TMPDIR): {error.strerror or error}")


def _extend(extents: list[tuple[int, int]], offset: int, length: int) -> None:
    if extents and sum(extents[-1]) == offset:  # nobody else's piece came between
        extents[-1] = (extents[-1][0], extents[-1][1] + length)
    elif length:
        extents.append((offset, length))


async def _head(content: aiohttp.StreamReader) -> bytes:
    """The beginning of a body; the connection of a longer one is closed."""
    head = bytearray()
    async for chunk in content.iter_any():
        head += chunk
        if len(head) >= MAX_ERROR_BYTES:
            break
    return bytes(head)


def outcome(status: int) -> Outcome:
    """What an HTTP status means for a run."""
    if 200 <= status < 300:
        return "ok"
    if status in (429, 503):
        return "rejected"
    return "timeout" if status in (408, 504) else "failed"


def error_message(body: bytes) -> str:
    """What the body of an error says: its message, in OpenAI's or FastAPI's shape, or its text; shortened."""
    text: Any = body.decode(errors="replace")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    for key in ("error", "message", "detail", "msg"):  # error.message; detail[0].msg
        value = value[0] if isinstance(value, list) and value else value
        value = value[key] if isinstance(value, dict) and value.get(key) else value
    return shortened(value if isinstance(value, str) else text)


def shortened(text: str) -> str:
    """A message in one line."""
    text = re.sub(r"\s+", " ", text).strip()
    return text if len(text) <= MAX_ERROR else text[: MAX_ERROR - 3] + "..."


def retry_after(headers: Mapping[str, str]) -> float | None:
    """How many seconds a server says to wait, in headers that are found in any case; ``None`` if it doesn't."""
    for name, unit in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        value = headers.get(name, "").strip()
        if re.fullmatch(r"\d{1,9}(\.\d{1,9})?", value):
            return float(value) * unit
    try:
        return max(0.0, (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):  # no date, or one without a time zone
        return None


def words(error: BaseException) -> str:
    """A fault in a few words."""
    number = error_number(error)
    if number:
        return os.strerror(number)
    return shortened(str(error)) or type(error).__name__


def error_number(error: BaseException) -> int | None:
    """The operating system's number of a fault."""
    if isinstance(error, aiohttp.ClientConnectorError):
        error = error.os_error
    return error.errno if isinstance(error, OSError) and error.errno and error.errno > 0 else None
