"""Which parts run, for how long, each in a process of its own."""

from __future__ import annotations

import argparse
import importlib
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import IO, get_args

import msgspec
from rich.console import Console

from parts.gpu_record import FAULTS, Part, Record, Task, close
from parts.gpu_tables import show_part
from stepbatch.bench.environment import environment
from stepbatch.sizes import parse_size

MODELS = ("FLUX.1-dev", "Qwen-Image-2512", "Z-Image-Turbo")
PARTS: tuple[Part, ...] = get_args(Part)  # the most important first
PACKAGES = ("torch", "diffusers", "transformers", "triton")
WEIGHTS = {"card": 15, "steps": 85, "burst": 75, "offload": 45}  # of the time, relative to each other
OFFLOADED = 2  # models at most: the largest, which come first
LEAST_SECONDS = 12.0  # below which no part is begun
OVERTIME, LEAST_OVERTIME = 0.4, 20.0  # of a part's time, and seconds, until it is ended
GRACE_SECONDS = 30.0  # for its end: it may have servers to stop
RESERVE_SECONDS = 5.0  # for the end of everything
SCRIPT = Path(__file__).resolve().parent.parent / "gpu.py"
RESULTS = SCRIPT.parent / "results" / "gpu"
QUICK = {
    "sizes": ((64, 64), (96, 96)),
    "batch": (1, 2),
    "burst_prompts": 6,
    "burst_steps": 2,
}


def main(arguments: Sequence[str], doc: str, began: float) -> int:
    """The command line, which ``doc`` tells of; 1 if a part failed, 2 if there is no such device.

    The budget counts from when this process ``began``, monotonic seconds.
    """
    options = _parser(doc).parse_args(arguments)
    if options.task:
        return work(msgspec.json.decode(options.task, type=Task), options.ready)
    if options.device.startswith("cuda") and not _has_cuda():
        print("gpu.py: there is no CUDA device here; --device cpu --quick shows that it runs", file=sys.stderr)
        return 2
    tasks = plan(options)
    console = Console() if sys.stdout.isatty() else Console(width=140)
    deadline = began + options.budget_seconds - RESERVE_SECONDS
    options.output.mkdir(parents=True, exist_ok=True)
    if options.in_process:
        for task in tasks:
            measure(task, _share(tasks[tasks.index(task) :], deadline - time.monotonic()))
    else:
        with (options.output / "gpu.log").open("w") as log:
            run_all(tasks, deadline, log, console)
    failed = [show_part(console, options.output, part) for part in options.parts]
    console.print(f"everything that was measured: {options.output}")
    return 1 if any(failed) else 0


def _has_cuda() -> bool:
    import torch  # here, for workers that do without

    return torch.cuda.is_available()


def _parser(doc: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="NAME")
    parser.add_argument("--models", nargs="+", default=list(MODELS), metavar="NAME", help="of packaged configs")
    parser.add_argument("--sizes", nargs="+", type=parse_size, metavar="WxH", help="(default: 512x512 1024x1024)")
    parser.add_argument("--batch", nargs="+", type=int, metavar="N", help="pictures in a step (default: 1 2 4 8)")
    parser.add_argument("--burst-prompts", type=int, metavar="N", help="requests in a burst (default: 64)")
    parser.add_argument("--burst-steps", type=int, metavar="N", help="of each of them; 0 is the model's (default: 4)")
    parser.add_argument("--budget-seconds", type=float, default=540.0, metavar="N", help="for all (default: 540)")
    parser.add_argument("--device", default="cuda", help="(default: cuda)")
    parser.add_argument("--small", action="store_true", help="the same architectures with hardly any width or depth")
    parser.add_argument("--quick", action="store_true", help="a little of everything, to see that it runs")
    parser.add_argument("--in-process", action="store_true", help="everything in this process, to debug it")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="FOLDER", help=f"(default: {RESULTS})")
    parser.add_argument("--task", default="", help=argparse.SUPPRESS)
    parser.add_argument("--ready", type=int, help=argparse.SUPPRESS)
    return parser


def plan(options: argparse.Namespace) -> list[Task]:
    """What to measure, in order."""
    given = {name: getattr(options, name) for name in ("sizes", "batch", "burst_prompts", "burst_steps")}
    values = {name: value for name, value in given.items() if value is not None}
    values = (QUICK if options.quick else {}) | {n: tuple(v) if isinstance(v, list) else v for n, v in values.items()}
    small = options.small or not options.device.startswith("cuda")  # a full-size model is nothing for a CPU
    common = {"device": options.device, "small": small, "quick": options.quick, "folder": str(options.output)}
    tasks = []
    for part in PARTS:
        models = {"card": ["card"], "offload": options.models[:OFFLOADED]}.get(part, options.models)
        tasks += [Task(part=part, model=model, **common, **values) for model in models if part in options.parts]
    return tasks


def run_all(tasks: Sequence[Task], deadline: float, log: IO[str], console: Console) -> None:
    """Measure one after another; while one measures, the next gets its imports done."""
    with ExitStack() as stack:
        coming = stack.enter_context(Worker(tasks[0], log))
        for i, task in enumerate(tasks):
            worker = coming
            if i + 1 < len(tasks):
                coming = stack.enter_context(Worker(tasks[i + 1], log))
            worker.wait_until_ready(deadline - time.monotonic())
            left = deadline - time.monotonic()
            if left < LEAST_SECONDS:
                close(task, "skipped", f"{max(0.0, left):.0f} s are left")
                continue
            seconds = _share(tasks[i:], left)
            console.print(f"[bold]{task.title}[/]: {seconds:.0f} of {left:.0f} s", highlight=False)
            worker.measure(seconds, min(left, max(seconds * (1 + OVERTIME), seconds + LEAST_OVERTIME)))


def _share(tasks: Sequence[Task], left: float) -> float:
    """The seconds of the first of the tasks that are left to do."""
    return left * WEIGHTS[tasks[0].part] / sum(WEIGHTS[task.part] for task in tasks)


class Worker:
    """A process that measures a task when it is told to. A context: at its end the process is gone.

    Args:
        task: What it measures.
        log: Takes what it writes to its standard error.
    """

    def __init__(self, task: Task, log: IO[str]) -> None:
        self.task = task
        self._log = Path(log.name)
        self._ready, ready = os.pipe()
        self._process = subprocess.Popen(
            [sys.executable, str(SCRIPT), "--task", msgspec.json.encode(task).decode(), "--ready", str(ready)],
            stdin=subprocess.PIPE,
            stderr=log,
            text=True,
            start_new_session=True,
            pass_fds=(ready,),
        )
        os.close(ready)  # the process's own is the last

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        os.close(self._ready)

    def wait_until_ready(self, timeout: float) -> None:
        """Wait until the process has imported all it needs, or has ended."""
        select.select([self._ready], [], [], max(0.0, timeout))

    def measure(self, seconds: float, limit: float) -> None:
        """Measure for so many seconds; what isn't done at the ``limit`` is ended."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it died early, which its status tells
            self._process.stdin.write(f"{seconds}\n")
            self._process.stdin.close()
        try:
            status = self._process.wait(limit)
        except subprocess.TimeoutExpired:
            self.stop()
            close(self.task, "stopped", f"it was not done after {limit:.0f} s")
            return
        if status:
            lines = [line for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
            close(self.task, "failed", f"it ended with status {status}: {lines[-1] if lines else 'it wrote nothing'}")

    def stop(self) -> None:
        """End the process, and whatever it has started."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(GRACE_SECONDS)
                break
        with suppress(BrokenPipeError):
            assert self._process.stdin is not None
            self._process.stdin.close()


def work(task: Task, ready: int) -> int:
    """A worker's life: import, close the file ``ready`` to say so, wait for the word, measure."""
    importlib.import_module(f"parts.gpu_{task.part}")
    os.close(ready)
    word = sys.stdin.readline()
    if word:  # else who started this is gone
        measure(task, float(word))
    return 0


def measure(task: Task, seconds: float) -> None:
    """Measure a task in this process and write down what comes of it."""
    run = importlib.import_module(f"parts.gpu_{task.part}").run
    record = Record(task, seconds, environment(PACKAGES))
    try:
        run(task, record)
    except FAULTS as error:
        record.fail(error)
    else:
        record.end()
