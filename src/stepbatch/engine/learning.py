"""What work costs, corrected as the engine runs, or learned from nothing.

What is measured is grouped by size into cells. A cell keeps the last few measurements of its size and answers with the
mean of their middle half, so that a spike moves nothing and a lasting change gets through within a few steps. All cells
together are fitted anew once a second of work; sizes that haven't been seen for long follow those that have.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from statistics import fmean, median

import msgspec

from stepbatch.engine.cost import UNKNOWN, Costs, LinearCost, StepCost
from stepbatch.engine.fitting import SPREAD, Sample, StepSample, fit_linear, fit_step

NOTICEABLE, STRIKING = 0.03, 0.1  # changes of predictions that are told: of most, and of any
PAUSE = 1.0  # seconds of measured work between two fits
WINDOW = 16  # measurements that a cell keeps
RIPE = 3  # of them, for a cell to count
FRESH = 500  # measurements: a cell that was seen among the last of so many knows how the machine does now
SEEN, PRIOR = 4.0, 0.1  # how much a cell counts, and what was known before where there is none
PRIOR_TOKENS = tuple(2**k for k in range(5, 18))  # where it is looked up, if it says nothing of that
PRIOR_SEQUENCES = (1, 8)  # that so many tokens are looked up as

Size = tuple[float, ...]


class _Cell:
    """The last measurements of a size, as logarithms of seconds."""

    def __init__(self, size: Size) -> None:
        self.size = size  # that all of them are brought to
        self.logs: deque[float] = deque(maxlen=WINDOW)
        self.origin: float | None = None  # what they were when the cell got ripe, less the drift of all then
        self.drift = 0.0  # of all, when it was seen last
        self.seen = 0  # how many measurements there had been then

    @property
    def log(self) -> float:
        """The mean of the middle half."""
        ordered = sorted(self.logs)
        cut = len(ordered) // 4
        return fmean(ordered[cut : len(ordered) - cut])


class _Cells:
    """The cells of one kind of work."""

    def __init__(self) -> None:
        self._cells: dict[Hashable, _Cell] = {}
        self._drift = 0.0
        self._count = 0

    def add(self, key: Hashable, size: Size, seconds: float, expected: Callable[[Size], float], known: bool) -> None:
        """Take in a measurement.

        Args:
            expected: Seconds that a size is thought to take, or anything that grows like them.
            known: Whether those are seconds; then a new cell begins with them, and can't be misled by what comes first.
        """
        cell = self._cells.get(key)
        if cell is None:
            cell = self._cells[key] = _Cell(size)
            cell.logs.extend([math.log(expected(size))] * (RIPE if known else 0))
        elif self._stale(cell):
            cell.logs = deque((log + self._drift - cell.drift for log in cell.logs), maxlen=WINDOW)
        cell.logs.append(math.log(seconds * expected(cell.size) / expected(size)))
        self._count += 1
        cell.seen, cell.drift = self._count, self._drift
        if cell.origin is None and len(cell.logs) >= RIPE:
            cell.origin = cell.log - self._drift

    def measured(self) -> Iterator[tuple[Size, float]]:
        """Sizes, and what they are found to take now, seconds."""
        ripe = [cell for cell in self._cells.values() if cell.origin is not None]
        moves = [cell.log - cell.origin for cell in ripe if cell.origin is not None and not self._stale(cell)]
        self._drift = median(moves) * len(moves) / (len(moves) + 2) if moves else self._drift
        for cell in ripe:
            yield cell.size, math.exp(cell.log + (self._drift - cell.drift if self._stale(cell) else 0.0))

    def _stale(self, cell: _Cell) -> bool:
        return self._count - cell.seen > FRESH


class Learning:
    """Corrects costs by what units of work took.

    Args:
        costs: What is known at the start.
        one_size: Whether steps of one size are enough to begin with, where nothing is known: those of others are
            thought to take as long a token.
    """

    def __init__(self, costs: Costs = UNKNOWN, one_size: bool = False) -> None:
        self.costs = costs  # as they were told last
        self._spread = 0.0 if one_size else SPREAD
        self._prior = costs
        self._steps, self._prompts, self._images, self._decodes = _Cells(), _Cells(), _Cells(), _Cells()
        self._since = 0.0  # seconds of work since the last fit

    def step(self, tokens: int, squares: int, seconds: float) -> None:
        """A denoising step of so many tokens, and squares of sequences' tokens, has taken so long."""
        key = _octave(tokens), round(math.log2(squares / tokens))
        cost, known = self.costs.step, self.costs.known
        self._steps.add(
            key, (tokens, squares), seconds, lambda s: cost.seconds(int(s[0]), int(s[1])) if known else s[0], known
        )
        self._since += seconds

    def encode(self, prompts: int, images: Sequence[int], seconds: float) -> None:
        """So many prompts, and images of so many pixels, have been encoded in so long."""
        if images:
            left = max(seconds - prompts * self.costs.prompt.each, 0.1 * seconds)
            self._pieces(self._images, self.costs.image, images, left)
        else:
            self._pieces(self._prompts, self.costs.prompt, [1] * prompts, seconds)
        self._since += seconds

    def decode(self, pixels: Sequence[int], seconds: float) -> None:
        """Outputs of so many pixels each have been decoded in so long."""
        self._pieces(self._decodes, self.costs.decode, pixels, seconds)
        self._since += seconds

    def news(self) -> Costs | None:
        """What is known now, where predictions have changed noticeably since that was told last."""
        if self._since < PAUSE:
            return None
        self._since = 0.0
        steps = list(self._steps.measured())
        spread = max((size[0] for size, _ in steps), default=0) / min((size[0] for size, _ in steps), default=1)
        if not self.costs.known and (not steps or spread < self._spread):
            return None
        found = msgspec.structs.replace(
            self.costs,
            known=True,
            step=self._fit_steps(steps) if steps else self.costs.step,
            prompt=LinearCost(each=next((seconds for _, seconds in self._prompts.measured()), self._prior.prompt.each)),
            image=_fit(self._images, self._prior.image),
            decode=_fit(self._decodes, self._prior.decode),
        )
        if self.costs.known and not self._changed(found, [size for size, _ in steps]):
            return None
        self.costs = found
        return found

    def _fit_steps(self, steps: Sequence[tuple[Size, float]]) -> StepCost:
        samples = [
            StepSample(tokens=int(n), squares=int(nn), seconds=seconds, weight=SEEN) for (n, nn), seconds in steps
        ]
        if self._prior.known:
            samples += _imagined(self._prior.step, samples)
        return fit_step(samples, self._prior.step.host, self._prior.step.streamed)

    @staticmethod
    def _pieces(cells: _Cells, cost: LinearCost, sizes: Sequence[int], seconds: float) -> None:
        """Share out the seconds of things that were done one by one."""
        known = cost.of(1) > 0
        expected = (lambda s: cost.of(s[0])) if known else (lambda s: s[0])
        whole = sum(expected((size,)) for size in sizes)
        for size in sizes:
            share = seconds * expected((size,)) / whole
            cells.add(round(math.log2(size)), (size,), share, expected, known)

    def _changed(self, found: Costs, sizes: Sequence[Size]) -> bool:
        """Whether most predictions of steps have changed noticeably, or any of anything strikingly."""
        now, told = found.step, self.costs.step
        steps = [abs(math.log(now.seconds(int(n), int(nn)) / told.seconds(int(n), int(nn)))) for n, nn in sizes]
        rest = [
            abs(now.of(size) - told.of(size)) / max(now.of(size), told.of(size))
            for now, told, cells in (
                (found.prompt, self.costs.prompt, self._prompts),
                (found.image, self.costs.image, self._images),
                (found.decode, self.costs.decode, self._decodes),
            )
            for (size,), _ in cells.measured()
        ]
        return (fmean(steps) > NOTICEABLE if steps else False) or max([*steps, *rest], default=0.0) > STRIKING


def _imagined(cost: StepCost, measured: Sequence[StepSample]) -> list[StepSample]:
    """What a known curve says where nothing was measured, as if it had been; as slow as what was measured shows."""
    taken = {_octave(sample.tokens) for sample in measured}
    places = [tokens for at, _ in cost.factors if _octave(tokens := round(2**at)) not in taken] or [
        tokens for tokens in PRIOR_TOKENS if _octave(tokens) not in taken
    ]
    scale = _scale([(sample.seconds, cost.seconds(sample.tokens, sample.squares)) for sample in measured])
    sizes = [(tokens, tokens * tokens // count) for tokens in places for count in PRIOR_SEQUENCES]
    return [
        StepSample(tokens=tokens, squares=squares, seconds=scale * cost.seconds(tokens, squares), weight=PRIOR)
        for tokens, squares in sizes
    ]


def _octave(tokens: int) -> int:
    """Which half of an octave so many tokens are in."""
    return round(2 * math.log2(tokens))


def _scale(pairs: Sequence[tuple[float, float]]) -> float:
    """By how much what is found is over what was known, where that is of all sizes and not of one alone."""
    return math.exp(median(math.log(found / known) for found, known in pairs) * len(pairs) / (len(pairs) + 1))


def _fit(cells: _Cells, prior: LinearCost) -> LinearCost:
    samples = [Sample(size=size[0], cost=seconds) for size, seconds in cells.measured()]
    if not samples:
        return prior
    if prior == LinearCost():
        return fit_linear(samples)
    scale = fmean(sample.cost / prior.of(sample.size) for sample in samples)
    sizes = {sample.size * times for sample in samples for times in (1 / 4, 4)}
    return fit_linear(samples + [Sample(size=size, cost=scale * prior.of(size), weight=PRIOR) for size in sizes])
