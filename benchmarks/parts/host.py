"""What the engine adds to the model: against a bare loop on the same work, and per step in milliseconds."""

from __future__ import annotations

import copy
import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from parts.common import (
    MIXED_SIZES,
    SEED,
    Case,
    Effort,
    Figure,
    alternate,
    equal_requests,
    make_request,
    ratio,
    threads,
    timed,
    with_batching,
)
from stepbatch.config import EngineConfig, ModelConfig
from stepbatch.engine.engine import Engine, Runner
from stepbatch.engine.messages import FromEngine, Submit, encode
from stepbatch.engine.runner import TorchRunner
from stepbatch.models.base import Embedding, Model, PackedSequence
from stepbatch.models.noise_schedule import euler_step
from stepbatch.request import MAX_STEPS, GenerationRequest
from stepbatch.testing import FakeRunner

WIDTH = 8  # jobs a step of the bare loop
WIDE = 1 << 20  # tokens: no limit
RUNNING = 16
RAMP = 20  # steps until as many jobs run as may
LONG = MAX_STEPS  # so many steps that no job ends while it is measured


@torch.inference_mode()
def bare_loop(model: Model, requests: Sequence[GenerationRequest]) -> list[bytes]:
    """The least that does the work: groups of ``WIDTH`` requests, guided and with as many steps, packed once each."""
    prompts = {prompt.key: prompt for request in requests for prompt in model.prompts(request)}
    embeddings = dict(zip(prompts, model.encode(list(prompts.values())), strict=True))
    pictures = []
    for i in range(0, len(requests), WIDTH):
        pictures += _bare_group(model, requests[i : i + WIDTH], embeddings)
    return pictures


def _bare_group(model: Model, requests: Sequence[GenerationRequest], embeddings: dict[Any, Embedding]) -> list[bytes]:
    starts = [model.start(request, request.seed or 0, []) for request in requests]
    counts = [len(start.latents) for start in starts]
    latents = torch.cat([start.latents for start in starts])
    sigmas = torch.stack([start.schedule.sigmas for start in starts])  # [J, steps + 1]
    rows = torch.arange(len(requests)).repeat_interleave(torch.tensor(counts))
    scale = torch.tensor([model.scale(request) for request in requests])[rows, None]
    sequences, at = [], 0
    for i, (request, count) in enumerate(zip(requests, counts, strict=True)):
        for branch, prompt in enumerate(model.prompts(request)):
            sequences.append(PackedSequence(i, branch, slice(at, at + count), request, embeddings[prompt.key]))
        at += count
    layout = model.layout(sequences)
    twice = [count for count in counts for _ in range(2)]
    for step in range(sigmas.shape[1] - 1):
        parts = torch.split(model.denoise(layout, latents, sigmas[:, step]), twice)
        velocity = model.guide(torch.cat(parts[::2]), torch.cat(parts[1::2]), scale)
        change = sigmas[rows, step + 1, None] - sigmas[rows, step, None]
        latents = euler_step(latents, velocity, change)
    return [
        model.decode(part, request).mul(255).round().to(torch.uint8).numpy().tobytes()
        for request, part in zip(requests, torch.split(latents, counts), strict=True)
    ]


def engine_against_bare(model: Model, config: EngineConfig, effort: Effort) -> list[Case]:
    """Throughput of the engine over that of the bare loop, with the loop's own grouping and with the default limits."""
    rng = random.Random(SEED)
    sizes = sorted(MIXED_SIZES * effort.loop_groups, key=lambda size: size[0] * size[1])
    mixed = [make_request(model.info, rng, size, effort.loop_steps, 3.0) for size in sizes]
    equal = equal_requests(model.info, WIDTH * effort.loop_groups, effort.loop_steps)
    with threads(1):
        return [
            _against("128x128", model, config, equal, effort),
            _against("mixed sizes", model, config, mixed, effort),
        ]


def _against(
    name: str, model: Model, config: EngineConfig, requests: Sequence[GenerationRequest], effort: Effort
) -> Case:
    same = with_batching(
        config,
        dynamic_batch_max_size=WIDTH,
        max_encodes_per_step=WIDTH,
        max_decodes_per_step=WIDTH,
        max_batch_tokens=WIDE,
    )
    works = {
        "bare": timed(lambda: bare_loop(model, requests)),
        "engine": timed(lambda: Engine(TorchRunner(model), same).generate(requests)),
        "engine, default limits": timed(lambda: Engine(TorchRunner(model), config).generate(requests)),
    }
    seconds = alternate(works, effort.loop_repeats)
    figures = [
        Figure("same groups", ratio(seconds["bare"], seconds["engine"]), at_least=0.95),
        Figure("default limits", ratio(seconds["bare"], seconds["engine, default limits"])),
    ]
    return Case(name, figures, seconds, {"jobs": len(requests), "steps": effort.loop_steps, "threads": 1})


class Stopwatch:
    """Sums the seconds spent inside the functions that it has wrapped."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*args)
            finally:
                self.seconds += time.perf_counter() - began

        return call

    def watch(self, thing: Any, *verbs: str) -> Any:
        """A copy of ``thing`` with some of its methods wrapped."""
        watched = copy.copy(thing)
        for verb in verbs:
            setattr(watched, verb, self.wrap(getattr(thing, verb)))
        return watched


def host_time(model: Model, effort: Effort) -> list[Case]:
    """Milliseconds of a step that aren't the model's, with ``RUNNING`` jobs in it and many more waiting."""
    fake, real = Stopwatch(), Stopwatch()
    fake_runner = fake.watch(FakeRunner(ModelConfig(backend="fake", fake_step_ms=0.0)), "denoise")
    verbs = ("encode", "start", "denoise", "decode")
    with threads(1):
        return [
            _host_case("engine alone", fake_runner, fake, LONG, effort.host_steps, effort.waiting),
            _host_case(
                "with the runner, same jobs as in the last step",
                TorchRunner(real.watch(model, *verbs)),
                real,
                LONG,
                effort.host_steps // 4,
                effort.waiting,
            ),
            _host_case(
                "with the runner, one leaves and one joins in every step",
                TorchRunner(real.watch(model, *verbs)),
                real,
                RUNNING,
                effort.host_steps // 4,
                effort.waiting,
            ),
        ]


def _encode(message: FromEngine) -> None:
    encode(message)  # for the socket: it is part of what a step costs


def _host_case(name: str, runner: Runner, watch: Stopwatch, steps: int, count: int, waiting: int) -> Case:
    limits = with_batching(
        EngineConfig(), dynamic_batch_max_size=RUNNING, max_encodes_per_step=1, max_batch_tokens=WIDE
    )
    engine = Engine(runner, limits, emit=_encode)
    rng = random.Random(SEED)
    leaving = 0 if steps == LONG else RAMP + count
    for i in range(RUNNING + waiting + leaving):
        request = make_request(runner.info, rng, (128, 128), steps, 3.0)
        engine.submit(Submit(str(i), request, [0], float(i)))
    for _ in range(RAMP):
        engine.step()
    outside, inside = [], []
    for _ in range(count):
        watch.seconds = 0.0
        seconds = timed(engine.step)()
        assert engine.stats.jobs_in_step == RUNNING
        outside.append(seconds - watch.seconds)
        inside.append(watch.seconds)
    milliseconds = 1000 * statistics.median(outside)
    settings = {"running": RUNNING, "waiting": engine.stats.waiting, "threads": 1}
    return Case(name, [Figure("ms a step", milliseconds, at_most=1.0)], {"outside": outside, "model": inside}, settings)
