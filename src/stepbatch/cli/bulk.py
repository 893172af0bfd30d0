"""Any number of requests through an engine in this process: a window of them at a time, resumable."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from stepbatch.cli.requests import Item, Source
from stepbatch.config import EngineConfig
from stepbatch.engine.engine import Engine, Runner
from stepbatch.engine.messages import Failure, FromEngine, Output, Submit
from stepbatch.engine.messages import Progress as Steps
from stepbatch.engine.warmup import remembered
from stepbatch.engine.width import WIDEST
from stepbatch.errors import OptionError, RequestError, SetupError
from stepbatch.request import GenerationRequest
from stepbatch.server.images import encode_image
from stepbatch.video_files import write_mp4

AHEAD = 2  # widest steps' worth of pictures that are in the engine or being written
QUALITY = 95  # of jpeg and webp
SHOWN_ERRORS = 5


def generate_all(
    source: Source, folder: Path, output_format: str | None, config: EngineConfig, video: bool = False
) -> int:
    """Make every output of ``source`` that isn't in ``folder`` yet; returns 1 if any failed, else 0.

    Args:
        output_format: Of pictures; png without it. Videos are mp4.
        video: The outputs are to be videos.

    Raises:
        SetupError: the model can't be loaded, makes something else, or the folder can't be written.
    """
    from stepbatch.engine.backends import load_runner

    console = Console(stderr=True)
    with console.status("loading the model"):
        runner = load_runner(config)
    if video and not runner.info.makes_videos:
        raise OptionError(f"--video: {runner.info.id} makes pictures")
    if output_format and runner.info.makes_videos:
        raise OptionError(f"--output-format is for pictures: {runner.info.id} makes videos, which are mp4")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        logging.basicConfig(handlers=[logging.FileHandler(folder / "errors.log", delay=True)])
        results = Results(folder, "mp4" if runner.info.makes_videos else output_format or "png")
        with bars(console) as progress:
            bulk = Bulk(source, results, runner, config, progress)
            bulk.run()
    except OSError as error:
        raise SetupError(f"can't write to {folder}: {error.strerror or error}") from error
    console.print(f"{bulk.made} made, {bulk.skipped} there already, {bulk.failed} failed; they are in {folder}")
    return 1 if bulk.failed else 0


def bars(console: Console) -> Progress:
    """Progress bars that show counts and the time left."""
    columns = (TextColumn("{task.description:9}"), BarColumn(None), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console)


class Results:
    """A folder of outputs, with ``results.jsonl`` that tells what made each and ``errors.jsonl`` of the last run."""

    def __init__(self, folder: Path, output_format: str) -> None:
        self.folder = folder
        self.output_format = output_format
        self._table, self._errors = folder / "results.jsonl", folder / "errors.jsonl"
        self._errors.unlink(missing_ok=True)
        self._done = dict(self._read())  # file -> digest of its request
        self._end_torn_line()

    def has(self, item: Item, count: int, digest: str) -> bool:
        """Whether all ``count`` pictures of this very request are there."""
        files = [self.file(item.name, index) for index in range(count)]
        return all(self._done.get(file) == digest and (self.folder / file).exists() for file in files)

    def file(self, name: str, index: int) -> str:
        """The name of a picture's file."""
        return f"{name}-{index}.{self.output_format}"

    def write(self, output: Output, digest: str, prompt: str, fps: int | None) -> None:
        """Write a picture, or a video of ``fps``, then its line: a file that has a line is whole."""
        file = self.file(output.request_id, output.index)
        part = self.folder / f".{file}.part"
        video: dict[str, int] = {}
        if fps is not None:
            write_mp4(part, output, fps)
            video = {"num_frames": output.frames, "fps": fps}
        else:
            part.write_bytes(encode_image(output, self.output_format, QUALITY))
        os.replace(part, self.folder / file)
        times = {name: round(seconds, 6) for name, seconds in msgspec.to_builtins(output.times).items()}
        size = f"{output.width}x{output.height}"
        line = {"id": output.request_id, "index": output.index, "file": file, "prompt": prompt}
        _append(self._table, {**line, "seed": output.seed, "size": size, **video, "times": times, "digest": digest})

    def fail(self, name: str, index: int, error: Failure | RequestError) -> None:
        """Write down what failed, and why."""
        line = {"id": name, "index": index, "code": error.code, "message": error.message, "param": error.param}
        _append(self._errors, line)

    def _read(self) -> Iterator[tuple[str, str]]:
        if self._table.exists():
            with self._table.open(encoding="utf-8") as lines:
                for line in lines:
                    with suppress(ValueError, KeyError):  # a line that was cut off: its picture is made again
                        value = json.loads(line)
                        yield value["file"], value["digest"]

    def _end_torn_line(self) -> None:
        if self._table.exists() and self._table.stat().st_size:
            with self._table.open("rb+") as file:
                file.seek(-1, os.SEEK_END)
                if file.read() != b"\n":
                    file.write(b"\n")


class Bulk:
    """One run: feeds the engine, and takes what comes out of it.

    Args:
        source: The requests.
        results: Where pictures and errors go.
        runner: Computes.
        config: How wide a step may be.
        progress: Shows how far it is.
    """

    def __init__(
        self, source: Source, results: Results, runner: Runner, config: EngineConfig, progress: Progress
    ) -> None:
        self.source = source
        self.results = results
        self.info = runner.info
        self.engine = Engine(runner, config.undelayed(), self._on_message, costs=remembered(runner, config))
        self.window = AHEAD * (config.batching.dynamic_batch_max_size or WIDEST)
        self.progress = progress
        self.made = self.skipped = self.failed = 0
        self._open: dict[tuple[str, int], tuple[str, GenerationRequest]] = {}  # outputs in the engine, with digests
        self._writing: list[Future[None]] = []
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="writer")  # one: the tables are written in order
        self._bars: dict[str, TaskID] = {}

    def run(self) -> None:
        """Make everything that isn't there yet.

        Raises:
            OSError: a file can't be written.
        """
        outputs = steps = 0
        for item in self._items():
            if isinstance(item.request, RequestError):
                continue
            outputs += item.request.n
            steps += item.request.n * self._steps(item.request)
        kind = "videos" if self.info.makes_videos else "pictures"
        self._bars = {"outputs": self.progress.add_task(kind, total=outputs)}
        self._bars["steps"] = self.progress.add_task("steps", total=steps)
        with self._writer:
            items = self._items()
            while self._feed(items) or not self.engine.idle:
                time.sleep(self.engine.step())
                self._reap()
            self._reap(wait=True)

    def _items(self) -> Iterator[Item]:
        return (item.timed(self.info) for item in self.source)

    def _feed(self, items: Iterator[Item]) -> bool:
        """Submit requests until the window is full; returns whether there is something to step."""
        while len(self._open) + len(self._writing) < self.window or self.engine.idle:
            self._reap(wait=len(self._writing) >= self.window)
            item = next(items, None)
            if item is None:
                break
            self._take(item)
        return not self.engine.idle

    def _take(self, item: Item) -> None:
        request = item.request
        if isinstance(request, RequestError):
            self._on_failure(item.name, 0, request)
            return
        digest = item.digest(self.info.id, self.results.output_format)
        if self.results.has(item, request.n, digest):
            self.skipped += request.n
            self._advance("outputs", request.n)
            self._advance("steps", request.n * self._steps(request))
            return
        indices = list(range(request.n))
        self._open.update({(item.name, index): (digest, request) for index in indices})
        self.engine.submit(Submit(item.name, request, indices, time.monotonic()))

    def _steps(self, request: GenerationRequest) -> int:
        """How many steps each output of a request takes."""
        with suppress(RequestError):  # it will fail when its turn comes
            if request.images:  # then they may be fewer than asked for
                return request.resolve(self.info).steps
        return request.num_inference_steps or self.info.defaults.num_inference_steps

    def _on_message(self, message: FromEngine) -> None:
        if isinstance(message, Output):
            digest, request = self._open.pop((message.request_id, message.index))
            fps = request.fps or self.info.defaults.fps if self.info.makes_videos else None
            self._writing.append(self._writer.submit(self.results.write, message, digest, request.prompt, fps))
            self.made += 1
            self._advance("outputs", 1)
        elif isinstance(message, Failure):
            del self._open[message.request_id, message.index]
            self._on_failure(message.request_id, message.index, message)
            self._advance("outputs", 1)
        elif isinstance(message, Steps):
            self._advance("steps", sum(self._counts(*job) for job in message.jobs))

    def _counts(self, name: str, index: int, step: int, steps: int) -> bool:
        """Whether a step is one of those that were counted on; some noise schedules of diffusers take more."""
        known = self._open.get((name, index))
        return known is not None and step <= self._steps(known[1])

    def _on_failure(self, name: str, index: int, error: Failure | RequestError) -> None:
        self.failed += 1
        if self.failed <= SHOWN_ERRORS:
            self.progress.console.print(f"{name}: {error.message}", markup=False, highlight=False)
        self.results.fail(name, index, error)

    def _advance(self, bar: str, count: int) -> None:
        self.progress.advance(self._bars[bar], count)

    def _reap(self, wait: bool = False) -> None:
        """Let go of what has been written, and raise what went wrong with it."""
        done = self._writing if wait else [future for future in self._writing if future.done()]
        for future in done:
            future.result()
        self._writing = [] if wait else [future for future in self._writing if future not in done]


def _append(path: Path, line: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line, ensure_ascii=False) + "\n")
