"""A profile in words and tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import median

from stepbatch.bench.profile.knees import Knee, errors, knees
from stepbatch.bench.profile_file import ProfileFile
from stepbatch.engine.cost import LinearCost, StepCost

WIDTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64)
PIXELS = 1 << 20  # a megapixel, about


def render(profile: ProfileFile) -> str:
    """What was measured, the curve through it, and what that means for each size; lines of text."""
    at = knees(profile)
    blocks = (
        _points(profile, at),
        _terms(profile.costs.step),
        _others(profile),
        _table(profile, at),
        _said(profile, at),
    )
    return "\n\n".join("\n".join(block) for block in blocks)


def _points(profile: ProfileFile, at: Sequence[Knee]) -> Iterator[str]:
    frames = profile.model.defaults.num_frames
    of = f" of videos of {frames} frames" if frames else ""
    yield f"{profile.name} on {profile.device}, {profile.dtype}: {len(profile.points)} steps{of}"
    yield f"{'size':>12}{'jobs':>6}{'tokens':>9}{'measured':>12}{'the curve':>12}{'off by':>9}"
    for knee in at:
        for point, error in zip(knee.points, errors(profile.costs.step, knee.points), strict=True):
            curve = profile.costs.step.seconds(point.tokens, point.squares)
            yield (
                f"{knee.size:>12}{point.jobs:>6}{point.tokens:>9}{duration(point.seconds):>12}{duration(curve):>12}"
                f"{error:>+9.1%}"
            )
    off = [abs(error) for error in errors(profile.costs.step, profile.points)]
    yield f"the curve is off by {median(off):.1%} at the median, by {max(off):.1%} at the most"


def _terms(cost: StepCost) -> Iterator[str]:
    yield "A step takes"
    yield f"{duration(cost.base):>12}  whatever is in it"
    yield f"{duration(cost.per_token):>12}  for each token, or {duration(1000 * cost.per_token)} for a thousand"
    square = duration(1e6 * cost.per_square)
    yield f"{square:>12}  for a million of each sequence's tokens squared: attention, in sequences of 1,000"
    if cost.host:
        yield f"{duration(cost.host):>12}  at least: the host launches it no faster"
    if cost.streamed:
        yield f"{duration(cost.streamed):>12}  at least: weights are brought over"
    if cost.factors:
        bends = ", ".join(f"x{factor:.2f} at {round(2**tokens)}" for tokens, factor in cost.factors)
        yield f"bent, as the machine has it, by tokens in the step: {bends}"


def _others(profile: ProfileFile) -> Iterator[str]:
    costs = profile.costs
    yield f"A prompt takes {duration(costs.prompt.of(1))} to encode, without a cache."
    for what, cost in (("An input image", costs.image), (f"Decoding a {_output(profile)}", costs.decode)):
        if cost != LinearCost():
            yield f"{what} takes {duration(cost.each)} and {duration(cost.per_unit * PIXELS)} a megapixel."
    if costs.beside:
        yield "Outputs are decoded beside steps: the two take less than one after the other."
    if costs.step_memory.each:
        memory = costs.step_memory.each / 2**30, costs.step_memory.per_unit * 1000 / 2**20
        yield f"Memory: {memory[0]:.1f} GiB, and {memory[1]:.1f} MiB for a thousand tokens of a step."


def _table(profile: ProfileFile, at: Sequence[Knee]) -> Iterator[str]:
    cost = profile.costs.step
    yield "Work a second in steps of so many jobs, of the most that any width brings:"
    yield f"{'size':>12}{'knee':>6} |" + "".join(f"{width:>6}" for width in WIDTHS)
    for knee in at:
        rates = {width: knee.rate(cost, width) for width in range(1, WIDTHS[-1] + 1)}
        best = max(rates.values())
        yield f"{knee.size:>12}{knee.width:>6} |" + "".join(f"{rates[width] / best:>6.0%}" for width in WIDTHS)


def _said(profile: ProfileFile, at: Sequence[Knee]) -> Iterator[str]:
    cost = profile.costs.step
    for knee in at:
        alone, wide = knee.seconds(cost, 1), knee.seconds(cost, knee.width)
        if knee.width == 1:
            yield f"At {knee.size} a step pays 1 job: it takes {duration(alone)}, and in a wider one jobs only wait."
            continue
        gain = knee.rate(cost, knee.width) / knee.rate(cost, 1)
        yield (
            f"At {knee.size} a step pays up to {knee.width} jobs: one takes {duration(alone)}, {knee.width} take "
            f"{duration(wide)}, which is {gain:.2f} times the {_output(profile)}s a second."
        )


def _output(profile: ProfileFile) -> str:
    return "video" if profile.model.makes_videos else "picture"


def duration(seconds: float) -> str:
    """A time of three digits in the unit that suits it."""
    for unit, each in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= 0.9995 * each:
            return f"{seconds / each:.3g} {unit}" if seconds < 999.5 * each else f"{seconds / each:.0f} {unit}"
    return f"{seconds / 1e-9:.3g} ns" if seconds else "0 s"
