"""What is measured, in Prometheus' text format. A job is one output: a request with ``n=4`` is four."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from stepbatch.engine.client import AsyncEngine
from stepbatch.engine.messages import FromEngine, Output, Stats
from stepbatch.errors import REQUEST_ERRORS
from stepbatch.server.event_loop import LoopWatch

PREFIX = "stepbatch:"
_JOBS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 128)
_TOKENS = tuple(2**i for i in range(6, 19))
_RATIOS = (0.1, 0.25, 0.5, 0.67, 0.8, 0.9, 0.95, 1.0, 1.05, 1.1, 1.25, 1.5, 2.0, 4.0, 10.0)
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


class Metrics:
    """The server's and the engine's figures, in a registry of their own."""

    def __init__(self, engine: AsyncEngine) -> None:
        self.registry = CollectorRegistry()
        self.loop = LoopWatch()
        self.registry.register(_EngineCollector(engine))
        self.registry.register(_LoopCollector(self.loop))
        self._outcomes = Counter(
            f"{PREFIX}requests", "Requests that ended, by error code or ok", ["code"], registry=self.registry
        )
        for code in ("ok", *REQUEST_ERRORS):  # from the start, so that there is a first time to be seen
            self._outcomes.labels(code)
        self._latency = self._histogram(
            "e2e_request_latency_seconds", "From a request's arrival to its pictures or video", _SECONDS
        )
        self._jobs = self._histogram("jobs_per_step", "Jobs that shared a denoising step", _JOBS)
        self._tokens = self._histogram("tokens_per_step", "Tokens in a denoising step", _TOKENS)
        self._step = self._histogram("denoise_step_seconds", "Duration of a denoising step", _SECONDS)
        self._queue = self._histogram("request_queue_seconds", "A job's wait for its first unit of work", _SECONDS)
        self._encode = self._histogram("encode_seconds", "A job's time in the encoders", _SECONDS)
        self._denoise = self._histogram("denoise_seconds", "A job's time in denoising steps", _SECONDS)
        self._decode = self._histogram("decode_seconds", "A job's time in the image decoder", _SECONDS)
        self._predictions = self._histogram(
            "prediction_ratio", "What a request was predicted to take, by what it took, of those that were ok", _RATIOS
        )
        self._steps_seen = 0

    def on_message(self, message: FromEngine) -> None:
        """Count what the engine says."""
        if isinstance(message, Stats):
            self._on_stats(message)
        elif isinstance(message, Output):
            self._queue.observe(message.times.queue)
            self._encode.observe(message.times.encode)
            self._denoise.observe(message.times.denoise)
            self._decode.observe(message.times.decode)

    def ended(self, code: str, seconds: float) -> None:
        """Count a request that ended with this error code, or ``ok``."""
        self._outcomes.labels(code).inc()
        if code == "ok":
            self._latency.observe(seconds)

    def predicted(self, predicted: float, seconds: float) -> None:
        """Note what a request was predicted to take, and what it took."""
        self._predictions.observe(predicted / seconds)

    def render(self) -> bytes:
        """All of it, for a scrape."""
        return generate_latest(self.registry)

    def _on_stats(self, stats: Stats) -> None:
        # The same figures come again as a heartbeat, and the count of steps begins anew with a new engine process.
        if stats.steps != self._steps_seen and stats.jobs_in_step:
            self._jobs.observe(stats.jobs_in_step)
            self._tokens.observe(stats.tokens_in_step)
            self._step.observe(stats.step_seconds)
        self._steps_seen = stats.steps

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(PREFIX + name, text, buckets=buckets, registry=self.registry)


class _EngineCollector(Collector):
    """Reads the engine when it is scraped, so that these figures are never stale."""

    def __init__(self, engine: AsyncEngine) -> None:
        self.engine = engine

    def collect(self) -> Iterator[Metric]:
        stats = self.engine.stats
        for name, text, value in (
            ("num_requests_running", "Jobs that have begun and have not ended", stats.running),
            ("num_requests_waiting", "Jobs that have not begun", stats.waiting),
            ("backlog_seconds", "Work that is held, in predicted seconds", self.engine.admission.backlog),
            ("engine_ready", "1 when requests are taken and worked on", self.engine.ready),
            ("peak_memory_mb", "The most memory of the device that was in use, MiB", stats.peak_memory_mb),
            ("step_token_limit", "The most tokens that a step has memory for, by what was found", stats.token_limit),
        ):
            yield GaugeMetricFamily(PREFIX + name, text, value=float(value))
        refused = CounterMetricFamily(f"{PREFIX}refused", "Requests that were refused at the door", labels=["reason"])
        for reason, count in self.engine.admission.refused.items():
            refused.add_metric([reason], count)
        yield refused
        restarts = self.engine.restarts
        yield CounterMetricFamily(
            f"{PREFIX}engine_restarts", "How often the engine process was replaced", value=restarts
        )


class _LoopCollector(Collector):
    """How the server itself does."""

    def __init__(self, loop: LoopWatch) -> None:
        self.loop = loop

    def collect(self) -> Iterator[Metric]:
        lag, tasks = self.loop.take_lag(), self.loop.tasks()
        text = "How late the server's event loop was, at worst, since this was last asked for"
        yield GaugeMetricFamily(f"{PREFIX}event_loop_lag_seconds", text, value=lag)
        yield GaugeMetricFamily(f"{PREFIX}event_loop_tasks", "Tasks of the server's event loop", value=tasks)
