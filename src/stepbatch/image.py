"""Pictures that come in with a request, as pixels. No torch here: the server decodes uploads to these."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256

from stepbatch.errors import InvalidValue


@dataclass(frozen=True)
class InputImage:
    """A picture or a mask: 8 bits a channel, rows from the top.

    A picture has three channels, RGB. A mask has one, in which 255 is what is painted anew and 0 what is kept.

    Raises:
        InvalidValue: the pixels are not width x height of one or three channels.
    """

    width: int
    height: int
    pixels: bytes

    def __post_init__(self) -> None:
        size = self.width * self.height
        if self.width < 1 or self.height < 1 or len(self.pixels) not in (size, 3 * size):
            raise InvalidValue("an image must have width x height pixels of one or three bytes", "image")

    @property
    def channels(self) -> int:
        return len(self.pixels) // (self.width * self.height)

    @cached_property
    def digest(self) -> bytes:
        """Tells pictures apart, where keeping the pixels for it would be too much."""
        return sha256(b"%d,%d," % (self.width, self.height) + self.pixels).digest()
