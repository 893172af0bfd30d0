"""Work that a device does beside all else that it is given: on CUDA, on a stream of its own.

A CPU has one stream only, and there it is done at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch


@dataclass(frozen=True, eq=False)
class Beside:
    """Tensors that are being made, and brought to the host."""

    _tensors: Sequence[torch.Tensor]
    _event: Any  # the device's, after them

    @property
    def done(self) -> bool:
        return bool(self._event.query())

    def wait(self) -> Sequence[torch.Tensor]:
        """They themselves, on the host."""
        self._event.synchronize()
        return self._tensors


class SideStream:
    """A device's stream besides the one that all else is done on.

    Args:
        device: Whose.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._module = torch.get_device_module(device)

    @cached_property
    def _stream(self) -> Any:
        return self._module.Stream(self._device)

    def begin(self, work: Callable[[], Sequence[torch.Tensor]], given: torch.Tensor) -> Beside:
        """Make tensors once the device has done what it has been given so far.

        Args:
            work: Makes them, and waits for nothing.
            given: A tensor of the device that it needs, and that nobody writes to any more.
        """
        self._stream.wait_stream(self._module.current_stream(self._device))
        with self._module.stream(self._stream):
            tensors = [tensor.to("cpu", non_blocking=True) for tensor in work()]
            event = self._module.Event()
            event.record(self._stream)
        if given.is_cuda:  # or its memory might be another's before the stream comes to it
            given.record_stream(self._stream)
        return Beside(tensors, event)
