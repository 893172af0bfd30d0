"""Pixels to image files, in threads: a large png takes tenths of a second, which the event loop doesn't have."""

from __future__ import annotations

import asyncio
import io
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from PIL import Image

from stepbatch.engine.forecast import Prediction
from stepbatch.engine.messages import Output

T = TypeVar("T")

VIDEO_THREADS = "videos"  # the prefix of their names


def encode_image(output: Output, output_format: str, quality: int) -> bytes:
    """An output as a png, jpeg or webp file; ``quality`` from 0 to 100 is for the lossy two."""
    picture = Image.frombytes("RGB", (output.width, output.height), output.pixels)
    # Level 1 takes a third of the time of the default, 6, for files 6% larger.
    options: dict[str, Any] = {"compress_level": 1} if output_format == "png" else {"quality": quality}
    file = io.BytesIO()
    picture.save(file, output_format, **options)
    return file.getvalue()


def predicted(prediction: Prediction | None) -> dict[str, float] | None:
    """What a request could expect when it came, for its answer."""
    if prediction is None:
        return None
    return {"queue": round(prediction.queue, 6), "total": round(prediction.total, 6)}


class Threads:
    """A few threads for work that would hold up the event loop.

    Uploads have one of their own: what takes long to decode, and much memory, comes one by one, and holds up nobody's
    answer. So have videos, and their records, which are kept in order that way.
    """

    def __init__(self) -> None:
        self._answers = ThreadPoolExecutor(min(4, os.cpu_count() or 1), thread_name_prefix="answers")
        self._uploads = ThreadPoolExecutor(1, thread_name_prefix="uploads")
        self._videos = ThreadPoolExecutor(1, thread_name_prefix=VIDEO_THREADS)
        self._records = ThreadPoolExecutor(1, thread_name_prefix="records")

    async def run(self, work: Callable[[], T]) -> T:
        """What ``work``, on an answer, returns or raises."""
        return await asyncio.get_running_loop().run_in_executor(self._answers, work)

    async def decode(self, work: Callable[[], T]) -> T:
        """What ``work``, on an upload, returns or raises."""
        return await asyncio.get_running_loop().run_in_executor(self._uploads, work)

    async def write(self, work: Callable[[], T]) -> T:
        """What ``work``, on a video, returns or raises; one after the other, as each takes all cores."""
        return await asyncio.get_running_loop().run_in_executor(self._videos, work)

    async def record(self, work: Callable[[], T]) -> T:
        """What ``work``, on records, returns or raises; one after the other, in the order of the calls."""
        return await asyncio.get_running_loop().run_in_executor(self._records, work)

    def close(self, wait_for_videos: bool = True) -> None:
        """Finish what has begun."""
        self._answers.shutdown()
        self._uploads.shutdown()
        self._videos.shutdown(wait=wait_for_videos, cancel_futures=True)
        self._records.shutdown()
