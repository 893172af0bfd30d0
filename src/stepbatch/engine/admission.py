"""The door: how much work is held, in predicted seconds; what a newcomer can expect; and who is refused. No torch.

What is refused costs next to nothing, so that a server that is asked for more than it can do goes on doing all it can.
"""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import replace
from statistics import median

from stepbatch.config import AdmissionConfig, EngineConfig
from stepbatch.engine.cost import UNKNOWN, Costs
from stepbatch.engine.forecast import Held, Prediction, left, lengths, predict
from stepbatch.engine.order import JobId
from stepbatch.engine.scheduler import DOUBT
from stepbatch.engine.traffic import Traffic
from stepbatch.engine.width import limits_of, paces
from stepbatch.errors import DeadlineExceeded, Overloaded
from stepbatch.model_info import ModelInfo
from stepbatch.request import GenerationRequest, Job

PATIENCE = 600.0  # seconds after which OpenAI's clients, unless told otherwise, give up
RECENT, FEW = 32, 8  # requests by whose predictions the next are corrected, at most and at least
CORRECTION = 2.0  # at most, up or down
ROOM = 0.1  # of the longest queue: how much of it is to be free before who was refused comes again
SHORTEST_RETRY, LONGEST_RETRY = 1, 120  # seconds; OpenAI's clients don't try again where they are told more


class Admission:
    """Keeps count of what the engine was given, lets newcomers in or refuses them, and predicts when they are done.

    Args:
        config: The bounds of the queue, and the scheduler's limits.
        clock: Seconds that only grow.
    """

    def __init__(self, config: EngineConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self.costs = UNKNOWN
        self.backlog = 0.0  # seconds of the machine that all that is held still takes
        self.refused = Counter(dict.fromkeys(("queue_seconds", "queue_requests", "deadline"), 0))  # by reason
        self._bounds = config.admission
        self._batching = config.batching
        self._held: dict[JobId, Held] = {}  # in order of arrival
        self._begun = 0  # of them
        self._most_tokens = math.inf  # in a step, as far as memory goes
        self._clock = clock
        self._away, self._away_at = 0.0, 0.0  # seconds of work that was refused and may come again, and when that was
        self._traffic = Traffic()
        self._ratios: deque[float] = deque(maxlen=RECENT)  # of what requests took, to what was forecast

    def serve(self, info: ModelInfo, costs: Costs) -> None:
        """Go by this model, and by what is known of its costs when it is loaded."""
        self._info = info
        self._limits = limits_of(self._batching, info.sizing.whole_calls)
        self._most_seconds = _most_seconds(self._bounds, info)
        self._most_tokens = math.inf
        self.learn(costs if costs.known else self.costs)  # whole calls aren't measured at the start

    def learn(self, costs: Costs) -> None:
        """Go by these costs from now on."""
        self.costs = costs
        self._pace = paces(costs.step, self._limits, self._most_tokens)
        self.backlog = 0.0
        for held in self._held.values():
            self._weigh(held, 0.0)

    def limit(self, tokens: float) -> None:
        """Reckon with steps of no more tokens than there is memory for."""
        if tokens != self._most_tokens:
            self._most_tokens = tokens
            self.learn(self.costs)

    @property
    def waiting(self) -> int:
        """How many jobs have not begun."""
        return len(self._held) - self._begun

    def check(self) -> None:
        """Refuse whoever comes while more than may be is waiting.

        Raises:
            Overloaded: it is.
        """
        if self.backlog > self._most_seconds:
            self.refused["queue_seconds"] += 1
            waits = f"work of about {self.backlog:.0f} s waits or runs, and {self._most_seconds:g} s may"
            raise Overloaded(waits, retry_after=self._retry(self.backlog - (1 - ROOM) * self._most_seconds))
        if self.waiting >= self._bounds.max_queue_requests:
            self.refused["queue_requests"] += 1
            waits = f"{self.waiting} pictures or videos wait, and {self._bounds.max_queue_requests} may"
            raise Overloaded(waits, retry_after=self.later())

    def admit(self, request_id: str, request: GenerationRequest, arrival: float) -> Prediction | None:
        """Let a resolved request in; returns what it can expect, as far as costs are known.

        Raises:
            Overloaded: more than may be is waiting; or with what is waiting, it can't be done by its deadline.
            DeadlineExceeded: it could not even alone.
        """
        self.check()
        jobs = self._jobs(request_id, request, arrival)
        prediction = None
        if self.costs.known:
            decay = self._traffic.decay
            others, most_tokens = list(self._held.values()), self._most_tokens
            forecast = predict(jobs, others, self.costs, self._limits, arrival, decay, most_tokens)
            prediction = forecast.corrected(self._correction)
            if request.timeout is not None and DOUBT * prediction.total > request.timeout:
                prediction = self._in_time(request, prediction, request.timeout)
        for job in jobs:
            self._held[job.id] = held = Held(job)
            self._weigh(held, 0.0)
            pace = self._pace(job.tokens, job.squares)
            self._traffic.came(arrival, held.left, job.steps * pace.usual + self.costs.decode.of(job.pixels))
        return prediction

    def later(self) -> int:
        """In how many seconds somebody is to come again who was refused for want of anything but time."""
        return self._retry(ROOM * self.backlog)

    def done(self, predicted: Prediction | None, seconds: float) -> None:
        """Take note of what a request has taken. What the forecast can't know shows there: who else comes, for one."""
        if predicted and predicted.total > 0:
            self._ratios.append(seconds * predicted.correction / predicted.total)

    def begin(self, jobs: Iterable[JobId]) -> None:
        """Take note of a unit of work that begins."""
        for held in self._known(jobs):
            if not held.begun:
                self._begun += 1
                before, held.begun = held.left, True
                self._weigh(held, before)

    def advance(self, id: JobId, step: int) -> None:
        """Take note of how many steps a job has taken."""
        for held in self._known([id]):
            before, held.job.step = held.left, step
            self._weigh(held, before)

    def end(self, ids: Iterable[JobId]) -> None:
        """Take note of jobs that take no more work, because they have ended or soon will."""
        for held in self._known(ids):
            del self._held[held.job.id]
            self._begun -= held.begun
            self.backlog -= held.left
        if not self._held:
            self.backlog = 0.0  # what roundings have left

    def restart(self) -> None:
        """All that is held begins anew."""
        self._begun = 0
        for held in self._held.values():
            before, held.begun, held.job.step = held.left, False, 0
            self._weigh(held, before)

    @property
    def _correction(self) -> float:
        """What predictions are multiplied with."""
        if len(self._ratios) < FEW:
            return 1.0
        return min(max(median(self._ratios), 1 / CORRECTION), CORRECTION)

    def _jobs(self, request_id: str, request: GenerationRequest, arrival: float) -> list[Job]:
        signature = request.signature if self._info.sizing.whole_calls else None
        tokens = lengths(request, self._info)
        return [Job(request_id, index, request, tokens, arrival, signature=signature) for index in range(request.n)]

    def _in_time(self, request: GenerationRequest, prediction: Prediction, timeout: float) -> Prediction:
        """What a request can expect that may still be done in time, though its forecast says otherwise.

        A forecast is endless where the request would be dropped on the way, for a little that may not come true.

        Raises:
            Overloaded, DeadlineExceeded: it can't be.
        """
        patient = self._jobs("", replace(request, timeout=None), 0.0)
        alone = predict(patient, [], self.costs, self._limits, 0.0, most_tokens=self._most_tokens)
        if DOUBT * alone.total > timeout:
            self.refused["deadline"] += 1
            takes = f"the request takes about {alone.total:.3g} s even alone, and its timeout is {timeout:g} s"
            raise DeadlineExceeded(takes, "timeout")
        total = min(prediction.total, self.backlog + alone.total)  # never, if it would be dropped on the way
        if DOUBT * total <= timeout:
            return Prediction(max(0.0, total - alone.total), total)
        self.refused["deadline"] += 1
        takes = f"the request would be done in about {total:.3g} s, and its timeout is {timeout:g} s"
        raise Overloaded(takes, "timeout", retry_after=self._retry(total - timeout))

    def _retry(self, seconds: float) -> int:
        """In how many seconds whoever is refused is to come again, if there is room in ``seconds``.

        One comes after the other, as if they stood in a queue that the machine works off; what they want isn't read
        yet, so each counts for as much as what is held is on average. Where that queue is too long, another begins.
        """
        now = self._clock()
        away = max(0.0, self._away - (now - self._away_at))
        if seconds + away > LONGEST_RETRY:
            away = 0.0
        self._away, self._away_at = away + self.backlog / max(1, len(self._held)), now
        return math.ceil(min(max(seconds + away, SHORTEST_RETRY), LONGEST_RETRY))

    def _known(self, ids: Iterable[JobId]) -> list[Held]:
        return [self._held[id] for id in ids if id in self._held]

    def _weigh(self, held: Held, before: float) -> None:
        """Count what is left of a job, of which so much was counted before."""
        pace = self._pace(held.job.tokens, held.job.squares)
        held.left = left(held.job, held.begun, self.costs, pace) if self.costs.known else 0.0
        self.backlog += held.left - before


def _most_seconds(bounds: AdmissionConfig, info: ModelInfo) -> float:
    if bounds.max_queue_seconds is not None:
        return bounds.max_queue_seconds
    return math.inf if info.makes_videos else PATIENCE
