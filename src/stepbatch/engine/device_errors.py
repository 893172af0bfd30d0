"""What torch raises, as the engine knows it: out of memory, or a device that is lost to this process."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from stepbatch.errors import DeviceLost

NO_ROOM = re.compile(r"out of memory|allocate memory|not enough memory|STATUS_ALLOC_FAILED", re.IGNORECASE)
LOST = re.compile(r"CUDA error|CUDNN_STATUS_(EXECUTION_FAILED|INTERNAL_ERROR|MAPPING_ERROR)")
HARMLESS = re.compile(  # what was asked for can't be done, and all else can
    r"STATUS_NOT_SUPPORTED|STATUS_INVALID_VALUE|invalid (configuration )?argument|too many resources|not supported"
)


@contextmanager
def device_errors() -> Iterator[None]:
    """Raise ``MemoryError`` where there was no room, and ``DeviceLost`` where only a new process can go on."""
    try:
        yield
    except RuntimeError as error:  # torch's own are among them
        if isinstance(error, torch.OutOfMemoryError) or NO_ROOM.search(str(error)):
            raise MemoryError(_first_line(error)) from error
        lost = isinstance(error, torch.AcceleratorError) or LOST.search(str(error))
        if lost and not HARMLESS.search(_first_line(error)):
            raise DeviceLost(_first_line(error)) from error
        raise


def _first_line(error: RuntimeError) -> str:
    return str(error).split("\n", 1)[0]
