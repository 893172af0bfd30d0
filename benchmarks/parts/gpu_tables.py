"""What was measured, as tables."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from parts.gpu_record import load, of

Measures = list[dict[str, Any]]
Row = tuple[str, ...]

# sgl-project/sglang, pull request 18764: one H100, 512x512, 64 prompts
PUBLISHED = (
    ("Z-Image", "4", "0.377 -> 0.395", "+4.8%", "-21.9%"),
    ("FLUX.1-dev", "4", "0.496 -> 0.538", "+8.5%", "-8.4%"),
    ("Qwen-Image-2512", "4", "0.488 -> 0.633", "+29.7%", "-31.8%"),
    ("Z-Image", "12", "", "+13.4%", "+9.0%"),
    ("FLUX.1-dev", "12", "", "+11.5%", "+5.9%"),
    ("Qwen-Image-2512", "12", "", "+50.2%", "-15.0%"),
)


def show_part(console: Console, folder: Path, part: str) -> bool:
    """Print the tables of a part, and what went wrong; whether anything did."""
    entries = load(folder, part)
    shows: dict[str, Callable[[Console, dict[str, Any]], None]] = {
        "card": _card,
        "steps": _steps,
        "burst": _bursts,
        "offload": _offload,
    }
    shows[part](console, {model: entry["measures"] for model, entry in entries.items()})
    failed = False
    for model, entry in entries.items():
        if entry["state"] != "done":
            console.print(f"[bold red]{part} {model}: {entry['state']}: {entry.get('error', '')}", highlight=False)
            failed = failed or entry["state"] == "failed"
        for m in entry["measures"]:
            if "error" in m:
                console.print(f"[bold red]{part} {model}, {_name(m)}: {m['error']}", highlight=False)
                failed = True
            if "skipped" in m:
                console.print(f"{part} {model}, {_name(m)}: left out, {m['skipped']}", highlight=False)
    return failed


def _name(measure: dict[str, Any]) -> str:
    known = ("size", "batch", "concurrency", "batching", "in_flight", "dtype", "of", "way")
    return " ".join([measure["measure"], *(f"{k} {measure[k]}" for k in known if k in measure)])


def _print(console: Console, title: str, columns: Sequence[str], rows: Sequence[Row]) -> None:
    if not rows:
        return
    table = Table(title=title, title_justify="left", title_style="bold")
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def _card(console: Console, measures: dict[str, Measures]) -> None:
    own = measures.get("card", [])
    rows = [(f"copy, {m['way']}", f"{m['gb_per_second']:.0f} GB/s") for m in of(own, "copy")]
    rows += [
        (f"{kind}, {m['of']}, {m['dtype']}", f"{m['tflops']:.0f} TFLOP/s")
        for kind in ("matrix", "attention")
        for m in of(own, kind)
    ]
    _print(console, "The card", ("what", "at most"), rows)


def _steps(console: Console, measures: dict[str, Measures]) -> None:
    for model, own in measures.items():
        rows = list(_step_rows(own))
        columns = ("size", "pictures", "ms", "diffusers", "compiled", "times", "times", "TFLOP/s", "of the matrix rate")
        _print(console, f"{model}: a step, milliseconds, unguided, and how many times faster ours is", columns, rows)
        _print(
            console,
            f"{model}: how far predictions are apart",
            ("what", "depth", "precision", "largest", "relative", "values' size"),
            [
                (what, m["depth"], m["dtype"], *(f"{d[k]:.2e}" for k in ("max_abs", "relative", "reference_rms")))
                for m in of(own, "parity")
                for what, d in m["differences"].items()
            ],
        )
    stages = ("encode", "denoise", "decode")
    _print(
        console,
        "Seconds an image, alone",
        ("model", "size", "steps", "guided", "all", *stages),
        [
            (
                *(model, _size(m), str(m["steps"]), "yes" if m["guided"] else "no", f"{m['seconds']:.2f}"),
                *(f"{m[f'{stage}_seconds']:.3f}" for stage in stages),
            )
            for model, own in measures.items()
            for m in of(own, "image")
        ],
    )
    _print(
        console,
        "What a server finds at its start; beside: a step with a decoding beside it, over one after the other",
        ("model", "pictures that a step pays", "host", "whatever is in it", "a thousand tokens", "beside"),
        [
            (
                *(model, ", ".join(f"{knee} at {size}" for size, knee in m["knees"].items())),
                *(f"{m[key]:.2f} ms" for key in ("host_ms", "base_ms", "ms_per_thousand_tokens")),
                f"{m['beside']:.2f}",
            )
            for model, own in measures.items()
            for m in of(own, "costs")
        ],
    )


def _step_rows(measures: Measures) -> Iterator[Row]:
    compiled = {(_size(m), m["batch"]): m["ms"] for m in of(measures, "compiled")}
    for m in sorted(of(measures, "step"), key=lambda m: (m["size"], m["batch"])):
        fast = compiled.get((_size(m), m["batch"]))
        yield (
            *(_size(m), str(m["batch"]), f"{m['ms']:.1f}", f"{m['diffusers_ms']:.1f}"),
            f"{fast:.1f}" if fast else "",
            f"{m['times_faster']:.2f}",
            f"{fast / m['ms']:.2f}" if fast else "",
            *(f"{m['tflops']:.0f}", f"{m['matrix_share']:.0%}"),
        )


def _bursts(console: Console, measures: dict[str, Measures]) -> None:
    rows: list[Row] = []
    for model, own in measures.items():
        found = {(m["concurrency"], m["batching"]): m for m in of(own, "burst")}
        for concurrency in sorted({concurrency for concurrency, _ in found}):
            for batching in ("off", "on"):
                m, off = found.get((concurrency, batching)), found.get((concurrency, "off"))
                if m:
                    rows.append((model, str(concurrency), batching, *_burst(m, off if batching == "on" else None)))
    columns = ("model", "concurrency", "batching", "done", "req/s", "Δ", "mean, s", "P99, s", "Δ", "jobs a step", "GiB")
    kinds = {(m["size"], m["steps"]) for own in measures.values() for m in of(own, "burst") if "qps" in m}
    told = "; ".join(
        f"{size}, {f'{steps} steps' if steps else 'steps as the models have them'}" for size, steps in kinds
    )
    _print(console, f"A burst of requests, {told}", columns, rows)
    if rows:
        title = (
            "For reference: SGLang-Diffusion on an H100 (its #18764), batching off -> on, steps as the models have them"
        )
        _print(console, title, ("model", "concurrency", "req/s", "Δ", "P99 Δ"), PUBLISHED)


def _burst(m: dict[str, Any], off: dict[str, Any] | None) -> Row:
    def delta(name: str) -> str:
        return f"{m[name] / off[name] - 1:+.1%}" if off and off[name] and m[name] else ""

    def told(name: str, digits: int, scale: float = 1.0) -> str:
        return "" if m[name] is None else f"{m[name] * scale:.{digits}f}"

    return (
        *(f"{m['completed']}/{m['requests']}", told("qps", 3), delta("qps")),
        *(told("latency_mean", 2), told("latency_p99", 2), delta("latency_p99")),
        *(told("jobs_per_step", 1), told("peak_memory_mb", 1, 1 / 1024)),
    )


def _offload(console: Console, measures: dict[str, Measures]) -> None:
    rows = [
        (
            *(model, _size(m), str(m["in_flight"]), f"{m['ms'] / 1000:.3f}", f"{m['ms'] / 1000 / m['in_flight']:.3f}"),
            *(f"{m['gb_per_second']:.1f}", f"{m['peak_memory_mb'] / 1024:.1f}" if "peak_memory_mb" in m else ""),
        )
        for model, own in measures.items()
        for m in of(own, "step")
    ]
    columns = ("model", "size", "in flight", "s a step", "s a picture's step", "GB/s", "GiB on the device")
    _print(console, "Blocks out of the CPU's memory", columns, rows)


def _size(measure: dict[str, Any]) -> str:
    return "x".join(map(str, measure["size"]))
