"""What may be asked for again: the least recently used goes first, by bytes. No torch here."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, Protocol, TypeVar


class Sized(Protocol):
    """Knows its size."""

    @property
    def nbytes(self) -> int: ...


V = TypeVar("V", bound=Sized)


class ByteCache(Generic[V]):
    """Values by key, as many as fit.

    Args:
        limit: Bytes. A value over it by itself is not kept.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.nbytes = 0
        self._values: OrderedDict[Hashable, V] = OrderedDict()

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: Hashable) -> V | None:
        """The value, which is now the most recently used."""
        if key not in self._values:
            return None
        self._values.move_to_end(key)
        return self._values[key]

    def put(self, key: Hashable, value: V) -> None:
        """Keep a value, and let go of others for it."""
        old = self._values.pop(key, None)
        if old is not None:
            self.nbytes -= old.nbytes
        if value.nbytes > self.limit:
            return
        self._values[key] = value
        self.nbytes += value.nbytes
        while self.nbytes > self.limit:
            _, oldest = self._values.popitem(last=False)
            self.nbytes -= oldest.nbytes

    def clear(self) -> None:
        """Let go of everything."""
        self._values.clear()
        self.nbytes = 0
