from __future__ import annotations

from collections.abc import Callable
from typing import cast

import httpx

from stepbatch.engine.client import AsyncEngine
from stepbatch.engine.messages import Output, Stats
from stepbatch.request import Times
from stepbatch.server.metrics import Metrics

from .support import StubEngine


def make(engine: StubEngine) -> tuple[Metrics, Callable[[], dict[str, float]]]:
    metrics = Metrics(cast(AsyncEngine, engine))
    return metrics, lambda: read(metrics.render().decode())


def read(text: str) -> dict[str, float]:
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


def test_a_scrape_shows_what_was_served(http: httpx.Client, generate: Callable[..., httpx.Response]) -> None:
    before = read(http.get("/metrics").text)
    generate(n=2)
    generate(n=0)
    response = http.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    after = read(response.text)

    def grown(name: str) -> float:
        return after[name] - before.get(name, 0.0)

    assert grown('stepbatch:requests_total{code="ok"}') == 1
    assert grown('stepbatch:requests_total{code="invalid_value"}') == 1
    assert grown("stepbatch:e2e_request_latency_seconds_count") == 1
    for stage in ("request_queue", "encode", "denoise", "decode"):
        assert grown(f"stepbatch:{stage}_seconds_count") == 2
    assert grown("stepbatch:denoise_step_seconds_count") >= 1
    assert after["stepbatch:engine_ready"] == 1
    assert after["stepbatch:engine_restarts_total"] == 0
    assert after["stepbatch:num_requests_running"] == after["stepbatch:num_requests_waiting"] == 0


def test_gauges_show_the_engine_as_it_is_now() -> None:
    engine = StubEngine(stats=Stats(running=3, waiting=4, peak_memory_mb=5.5, token_limit=900.0), restarts=2)
    _, figures = make(engine)
    shown = figures()
    assert shown["stepbatch:num_requests_running"] == 3
    assert shown["stepbatch:num_requests_waiting"] == 4
    assert shown["stepbatch:peak_memory_mb"] == 5.5
    assert shown["stepbatch:step_token_limit"] == 900
    assert shown["stepbatch:engine_restarts_total"] == 2
    assert shown["stepbatch:engine_ready"] == 0


def test_a_step_counts_once_however_often_it_is_told() -> None:
    metrics, figures = make(StubEngine())
    step = Stats(steps=1, jobs_in_step=3, tokens_in_step=300, step_seconds=0.2)
    for stats in (step, step, Stats(steps=1), Stats(steps=2, jobs_in_step=1, tokens_in_step=100, step_seconds=0.1)):
        metrics.on_message(stats)
    metrics.on_message(Stats(steps=1, jobs_in_step=1))  # a new engine process counts from the beginning
    shown = figures()
    assert shown["stepbatch:jobs_per_step_count"] == 3
    assert shown["stepbatch:jobs_per_step_sum"] == 5
    assert shown['stepbatch:jobs_per_step_bucket{le="1.0"}'] == 2
    assert shown["stepbatch:tokens_per_step_sum"] == 400


def test_the_stages_of_an_output_are_measured() -> None:
    metrics, figures = make(StubEngine())
    metrics.on_message(Output("r", 0, 1, 1, 1, 1, b"rgb", Times(queue=1.0, encode=2.0, denoise=3.0, decode=4.0)))
    shown = figures()
    assert shown["stepbatch:request_queue_seconds_sum"] == 1
    assert shown["stepbatch:encode_seconds_sum"] == 2
    assert shown["stepbatch:denoise_seconds_sum"] == 3
    assert shown["stepbatch:decode_seconds_sum"] == 4


def test_refusals_and_predictions_are_counted() -> None:
    engine = StubEngine()
    metrics, figures = make(engine)
    engine.admission.refused["deadline"] += 2
    engine.admission.backlog = 12.5
    metrics.predicted(3.0, 2.0)
    shown = figures()
    assert shown['stepbatch:refused_total{reason="deadline"}'] == 2
    assert shown['stepbatch:refused_total{reason="queue_seconds"}'] == 0
    assert shown["stepbatch:backlog_seconds"] == 12.5
    assert shown["stepbatch:prediction_ratio_sum"] == 1.5
