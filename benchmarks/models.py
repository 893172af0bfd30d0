"""Milliseconds a step of each family, packed, beside diffusers' own pipeline on the same architecture in the same run.

Run with: python benchmarks/models.py [--models NAME ...] [--sizes WxH ...] [--batch N ...] [--small] [--device D]

Weights are random (--load-format dummy), so no checkpoint is needed. On a GPU the full-size models are run; --small,
which is always so on a CPU, shrinks them, and shows what the code around the multiplications costs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from parts.common import QUICK, Case, Effort
from parts.families import against_diffusers, load_pair, mixed_against_serial
from parts.report import environment, save, show
from stepbatch.bench.hardware import matrix_rate
from stepbatch.models.loading import choose_device
from stepbatch.sizes import parse_size

RESULTS = Path(__file__).parent / "results"
MODELS = ("FLUX.1-dev", "Qwen-Image-2512", "Z-Image-Turbo")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--models", nargs="+", default=list(MODELS), help="packaged configs")
    parser.add_argument("--sizes", nargs="+", type=parse_size, default=[(512, 512), (1024, 1024)])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 2, 4, 8])
    parser.add_argument("--small", action="store_true", help="the same architectures with hardly any width or depth")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=1, help="on a CPU")
    parser.add_argument("--quick", action="store_true", help="a little of everything, to see that it runs")
    parser.add_argument("--output", type=Path, help="where the JSON goes; without it, in results/ beside this script")
    options = parser.parse_args(arguments)
    effort = QUICK if options.quick else Effort()
    torch.set_num_threads(options.threads)
    small = options.small or choose_device(options.device).type == "cpu"
    console = Console() if sys.stdout.isatty() else Console(width=120)
    measured: dict[str, list[Case]] = {}
    rate = 0.0
    for name in options.models:
        pair = load_pair(name, options.device, small)
        rate = rate or matrix_rate(pair.ours.device, pair.dtype)
        cases = [
            against_diffusers(pair, size, batch, rate, effort) for size in options.sizes for batch in options.batch
        ]
        show(console, f"{name}: a step beside diffusers'", cases)
        mixed = mixed_against_serial(pair, options.sizes, effort)
        show(console, f"{name}: mixed sizes in one step, over each by itself", [mixed])
        measured[name] = [*cases, mixed]
        del pair
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    about = environment(", ".join(options.models), effort)
    about |= {"small": small, "threads": options.threads, "matrix_tflops": rate / 1e12}
    about["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    output = options.output or RESULTS / ("models-quick.json" if options.quick else "models.json")
    save(output, about, measured)
    console.print(f"every repeat's seconds: {output}")


if __name__ == "__main__":
    main()
