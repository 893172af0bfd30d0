"""How long a device's work takes.

torch is imported where it is used, so that whoever times the host alone does without it.
"""

from __future__ import annotations

import platform
import re
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    import torch

Moment: TypeAlias = "float | torch.cuda.Event"


class DeviceClock:
    """Marks moments of a device's work without waiting for them, and tells the times between them afterwards.

    Args:
        device: Without one, work is done when the call that does it returns, as it is on a CPU.
        waits: Work is done when the call returns on this device, too, and its times are the host's.
    """

    def __init__(self, device: torch.device | None = None, *, waits: bool = False) -> None:
        self._computes = device if device is not None and device.type == "cuda" else None
        self.device = None if waits else self._computes  # that is asked for the time
        self._last: Moment = 0.0

    @property
    def name(self) -> str:
        """The device's."""
        if self._computes is None:
            return cpu_name()
        import torch

        return str(torch.cuda.get_device_name(self._computes))

    @property
    def runs_behind(self) -> bool:
        """Whether the host may be done with a piece of work before the device is."""
        return self.device is not None

    def mark(self) -> Moment:
        """The moment when the device has done all that it has been given so far."""
        if self.device is None:
            return time.perf_counter()
        import torch

        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.device))
        return event

    def wait(self) -> None:
        """Wait until the device has done all that it has been given."""
        if self.device is not None:
            import torch

            torch.cuda.synchronize(self.device)

    def stay_close(self) -> None:
        """Called after each piece of work: lets the host be one ahead of the device, to keep it busy, and no more."""
        if self.device is None:
            return
        if not isinstance(self._last, float):
            self._last.synchronize()
        self._last = self.mark()

    def passed(self, moment: Moment) -> bool:
        """Whether the device has come to a moment yet."""
        return isinstance(moment, float) or bool(moment.query())  # type: ignore[no-untyped-call]

    def seconds(self, marks: Sequence[Moment]) -> list[float]:
        """The time from each mark to the next; waits for the last."""
        self.wait()
        return [between(before, after) for before, after in pairwise(marks)]

    def time(self, work: Callable[[], object], calls: int) -> list[float]:
        """Seconds of each of so many calls, one right after the other."""
        self.wait()
        marks = [self.mark()]
        for _ in range(calls):
            work()
            marks.append(self.mark())
        return self.seconds(marks)


def between(before: Moment, after: Moment) -> float:
    """Seconds from one moment to another, both of which have passed."""
    if isinstance(before, float):
        assert isinstance(after, float)
        return after - before
    assert not isinstance(after, float)
    return float(before.elapsed_time(after)) / 1000


def cpu_name() -> str:
    """The processor's."""
    cpuinfo = Path("/proc/cpuinfo")
    named = re.search(r"^model name\s*: (.*)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else None
    return named[1] if named else platform.processor() or platform.machine()
