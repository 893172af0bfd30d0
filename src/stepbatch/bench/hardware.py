"""What a device can do at most, measured: its rates of multiplying and copying.

torch is imported where it is used, so that whoever imports this without need of it does without it.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

from stepbatch.engine.clock import DeviceClock

if TYPE_CHECKING:
    import torch

Shape: TypeAlias = tuple[int, int, int, int]

ROUNDS = 5  # of which the best counts
ROUND_SECONDS = 0.05  # what a round takes at least, about, so that what it takes to begin doesn't count
SQUARE = {"cuda": 8192, "cpu": 1024}  # rows and columns of the matrices that are multiplied
COPIED = {"cuda": 1 << 30, "cpu": 256 << 20}  # bytes: well over any cache
DRIVER = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.draw", "power.limit", "temperature.gpu")


def best_seconds(device: torch.device, work: Callable[[], object]) -> float:
    """Seconds of a call, in the best of several rounds of many calls without a break."""
    clock = DeviceClock(device)
    once = min(clock.time(work, 3)[1:])  # the first sets things up
    calls = max(1, round(ROUND_SECONDS / max(once, 1e-6)))
    return min(sum(clock.time(work, calls)) / calls for _ in range(ROUNDS))


def matrix_rate(device: torch.device, dtype: torch.dtype, shape: tuple[int, int, int] | None = None) -> float:
    """Operations a second of multiplying random ``[m, k]`` and ``[k, n]``; large and square without a ``shape``."""
    import torch

    m, k, n = shape or (SQUARE.get(device.type, SQUARE["cpu"]),) * 3
    a, b = (torch.randn(rows, columns, device=device).to(dtype) for rows, columns in ((m, k), (k, n)))
    out = torch.empty(m, n, dtype=dtype, device=device)
    return 2 * m * k * n / best_seconds(device, lambda: torch.mm(a, b, out=out))


def copy_rate(source: torch.device, target: torch.device, pinned: bool = True) -> float:
    """Bytes a second that a copy moves; within one device, those read and those written.

    Args:
        source: Where the bytes are.
        target: Where they go.
        pinned: Whether the CPU's memory is page-locked where the other side is a CUDA device.
    """
    import torch

    device = target if source.type == "cpu" else source
    size = COPIED.get(device.type, COPIED["cpu"])
    locked = pinned and device.type == "cuda"
    a, b = (
        torch.empty(size, dtype=torch.uint8, device=where, pin_memory=locked and where.type == "cpu").fill_(1)
        for where in (source, target)
    )
    moved = 2 * size if source == target else size
    return moved / best_seconds(device, lambda: b.copy_(a, non_blocking=True))


def count_operations(work: Callable[[], object]) -> int:
    """How many operations the multiplications, convolutions and attentions of ``work`` take: two for each product."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    def attention(query: Shape, key: Shape, value: Shape, *_: object, **__: object) -> int:
        batch, heads, queries, width = query
        return 2 * batch * heads * queries * key[2] * (width + value[3])

    uncounted = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # the one that torch has no formula for
    with FlopCounterMode(display=False, custom_mapping={uncounted: attention}) as counter:
        work()
    return int(counter.get_total_flops())


def about(device: torch.device) -> dict[str, Any]:
    """The device's name, and of a CUDA device its size and what its driver tells: clocks in MHz, power in W, °C."""
    if device.type != "cuda":
        return {"device": str(device)}
    import torch

    properties = torch.cuda.get_device_properties(device)
    return {
        "device": properties.name,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "multiprocessors": properties.multi_processor_count,
        "capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda,
        **_driver(f"GPU-{properties.uuid}"),
    }


def _driver(gpu: str) -> dict[str, str]:
    command = ["nvidia-smi", f"--id={gpu}", f"--query-gpu={','.join(DRIVER)}", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):  # not every machine with such a device has it
        return {}
    values = [value.strip() for value in said.split(",")]
    return dict(zip(DRIVER, values, strict=True)) if len(values) == len(DRIVER) else {}
