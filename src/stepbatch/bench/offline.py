"""``stepbatch bench offline``: requests through the engine in this process, without a server.

All requests are there at the start, and the engine batches them as its flags say. Times of stages and steps are the
device's own. What a step computes is counted of each kind of request, in a step that it takes alone: packed with
others, it is the same.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import torch
from PIL import Image
from rich.console import Console
from rich.progress import Progress

from stepbatch.bench.environment import environment
from stepbatch.bench.hardware import about, count_operations, matrix_rate
from stepbatch.bench.offline_result import Figures, OfflineResult, render
from stepbatch.bench.options import DatasetOptions, LoadOptions, OfflineOptions, ReportOptions, RequestOptions, told
from stepbatch.bench.report.summary import spread
from stepbatch.bench.results import check_writable, make_folder, save
from stepbatch.bench.workload.work import WorkItem, build, digest
from stepbatch.config import EngineConfig
from stepbatch.engine.backends import load_runner
from stepbatch.engine.clock import DeviceClock, Moment
from stepbatch.engine.engine import Engine, Runner, Tick
from stepbatch.engine.messages import Failure, FromEngine, Output, Stats, Submit
from stepbatch.engine.meter import Encoded
from stepbatch.engine.runner import TorchRunner
from stepbatch.errors import InvalidValue, OptionError, RequestError, SetupError
from stepbatch.image_files import read_picture
from stepbatch.models.base import is_edit
from stepbatch.request import FIELDS, IMAGE_FIELDS, GenerationRequest, Job

PACKAGES = ("torch", "diffusers", "transformers")
STAGES = ("encode", "denoise", "decode")
MAX_PIXELS = 1 << 28  # of an input image: it is the user's own


@dataclass(frozen=True)
class Unit:
    """What the runner did at a time."""

    stage: str
    requests: tuple[str, ...]  # of its jobs
    seconds: float


class TimedRunner:
    """A runner whose units of work are timed.

    Args:
        runner: Computes.
        clock: Its device's.
    """

    def __init__(self, runner: Runner, clock: DeviceClock) -> None:
        self.runner = runner
        self.info = runner.info
        self.whole_calls = runner.whole_calls
        self.clock = clock
        self._done: list[tuple[str, tuple[str, ...], tuple[Moment, Moment]]] = []

    def check(self, request: GenerationRequest) -> None:
        self.runner.check(request)

    def lengths(self, request: GenerationRequest) -> tuple[int, ...]:
        return self.runner.lengths(request)

    def signature(self, request: GenerationRequest) -> Hashable | None:
        return self.runner.signature(request)

    def shares(self, request: GenerationRequest) -> bool:
        return self.runner.shares(request)

    def encode(self, jobs: Sequence[Job]) -> Encoded:
        with self._timed("encode", jobs):
            return self.runner.encode(jobs)

    def denoise(self, jobs: Sequence[Job], tick: Tick) -> None:
        with self._timed("denoise", jobs):
            self.runner.denoise(jobs, tick)

    def decode(self, jobs: Sequence[Job], seconds: float = math.inf) -> list[bytes | RequestError | None]:
        with self._timed("decode", jobs):
            return self.runner.decode(jobs, seconds)

    def decode_beside(self, jobs: Sequence[Job]) -> list[bytes | RequestError | None]:
        with self._timed("decode", jobs):
            return self.runner.decode_beside(jobs)

    def forget(self, job: Job) -> None:
        self.runner.forget(job)

    def peak_memory_mb(self) -> float:
        return self.runner.peak_memory_mb()

    def memory_budget(self) -> float:
        return self.runner.memory_budget()

    def streamed_seconds(self) -> float:
        return self.runner.streamed_seconds()

    def free_memory(self) -> None:
        self.runner.free_memory()

    def units(self) -> list[Unit]:
        """What has been done so far, in order; waits for it."""
        return [Unit(stage, requests, self.clock.seconds(marks)[0]) for stage, requests, marks in self._done]

    @contextmanager
    def _timed(self, stage: str, jobs: Sequence[Job]) -> Iterator[None]:
        before = self.clock.mark()
        yield
        self._done.append((stage, tuple(job.request_id for job in jobs), (before, self.clock.mark())))


@dataclass(eq=False)
class Run:
    """What became of some requests."""

    keep_pixels: bool = False
    seconds: float = 0.0
    units: list[Unit] = field(default_factory=list)
    outputs: list[Output] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    peak_memory_mb: float = 0.0

    def take(self, message: FromEngine) -> None:
        """Keep what counts of a message of the engine's."""
        match message:
            case Output():
                self.outputs.append(message if self.keep_pixels else msgspec.structs.replace(message, pixels=b""))
            case Failure():
                self.failures.append(message)
            case Stats(peak_memory_mb=peak):
                self.peak_memory_mb = peak

    @property
    def widths(self) -> list[int]:
        """Jobs in each step."""
        return [len(unit.requests) for unit in self.units if unit.stage == "denoise"]

    def stage(self, name: str) -> list[float]:
        """Seconds of each of a stage's units."""
        return [unit.seconds for unit in self.units if unit.stage == name]


def run_offline(
    engine: EngineConfig,
    dataset: DatasetOptions,
    wanted: RequestOptions,
    offline: OfflineOptions,
    report: ReportOptions,
) -> int:
    """Measure, print a table, and write what ``report`` asks for; 1 if a request failed.

    Raises:
        SetupError: it can't be done as asked.
    """
    if report.output_file:
        check_writable(Path(report.output_file))
    folder = make_folder(report.save_outputs)
    items = build(dataset, wanted)
    requests = [to_request(item, index) for index, item in enumerate(items, start=1)]
    runner = load_runner(engine)
    for request in requests[: offline.warmup_requests]:
        measure(fresh(runner, engine), engine, [request])
    if device_of(runner).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device_of(runner))
    progress = Progress(console=Console(stderr=True), transient=True, disable=report.disable_tqdm)
    runs = [Run(keep_pixels=folder is not None) for _ in range(offline.repeats)]
    with progress:
        for run in runs:
            measure(fresh(runner, engine), engine, requests, run, progress)
    repeats = _figures_of(runs, requests, runner)
    result = OfflineResult(
        environment=environment(PACKAGES),
        device=about(device_of(runner)),
        options=told(engine.model, engine.batching, engine.memory, engine.defaults, dataset, wanted, offline),
        model=msgspec.to_builtins(runner.info),
        work=digest(items, LoadOptions()),
        figures=sorted(repeats, key=lambda figures: figures.images_per_second)[(len(repeats) - 1) // 2],
        repeats=repeats,
        errors=dict(Counter(failure.message for run in runs for failure in run.failures)),
    )
    print(render(result))
    if report.output_file:
        save(result, Path(report.output_file))
    if folder:
        _save_pictures(runs[-1].outputs, folder)
    return 1 if result.errors else 0


def to_request(item: WorkItem, number: int) -> GenerationRequest:
    """An item of the work as the engine takes it; errors call it by its ``number``.

    Raises:
        OptionError: the engine can't take it.
    """
    if item.is_video:
        raise OptionError(f"bench offline makes images and can't do --task {item.task}")
    for name in item.extra:
        if name not in FIELDS or name in IMAGE_FIELDS:
            raise OptionError(f"--extra-body: {name} is not a field of the engine's requests that JSON could give")
    given = ("prompt", "width", "height", "num_inference_steps", "guidance_scale", "n", "seed")
    fields: dict[str, Any] = {name: getattr(item, name) for name in given} | item.extra
    try:
        images = [read_picture(image.data, MAX_PIXELS, image.name, "images").on_white() for image in item.images]
        return GenerationRequest(**fields, images=tuple(images))
    except InvalidValue as error:
        raise OptionError(f"request {number}: {error.message}") from error


def device_of(runner: Runner) -> torch.device:
    """Where a runner computes."""
    return runner.model.device if isinstance(runner, TorchRunner) else torch.device("cpu")


def fresh(runner: Runner, config: EngineConfig) -> Runner:
    """The same model in a runner that has encoded nothing yet."""
    return TorchRunner(runner.model, config.memory) if isinstance(runner, TorchRunner) else load_runner(config)


def measure(
    runner: Runner,
    config: EngineConfig,
    requests: Sequence[GenerationRequest],
    run: Run | None = None,
    progress: Progress | None = None,
) -> Run:
    """Run requests to their ends, all of them there at the start.

    Args:
        runner: Has nothing to do yet.
        config: The batching limits are read here.
        requests: Each is called by its place, ``"0"`` the first, in what is returned.
        run: What to write into.
        progress: Shows how far it is.
    """
    run, clock = run or Run(), DeviceClock(device_of(runner))
    timed = TimedRunner(runner, clock)
    engine = Engine(timed, config.undelayed(), emit=run.take)
    bar = progress.add_task("images", total=sum(request.n for request in requests)) if progress else None
    clock.wait()
    began = time.monotonic()
    for index, request in enumerate(requests):
        engine.submit(Submit(str(index), request, list(range(request.n)), began))
    while not engine.idle:
        time.sleep(engine.step())
        if progress and bar is not None:
            progress.update(bar, completed=len(run.outputs) + len(run.failures))
    clock.wait()
    run.seconds = time.monotonic() - began
    run.units = timed.units()
    return run


def operations_of(runner: TorchRunner, request: GenerationRequest) -> int:
    """How many operations a denoising step of a resolved request takes.

    Args:
        runner: Has nothing to do.
        request: Is encoded, and takes a step.
    """
    job = Job("counted", 0, request, runner.lengths(request), 0.0)
    runner.encode([job])
    operations = count_operations(lambda: runner.denoise([job], lambda step, steps: None))
    runner.forget(job)
    return operations


def operations_of_all(
    runner: TorchRunner, requests: Sequence[GenerationRequest], outputs: Sequence[Output]
) -> dict[str, int]:
    """How many operations a step takes, by request, of those with an output; of each kind, one is counted."""
    model, of_kind = runner.model, dict[object, int]()
    counted = {}
    for name in {output.request_id for output in outputs}:
        request = requests[int(name)].resolve(model.info)
        lengths = tuple(prompt.length for prompt in model.prompts(request))
        kind = request.size, lengths, tuple(model.image_sizes(request)) if is_edit(request) else ()
        if kind not in of_kind:
            of_kind[kind] = operations_of(runner, request)
        counted[name] = of_kind[kind]
    return counted


def _figures_of(runs: Sequence[Run], requests: Sequence[GenerationRequest], runner: Runner) -> list[Figures]:
    if not isinstance(runner, TorchRunner):
        return [sum_up(run, len(requests), {}, None) for run in runs]
    operations = operations_of_all(runner, requests, [output for run in runs for output in run.outputs])
    try:
        rate = matrix_rate(runner.model.device, getattr(torch, runner.info.dtype))
    except torch.OutOfMemoryError:  # the model fills the device
        rate = None
    return [sum_up(run, len(requests), operations, rate) for run in runs]


def sum_up(run: Run, requests: int, operations: Mapping[str, int], rate: float | None) -> Figures:
    """The figures of a run.

    Args:
        run: What was measured.
        requests: How many there were.
        operations: What a job's step takes, by request, as far as that is known.
        rate: Operations a second of a large multiplication, if that is known.
    """
    encode, denoise, decode = (sum(run.stage(name)) for name in STAGES)
    steps, images = spread([1000 * seconds for seconds in run.stage("denoise")]), len(run.outputs)
    done = sum(operations.get(name, 0) for unit in run.units if unit.stage == "denoise" for name in unit.requests)
    return Figures(
        duration=run.seconds,
        requests=requests,
        images=images,
        failed_images=len(run.failures),
        images_per_second=images / run.seconds,
        megapixels_per_second=sum(output.width * output.height for output in run.outputs) / 1e6 / run.seconds,
        steps=len(run.widths),
        steps_per_second=len(run.widths) / run.seconds,
        job_steps_per_second=sum(run.widths) / run.seconds,
        jobs_per_step=statistics.fmean(run.widths) if run.widths else 0.0,
        encode_seconds=encode,
        denoise_seconds=denoise,
        decode_seconds=decode,
        other_seconds=run.seconds - encode - denoise - decode,
        step_ms_mean=steps.mean,
        step_ms_median=steps.median,
        step_ms_p99=steps.p99,
        peak_memory_mb=run.peak_memory_mb,
        operations_per_image=done / images if done and images else None,
        tflops=done / denoise / 1e12 if done else None,
        matrix_tflops=rate / 1e12 if rate else None,
        matrix_share=done / denoise / rate if done and rate else None,
    )


def _save_pictures(outputs: Sequence[Output], folder: Path) -> None:
    try:
        for output in outputs:
            picture = Image.frombytes("RGB", (output.width, output.height), output.pixels)
            picture.save(folder / f"{output.request_id}-{output.index}.png")
    except OSError as error:
        raise SetupError(f"--save-outputs: can't write to {folder}: {error.strerror or error}") from error
