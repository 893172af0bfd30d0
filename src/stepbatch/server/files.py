"""Pictures that were answered as a url: kept in memory for a while, under names that can't be guessed."""

from __future__ import annotations

import secrets
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from stepbatch.errors import NotFound

MAX_BYTES = 256 << 20  # of all pictures together; the oldest go first


@dataclass(frozen=True, eq=False)
class File:
    """A picture and until when it can be fetched."""

    data: bytes
    media_type: str
    expires: float  # seconds on the store's clock


class FileStore:
    """Files by name, for ``ttl_seconds`` each, at most ``max_bytes`` together.

    Args:
        ttl_seconds: How long a file can be fetched.
        max_bytes: Over this, the oldest files go before their time.
        clock: Seconds that only grow.
    """

    def __init__(
        self, ttl_seconds: float, max_bytes: int = MAX_BYTES, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.ttl_seconds = ttl_seconds
        self.max_bytes = max_bytes
        self.clock = clock
        self.size = 0  # bytes held
        self._files: OrderedDict[str, File] = OrderedDict()  # in order of expiry, as all live equally long

    def put(self, data: bytes, media_type: str, extension: str) -> str:
        """Keep a file; returns its name."""
        name = f"{secrets.token_urlsafe(24)}.{extension}"
        self._files[name] = File(data, media_type, self.clock() + self.ttl_seconds)
        self.size += len(data)
        self._evict()
        return name

    def get(self, name: str) -> File:
        """A file by its name; raises ``NotFound`` if it never was or is no longer."""
        self._evict()
        file = self._files.get(name)
        if file is None:
            raise NotFound("no such file, or it has expired")
        return file

    def _evict(self) -> None:
        now = self.clock()
        while self._files:
            name, oldest = next(iter(self._files.items()))
            if oldest.expires > now and self.size <= self.max_bytes:
                break
            self.size -= len(oldest.data)
            del self._files[name]
