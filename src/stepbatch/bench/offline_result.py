"""What ``bench offline`` measures, as it is kept and as a table for the terminal."""

from __future__ import annotations

from collections import Counter
from typing import Any, Literal

import msgspec

from stepbatch.bench.report.table import DIVIDER, WIDTH, number

Row = tuple[str, float | str | None]  # label and value; None leaves the row out

MOST_ERRORS = 5  # different ones that are shown


class Figures(msgspec.Struct, kw_only=True):
    """What a run came to."""

    duration: float  # seconds, from the first request to the last picture
    requests: int
    images: int
    failed_images: int
    images_per_second: float
    megapixels_per_second: float
    steps: int  # each of as many jobs as were in it
    steps_per_second: float
    job_steps_per_second: float
    jobs_per_step: float
    encode_seconds: float  # of the device's time, as the next two
    denoise_seconds: float
    decode_seconds: float
    other_seconds: float
    step_ms_mean: float | None = None
    step_ms_median: float | None = None
    step_ms_p99: float | None = None
    peak_memory_mb: float
    operations_per_image: float | None = None  # in denoising
    tflops: float | None = None  # achieved in denoising
    matrix_tflops: float | None = None  # of a large multiplication in the model's precision
    matrix_share: float | None = None


class OfflineResult(msgspec.Struct, kw_only=True):
    """Everything that was measured."""

    kind: Literal["offline"] = "offline"
    environment: dict[str, Any]  # versions and machine
    device: dict[str, Any]
    options: dict[str, Any]  # the flags
    model: dict[str, Any]  # what it says of itself
    work: dict[str, str]  # digests of its parts, as of ``bench serving``
    figures: Figures  # of the run with the median throughput
    repeats: list[Figures]
    errors: dict[str, int]  # message -> how many images it cost, in all repeats


def render(result: OfflineResult) -> str:
    """The table, in the form of that of ``bench serving``; lines of text without one at the end."""
    sections = (_subject(result), _throughput(result.figures), _stages(result.figures), _hardware(result.figures))
    lines = [f"{' Offline Benchmark Result ':=^{WIDTH}}"]
    for i, rows in enumerate(sections):
        lines += ["-" * DIVIDER] * (i > 0)
        lines += [f"{label + ':':<40} {_told(value):<15}".rstrip() for label, value in rows if value is not None]
    lines += [f"{count:>6} x {message}" for message, count in Counter(result.errors).most_common(MOST_ERRORS)]
    return "\n".join([*lines, "-" * WIDTH])


def _told(value: float | str) -> str:
    return value if isinstance(value, str) else number(value)


def _subject(result: OfflineResult) -> list[Row]:
    return [
        ("Model", result.model["id"]),
        ("Device", result.device["device"]),
        ("Precision", result.model["dtype"]),
        ("Dataset", result.options["dataset"]),
    ]


def _throughput(figures: Figures) -> list[Row]:
    return [
        ("Benchmark duration (s)", figures.duration),
        ("Requests", str(figures.requests)),
        ("Successful images", f"{figures.images}/{figures.images + figures.failed_images}"),
        ("Image throughput (images/s)", figures.images_per_second),
        ("Megapixel throughput (MP/s)", figures.megapixels_per_second),
        ("Job step throughput (steps/s)", figures.job_steps_per_second),
        ("Step throughput (steps/s)", figures.steps_per_second),
        ("Jobs per step", figures.jobs_per_step),
    ]


def _stages(figures: Figures) -> list[Row]:
    return [
        ("Encode Time (s)", figures.encode_seconds),
        ("Denoise Time (s)", figures.denoise_seconds),
        ("Decode Time (s)", figures.decode_seconds),
        ("Other Time (s)", figures.other_seconds),
        ("Step Time Mean (ms)", figures.step_ms_mean),
        ("Step Time Median (ms)", figures.step_ms_median),
        ("Step Time P99 (ms)", figures.step_ms_p99),
    ]


def _hardware(figures: Figures) -> list[Row]:
    share, operations = figures.matrix_share, figures.operations_per_image
    return [
        ("Operations per image (TFLOP)", None if operations is None else operations / 1e12),
        ("Achieved in denoising (TFLOP/s)", figures.tflops),
        ("Measured matrix rate (TFLOP/s)", figures.matrix_tflops),
        ("Share of the matrix rate", None if share is None else f"{share:.1%}"),
        ("Peak Memory (MB)", figures.peak_memory_mb),
    ]
