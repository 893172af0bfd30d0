"""Runs that never happened, as real ones look: requests with lognormal service times over a few slots, first come first
served, and what the server's metrics would have said meanwhile."""

import heapq
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

import numpy as np

from stepbatch.bench.report.summary import summarize
from stepbatch.bench.results import ClientState, Outcome, Record, Result, Sample, Work

SERVER = "http://127.0.0.1:30200"
STEPS_PER_SECOND = 20


def made(
    *,
    model: str = "some-model",
    requests: int = 64,
    seconds: float = 1.0,
    slots: int = 4,
    rate: float | None = None,
    concurrency: int = 8,
    slo: float | None = None,
    failing: Sequence[Outcome] = (),
    servers: Sequence[str] = (SERVER,),
    metrics: bool = True,
    seed: int = 0,
) -> Result:
    """A run; ``seconds`` is the median service time, and each of ``failing`` is one request's outcome."""
    random = np.random.default_rng(seed)
    service = seconds * random.lognormal(0, 0.4, requests)
    arrivals = None if rate is None else np.cumsum(random.exponential(1 / rate, requests))
    records = []
    for i, server in enumerate(servers):
        mine = slice(i, requests, len(servers))
        due = None if arrivals is None else arrivals[mine]
        records += _serve(server, service[mine], due, slots, concurrency, i, len(servers))
    records.sort(key=lambda record: record.index)
    bad = np.linspace(0, requests - 1, len(failing) + 2)[1:-1].round().astype(int)
    for record in records:
        record.slo_s = slo
    for i, outcome in zip(bad, failing, strict=True):
        records[i].outcome, records[i].error, records[i].outputs = outcome, f"the server said {outcome}", 0
        records[i].megapixels = 0.0
    samples = [sample for server in servers for sample in _watch(server, records)] if metrics else []
    parts = {"prompts": "p", "sizes": "s", "load": f"{rate} {concurrency}"}
    return Result(
        created="2026-01-01T00:00:00Z",
        environment={"date": "2026-01-01", "stepbatch": "0.1", "python": "3.11", "cpu": "made"},
        options={"model": model, "slo": slo, "slo_scale": 3.0},
        servers=[{"base_url": server} for server in servers],
        work=Work(
            digest=str(parts),
            requests=requests,
            dataset="demo",
            task="text-to-image",
            request_rate=rate,
            burstiness=1.0,
            max_concurrency=concurrency if rate is None else 0,
            parts=parts,
        ),
        client=ClientState(lag_p99=0.0004, lag_max=0.002, cpu_share=0.11),
        summary=summarize(records, samples),
        records=records,
        samples=samples,
    )


def all_failed() -> Result:
    """A run of three requests, none of which was answered."""
    result = made(requests=3)
    for lost in result.records:
        lost.outcome = "failed"
    result.summary = summarize(result.records, result.samples)
    return result


def record(index: int = 0, intended: float = 0.0, ended: float = 1.0, **fields: Any) -> Record:
    """One record, with what a test doesn't care about filled in."""
    return Record(index=index, asked={"n": 1}, server=SERVER, intended=intended, sent=intended, ended=ended, **fields)


def _serve(
    server: str, service: Any, arrivals: Any, slots: int, concurrency: int, first: int, stride: int
) -> list[Record]:
    free, clients, records = [0.0] * slots, [0.0] * concurrency, []
    for i, seconds in enumerate(service.tolist()):
        due = heapq.heappop(clients) if arrivals is None else float(arrivals[i])
        start = max(due, heapq.heappop(free))
        end = start + seconds
        heapq.heappush(free, end)
        if arrivals is None:
            heapq.heappush(clients, end)
        records.append(
            Record(
                index=first + i * stride,
                asked={"prompt": "a made prompt", "n": 1},
                server=server,
                intended=due,
                sent=due,
                ended=end,
                outputs=1,
                megapixels=0.25,
                queue_s=start - due,
                service_s=end - start,
            )
        )
    return records


def _watch(server: str, records: Sequence[Record]) -> list[Sample]:
    mine = [record for record in records if record.server == server]
    sent = sorted(record.sent for record in mine)
    started = sorted(record.sent + (record.queue_s or 0) for record in mine)
    ended = sorted(record.ended for record in mine)
    times = np.linspace(0, max(ended), 200).tolist()
    jobs = steps = 0.0
    samples = []
    for at, gap in zip(times, np.diff(times, prepend=0).tolist(), strict=True):
        running = bisect_right(started, at) - bisect_right(ended, at)
        waiting = bisect_right(sent, at) - bisect_right(started, at)
        steps += STEPS_PER_SECOND * gap * (running > 0)
        jobs += STEPS_PER_SECOND * gap * running
        samples.append(Sample(at=at, server=server, running=running, waiting=waiting, jobs_sum=jobs, steps=steps))
    return samples
