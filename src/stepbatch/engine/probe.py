"""What a loaded model costs on its device, measured before the first request comes.

Made-up requests go through the runner as real ones would: a few sizes, alone and in company, a few steps of each. What
says most comes first, and what was measured so far says whether there is time for the next.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import count
from statistics import median

import msgspec

from stepbatch.engine.clock import DeviceClock
from stepbatch.engine.cost import Costs
from stepbatch.engine.engine import Engine, Runner
from stepbatch.engine.fitting import Sample, StepSample, fit_linear, fit_step
from stepbatch.engine.measured import MIXED, Measured, StepPoint
from stepbatch.engine.memory import tokens_within
from stepbatch.engine.meter import Encoded
from stepbatch.engine.width import WIDEST, best_width
from stepbatch.errors import RequestError
from stepbatch.image import InputImage
from stepbatch.model_info import ModelInfo
from stepbatch.request import GenerationRequest, Job
from stepbatch.sizes import of_area

PROMPT = "a lighthouse on a cliff above the sea at dusk, seen from a boat"
WIDTHS = (1, 2, 4, 8, 16)
SCALES = (1 / 4, 1 / 2, 1.0, 2.0)  # of the default's sides
MOST_DEFAULTS = 4  # so many jobs' worth of the default's tokens in a step, of every size
STEPS = 5  # of each size and width, of which the first doesn't count, unless the others were disturbed more
DISTURBED = 1.5  # times what the first took, that is more than a machine's usual ups and downs
STEPS_SHARE = 0.7  # of the time there is, for steps; the rest is for encoding and decoding
SHARE = 0.05  # of the time there is, beyond which a size and width takes no third step
CALL_STEPS = (2, 4)  # of whole calls, whose difference is what steps take
STRENGTH = 0.6  # of image-to-image
LOOKS, STRANGE = 2, 0.1  # how often a step that the straight curve misses by more is tried again
SHORTEST = 1e-6  # seconds: nothing takes no time
TURNS = 2  # of steps with a decoding before them, and of steps with one beside them
PROMPTS = 3  # that are encoded, the first of which doesn't count


def probe(runner: Runner, seconds: float, sizes: Sequence[tuple[int, int]] = ()) -> Measured:
    """Measure what a model costs.

    Args:
        runner: Has nothing to do.
        seconds: That it may take, about; one step is taken in any case.
        sizes: Width and height, pixels, of what is tried; without any, some from small to over the model's default.
    """
    return _Probe(runner, seconds).run(sizes)


class _Peak:
    """The most memory that a CUDA device holds for something."""

    def __init__(self, clock: DeviceClock) -> None:
        self.device = clock.device

    def begin(self) -> int:
        """Returns how many bytes are held now."""
        if self.device is None:
            return 0
        import torch

        torch.cuda.reset_peak_memory_stats(self.device)
        return torch.cuda.memory_allocated(self.device)

    def bytes(self) -> int:
        """Since the beginning; nothing where it isn't known."""
        if self.device is None:
            return 0
        import torch

        return torch.cuda.max_memory_allocated(self.device)


class _Probe:
    """One round of measuring."""

    def __init__(self, runner: Runner, seconds: float) -> None:
        self.runner = runner
        self.info = runner.info
        self.share = SHARE * seconds
        self.began = time.monotonic()
        self.until = self.began + seconds
        self.measured = Measured()
        self.peak = _Peak(runner.clock)
        self._names = count()
        self._steps_tried: dict[tuple[tuple[int, int], ...], StepSample] = {}  # by the sizes of their jobs

    def run(self, sizes: Sequence[tuple[int, int]]) -> Measured:
        requests = [request for size in sizes or _sizes(self.info) if (request := self._request(size))]
        if not self.runner.whole_calls:
            Engine.attempt(self._stream)
            for request in requests[:1]:
                self._encode_prompts(request)
        for request, jobs in self._plan(requests):
            self._try([request] * jobs)
        if not self.runner.whole_calls:
            for copies in (1, 2):
                self._try(requests * copies)
        for _ in range(LOOKS if self._steps_tried else 0):
            self._look_again()
        self._take_down()
        if not self.runner.whole_calls:
            if requests and self.runner.clock.runs_behind:
                self._try_beside(min(requests, key=lambda request: abs(request.pixels - self._usual_pixels)))
            for request in requests:
                self._encode_image(request)
        self.measured.seconds = time.monotonic() - self.began
        return self.measured

    def _plan(self, requests: Sequence[GenerationRequest]) -> Iterator[tuple[GenerationRequest, int]]:
        """What is tried, in order: sizes up to the usual one alone, and then wider steps and larger sizes."""
        usual = min((self._tokens(r) for r in requests if r.pixels >= self._usual_pixels), default=0)
        usual = usual or max(map(self._tokens, requests), default=0)
        tried = [(request, jobs) for request in requests for jobs in WIDTHS if jobs == 1 or self.runner.shares(request)]
        within = [one for one in tried if self._tokens(one[0]) * one[1] <= MOST_DEFAULTS * usual or one[1] == 1]
        within.sort(key=lambda one: (one[1] > 1 or self._tokens(one[0]) > usual, self._tokens(one[0]) * one[1]))
        yield from within
        of_usual = [one for one in within if self._tokens(one[0]) == usual]
        if of_usual and not self.runner.whole_calls and self.runner.shares(of_usual[-1][0]):
            yield from self._wider(*of_usual[-1])

    def _wider(self, request: GenerationRequest, jobs: int) -> Iterator[tuple[GenerationRequest, int]]:
        """Steps of one size twice as wide as the last, as long as that pays by what was measured so far.

        Far beyond what was measured it may be quite different, and many may wait on the first day.
        """
        one = self._tokens(request), sum(n * n for n in self.runner.lengths(request))
        memory = Costs(step_memory=fit_linear(self.measured.step_memory))
        room = tokens_within(memory, self.runner.memory_budget(), request.pixels)
        while 2 * jobs <= WIDEST and 2 * jobs * one[0] <= room and (request.size,) * jobs in self._steps_tried:
            if best_width(fit_step(list(self._steps_tried.values())), *one) <= jobs:
                return
            jobs *= 2
            yield request, jobs

    @property
    def _usual_pixels(self) -> int:
        defaults = self.info.defaults
        return defaults.width * defaults.height * (defaults.num_frames or 1)

    def _tokens(self, request: GenerationRequest) -> int:
        return sum(self.runner.lengths(request))

    def _fits(self, jobs: Sequence[Job]) -> bool:
        """Whether there is time for two steps, with what the largest that was measured says, and for decoding."""
        if not self._steps_tried:
            return True
        most = max(self._steps_tried.values(), key=lambda step: step.squares)
        steps = sum(CALL_STEPS) if self.runner.whole_calls else 2
        times = max(1.0, sum(job.squares for job in jobs) / most.squares)
        return time.monotonic() + steps * most.seconds * times < self.began + STEPS_SHARE * (self.until - self.began)

    def _try(self, requests: Sequence[GenerationRequest]) -> None:
        """A step of a job of each of these requests, if there is time."""
        jobs = [self._job(request, index) for index, request in enumerate(requests)]
        if not jobs or not self._fits(jobs):
            return
        try:
            take = self._call if self.runner.whole_calls else self._steps
            if Engine.attempt(partial(take, jobs)):  # what the model can't do says nothing
                self.runner.free_memory()
        finally:
            for job in jobs:
                self.runner.forget(job)

    def _steps(self, jobs: Sequence[Job]) -> None:
        """A few steps of these jobs; then, of a job that is alone, what decoding it takes."""
        self.runner.encode(jobs)
        self.peak.begin()
        took: list[float] = []
        for number in range(min(STEPS, jobs[0].steps)):
            members = jobs[::-1] if number % 2 else jobs  # packed anew, as when others come and go
            took += self.runner.clock.time(partial(self._launch, members), 1)
            for job in jobs:
                job.step += 1
            if (len(took) > 1 and sum(took) > self.share) or time.monotonic() > self.until:
                break
        self._note(jobs, _usual(took))
        self.measured.step_memory.append(Sample(size=sum(job.tokens for job in jobs), cost=self.peak.bytes()))
        if len(jobs) == 1:
            self._decode(jobs)

    def _launch(self, jobs: Sequence[Job]) -> None:
        """A step, and how long the host was at it; the device has nothing to do before."""
        began = time.perf_counter()
        self.runner.denoise(jobs, _silent)
        if self.runner.clock.runs_behind:
            self.measured.host = min(time.perf_counter() - began, self.measured.host or math.inf)

    def _decode(self, jobs: Sequence[Job]) -> None:
        pixels = jobs[0].pixels
        if not self._affords(self.measured.decodes, pixels, 1):
            return
        held = self.peak.begin()
        took = self.runner.clock.time(lambda: self.runner.decode(jobs), 1)
        if took[0] < self.share:  # once more, as the first sets things up
            took = self.runner.clock.time(lambda: self.runner.decode(jobs), 2)
        self.measured.decodes.append(Sample(size=pixels, cost=median(took)))
        self.measured.decode_memory.append(Sample(size=pixels, cost=max(0, self.peak.bytes() - held)))

    def _try_beside(self, request: GenerationRequest) -> None:
        if Engine.attempt(partial(self._beside, request)):
            self.runner.free_memory()

    def _beside(self, request: GenerationRequest) -> None:
        """A step, with an output decoded before it and with one decoded beside it."""
        if not self._affords(self.measured.decodes, request.pixels, 2 * 2 * TURNS):
            return
        done, running = self._job(request, 0), self._job(request, 1)
        took: dict[bool, list[float]] = {False: [], True: []}
        try:
            self.runner.encode([done, running])
            for turn in range(2 * TURNS):
                beside = turn % 2 == 1
                took[beside] += self.runner.clock.time(partial(self._both, done, running, beside), 1)
        finally:
            for job in (done, running):
                self.runner.forget(job)
        self.measured.beside = min(took[True]) / min(took[False])

    def _both(self, done: Job, running: Job, beside: bool) -> None:
        decode = self.runner.decode_beside if beside else self.runner.decode
        pictures = decode([done])
        self.runner.denoise([running], _silent)
        if pictures == [None]:
            self.runner.decode([done])

    def _affords(self, known: Sequence[Sample], pixels: int, times: int) -> bool:
        """Whether there is time to do so often what took so long of other sizes."""
        expected = max((sample.cost * max(1.0, pixels / sample.size) for sample in known), default=0.0)
        return time.monotonic() + times * expected < self.until

    def _call(self, jobs: Sequence[Job]) -> None:
        """Two whole calls: what more steps take is the steps', and the rest is called decoding."""
        few, more = CALL_STEPS
        took: list[float] = []
        for steps in CALL_STEPS:
            of = [self._job(replace(job.request, num_inference_steps=steps), job.index) for job in jobs]
            if not self._steps_tried and not took:
                self._draw(of)  # the first sets things up
            took.append(self._draw(of))
        each = max((took[1] - took[0]) / (more - few), took[1] / more / 10)
        self._note(jobs, each)
        rest = max(0.0, took[1] - more * each) / len(jobs)
        self.measured.decodes.append(Sample(size=jobs[0].pixels, cost=rest))

    def _draw(self, jobs: Sequence[Job]) -> float:
        """Seconds of a whole call."""
        self.runner.encode(jobs)
        took = self.runner.clock.time(lambda: self.runner.denoise(jobs, _silent), 1)
        for job in jobs:
            self.runner.forget(job)
        return took[0]

    def _note(self, jobs: Sequence[Job], seconds: float) -> None:
        """Take down a step; of the same step twice, the quicker."""
        requests = tuple(job.request.size for job in jobs)
        known = self._steps_tried.get(requests)
        seconds = min(max(seconds, SHORTEST), known.seconds if known else math.inf)
        tokens, squares = sum(job.tokens for job in jobs), sum(job.squares for job in jobs)
        self._steps_tried[requests] = StepSample(tokens=tokens, squares=squares, seconds=seconds)

    def _take_down(self) -> None:
        for sizes, step in self._steps_tried.items():
            (width, height), jobs = sizes[0], len(sizes)
            if len(set(sizes)) > 1:
                self.measured.mixed.append(msgspec.structs.replace(step, weight=MIXED))
                continue
            self.measured.points.append(
                StepPoint(
                    width=width,
                    height=height,
                    jobs=jobs,
                    tokens=step.tokens,
                    squares=step.squares,
                    seconds=step.seconds,
                )
            )

    def _look_again(self) -> None:
        """Measure anew what the curve doesn't explain: if something else was running, it may be over now."""
        straight = msgspec.structs.replace(fit_step(list(self._steps_tried.values())), factors=())
        for sizes, step in list(self._steps_tried.items()):
            if abs(straight.seconds(step.tokens, step.squares) / step.seconds - 1) > STRANGE:
                self._try([request for size in sizes if (request := self._request(size))])

    def _encode_prompts(self, request: GenerationRequest) -> None:
        took: list[float] = []
        for number in range(PROMPTS):
            if took and time.monotonic() + took[-1] > self.until:
                break
            job = self._job(replace(request, prompt=f"{PROMPT}, number {number}"), 0)
            took += [seconds / max(1, made.prompts) for seconds, made in self._encode(job)]
        self.measured.prompts += took[1:] or took

    def _encode_image(self, request: GenerationRequest) -> None:
        """What an image takes, if the model takes any."""
        known = self.measured.images or self.measured.decodes
        if not self._steps_tried or not self._affords(known, request.pixels, 2):
            return
        took: list[float] = []
        for shade in (50, 100):
            image = _grey(*request.size, shade)
            try:
                edit = self._with_image(request, image)
                self.runner.check(edit)
            except RequestError:
                return
            took += [seconds for seconds, _ in self._encode(self._job(edit, 0))]
        if len(took) == 2:  # the first doesn't count
            self.measured.images.append(Sample(size=request.pixels, cost=took[1]))

    def _encode(self, job: Job) -> list[tuple[float, Encoded]]:
        """The seconds that it took, and what was made in them; nothing where it couldn't be done."""
        took: list[float] = []
        made: list[Encoded] = []
        work = partial(self.runner.clock.time, lambda: made.append(self.runner.encode([job])), 1)
        error = Engine.attempt(lambda: took.extend(work()))
        self.runner.forget(job)
        if error:
            self.runner.free_memory()
        return list(zip(took, made, strict=False))

    def _stream(self) -> None:
        self.measured.streamed = self.runner.streamed_seconds()

    def _with_image(self, request: GenerationRequest, image: InputImage) -> GenerationRequest:
        """The same request about an image; raises ``RequestError`` where the model takes none."""
        if {"editing", "image-to-video"}.intersection(self.info.tasks):
            return replace(request, images=(image,)).resolve(self.info)
        return replace(request, images=(image,), strength=STRENGTH).resolve(self.info)

    def _request(self, size: tuple[int, int]) -> GenerationRequest | None:
        """A resolved request of this size, if the model can serve one."""
        request = GenerationRequest(prompt=PROMPT, width=size[0], height=size[1], seed=0)
        try:
            if not {"text-to-image", "text-to-video"}.intersection(self.info.tasks):
                request = self._with_image(request, _grey(*size, 0))
            request = request.resolve(self.info)
            self.runner.check(request)
        except RequestError:
            return None
        return request

    def _job(self, request: GenerationRequest, index: int) -> Job:
        lengths, signature = self.runner.lengths(request), self.runner.signature(request)
        return Job(f"probe-{next(self._names)}", index, request, lengths, 0.0, signature=signature)


def _sizes(info: ModelInfo) -> list[tuple[int, int]]:
    """Sizes that are tried where nobody says, ascending: the default's proportions, as far as the model goes."""
    width, height = info.defaults.width, info.defaults.height
    least, most = info.min_side / min(width, height), info.max_side / max(width, height)
    scales = [min(max(scale, least), most) for scale in SCALES]
    sizes = {of_area(width, height, round(width * height * scale**2), info.size_multiple) for scale in scales}
    return sorted(sizes, key=lambda size: size[0] * size[1])


def _usual(seconds: Sequence[float]) -> float:
    """Of equal steps, what those after the first take, unless most of them were disturbed, which the first shows."""
    usual = median(seconds[1:] or seconds)
    return seconds[0] if seconds[0] * DISTURBED < usual else usual


def _grey(width: int, height: int, shade: int) -> InputImage:
    return InputImage(width, height, bytes([shade]) * (3 * width * height))


def _silent(step: int, steps: int) -> None:
    """Nobody is told of a probe's steps."""
