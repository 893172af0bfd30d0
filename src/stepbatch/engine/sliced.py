"""A module's work in slices: it pauses between two of its layers when its time is up, and goes on later.

Nothing else about it changes, so its result is what it would have been in one go, to the bit. The work runs on a stack
of its own, in the same thread as all else: what is set thread by thread, as inference mode, devices and threads of an
operation are, holds for it too, and whoever calls runs or it does, never both.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Generic, TypeVar

import greenlet
from torch import nn

from stepbatch.engine.clock import DeviceClock

T = TypeVar("T")


class Sliced(Generic[T]):
    """Work that is under way, or has not begun.

    Args:
        module: Whose layers the work goes through, in this thread.
        work: What is done. If it raises, so does ``go_on``.
        clock: Of the device that computes.
    """

    def __init__(self, module: nn.Module, work: Callable[[], T], clock: DeviceClock) -> None:
        self._layers = [layer for layer in module.modules() if next(layer.children(), None) is None]
        self._clock = clock
        self._until = 0.0
        self._work = greenlet.greenlet(partial(self._all, work))
        self._result: list[T] = []

    def go_on(self, seconds: float) -> bool:
        """Work for so long, or until the next layer after that; returns whether it is done.

        The caller is in inference mode, or isn't, each time alike.
        """
        if self._work.dead:
            return True
        self._until = time.perf_counter() + seconds
        hooks = [layer.register_forward_pre_hook(self._pause) for layer in self._layers]
        try:
            self._work.switch()
        finally:
            for hook in hooks:
                hook.remove()
        return bool(self._result)

    @property
    def result(self) -> T:
        """What the work returned."""
        return self._result[0]

    def abandon(self) -> None:
        """End the work where it is, unless it is done: its ``finally`` clauses run, and what it holds is freed."""
        self._work.throw(greenlet.GreenletExit)

    def _all(self, work: Callable[[], T]) -> None:
        self._result.append(work())

    def _pause(self, layer: nn.Module, inputs: object) -> None:
        """Called before each layer. The host doesn't run ahead of the device, so that its clock tells of that."""
        self._clock.stay_close()
        if time.perf_counter() >= self._until and greenlet.getcurrent() is self._work:
            self._work.parent.switch()
