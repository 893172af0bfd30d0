"""What the card itself can do: the ceilings that everything else is held against."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from parts.gpu_record import Record, Task
from stepbatch.bench.hardware import about, best_seconds, copy_rate, matrix_rate
from stepbatch.models.loading import choose_device

CPU = torch.device("cpu")
SHAPES = {  # rows, and columns in and out, of multiplications: [m, k] x [k, n]
    "8192 x 8192 x 8192": (8192, 8192, 8192),
    "a 1024x1024 picture's rows, feed-forward of width 3072": (4608, 3072, 12288),
    "a 512x512 picture's": (1536, 3072, 12288),
    "eight 512x512 pictures'": (12288, 3072, 12288),
}
ATTENTION = {"1024x1024": (1, 24, 4608, 128), "8 of 512x512": (8, 24, 1536, 128)}  # batch, heads, tokens, width
PRECISE = (4096, 4096, 4096)  # in fp32


def run(task: Task, record: Record) -> None:
    """Measure copies, multiplications and attention."""
    device = choose_device(task.device)
    accelerated = device.type == "cuda"
    with record.measuring("device") as values:
        values |= about(device)
    record.add("copy", way="within the device, read and written", gb_per_second=copy_rate(device, device) / 1e9)
    if accelerated:
        for way, source, target in (("to the device", CPU, device), ("from the device", device, CPU)):
            for kind, pinned in (("pinned", True), ("pageable", False)):
                with record.measuring("copy", way=f"{way}, {kind}") as values:
                    values["gb_per_second"] = copy_rate(source, target, pinned) / 1e9
    half = torch.bfloat16
    for name, shape in (SHAPES if accelerated else {"512 x 512 x 512": (512, 512, 512)}).items():
        with record.measuring("matrix", of=name, dtype="bfloat16") as values:
            values["tflops"] = matrix_rate(device, half, shape) / 1e12
    with record.measuring(
        "matrix", of="4096 x 4096 x 4096" if accelerated else "512 x 512 x 512", dtype="float32"
    ) as values:
        values["tflops"] = matrix_rate(device, torch.float32, PRECISE if accelerated else (512, 512, 512)) / 1e12
    for name, shape in (ATTENTION if accelerated else {"1 of 64x64": (1, 2, 64, 32)}).items():
        with record.measuring("attention", of=name, dtype="bfloat16") as values:
            values["tflops"] = attention_rate(device, half, shape) / 1e12


def attention_rate(device: torch.device, dtype: torch.dtype, shape: tuple[int, int, int, int]) -> float:
    """Operations a second of attention within sequences of this shape: batch, heads, tokens, width of a head."""
    query, key, value = (torch.randn(shape, device=device).to(dtype) for _ in range(3))
    batch, heads, tokens, width = shape
    seconds = best_seconds(device, lambda: F.scaled_dot_product_attention(query, key, value))
    return 4 * batch * heads * tokens**2 * width / seconds
