"""A wide step against its parts: the same jobs' steps, each as a batch of one."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import count, product

from parts.common import MIXED_SIZES, SEED, Case, Effort, Figure, alternate, make_request, ratio, threads, timed, told
from stepbatch.engine.runner import TorchRunner
from stepbatch.models.base import Model
from stepbatch.request import MAX_STEPS, Job

SIZES = {"128x128": ((128, 128),), "256x256": ((256, 256),), "mixed": MIXED_SIZES}


def wide_against_parts(model: Model, effort: Effort, progress: Callable[[str], None]) -> list[Case]:
    """How many times longer the parts take together than the wide step, for every mixture and width."""
    cases = []
    for thread_count, guided, sizes in product(effort.threads, (False, True), SIZES):
        progress(f"steps: {told(thread_count)}, {'guided' if guided else 'unguided'}, {sizes}")
        with threads(thread_count):
            cases += [_case(model, effort, thread_count, guided, sizes, jobs) for jobs in effort.step_jobs]
    return cases


def _case(model: Model, effort: Effort, thread_count: int, guided: bool, sizes: str, jobs: int) -> Case:
    wide, parts = _steps(model, sizes, guided, jobs)
    wide(), parts()  # lays out the batches, which a step whose members stay does not
    least, most = effort.step_repeats
    seconds = alternate({"parts": timed(parts), "wide": timed(wide)}, least, most, effort.step_seconds)
    # a batch of one is its own part: that case only shows how well the same thing agrees with itself
    figure = Figure("parts / wide", ratio(seconds["parts"], seconds["wide"]), at_least=1.0 if jobs > 1 else None)
    name = f"{told(thread_count)}, {'guided' if guided else 'unguided'}, {sizes}, {jobs} jobs"
    return Case(name, [figure], seconds, {"threads": thread_count, "guided": guided, "sizes": sizes, "jobs": jobs})


def _steps(model: Model, sizes: str, guided: bool, width: int) -> tuple[Callable[[], None], Callable[[], None]]:
    """A step of all jobs at once, and a step of each; runners of their own keep every batch packed between steps."""
    rng = random.Random(SEED)
    ids = count()
    available = SIZES[sizes]

    def job(i: int, runner: TorchRunner) -> Job:
        size = available[i % len(available)]
        request = make_request(model.info, rng, size, MAX_STEPS, 3.0 if guided else 0.0)
        made = Job(str(next(ids)), 0, request, runner.lengths(request), 0.0)
        runner.encode([made])
        return made

    together = TorchRunner(model)
    jobs = [job(i, together) for i in range(width)]
    alone = [(runner, [job(i, runner)]) for i, runner in enumerate(TorchRunner(model) for _ in range(width))]

    def parts() -> None:
        for runner, one in alone:
            runner.denoise(one, lambda step, steps: None)

    return lambda: together.denoise(jobs, lambda step, steps: None), parts
