"""What a run of the benchmark is kept as: JSON of these types."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

import msgspec

from stepbatch.errors import SetupError

Outcome = Literal["ok", "invalid", "rejected", "timeout", "failed"]


class Record(msgspec.Struct, kw_only=True):
    """What became of one request. Times are seconds since the run's start."""

    index: int
    asked: dict[str, Any]  # the item's fields, without the images themselves
    server: str  # base URL
    intended: float  # when it should have been sent: its time of the schedule, or when a slot came free
    sent: float  # when the client did send it (the first time)
    ended: float  # when the last byte of the answer was there, or the client gave up
    lag: float = 0.0  # how late the client itself was to send it
    outcome: Outcome = "ok"  # invalid: answered, but not with what was asked for
    status: int | None = None  # HTTP status of the last answer
    error: str = ""
    attempts: int = 1
    outputs: int = 0  # that came and could be decoded
    megapixels: float = 0.0  # of those, over all frames
    queue_s: float | None = None  # as the server tells it
    service_s: float | None = None  # likewise: from leaving the queue to being done
    peak_memory_mb: float | None = None  # likewise
    slo_s: float | None = None  # what was asked of its latency

    @property
    def latency(self) -> float:
        """Seconds from when it should have been sent to the end of its answer."""
        return self.ended - self.intended


class Sample(msgspec.Struct, kw_only=True):
    """What a server's metrics said at a moment of the run."""

    at: float  # seconds since the run's start
    server: str
    running: float | None = None
    waiting: float | None = None
    jobs_sum: float | None = None  # jobs that took part in steps so far, summed over the steps
    steps: float | None = None  # steps so far
    peak_memory_mb: float | None = None


class Work(msgspec.Struct, kw_only=True):
    """What was done, so that two runs can be told to have done the same."""

    digest: str  # of every request, its images included, and of the load
    requests: int
    dataset: str
    task: str
    request_rate: float | None  # None: as soon as it may be
    burstiness: float
    max_concurrency: int  # 0: no bound
    is_timed: bool = False  # sent at the times of a trace
    parts: dict[str, str] = {}  # part of the work -> its own digest, to say what differs


class ClientState(msgspec.Struct, kw_only=True):
    """How the client itself did."""

    lag_p99: float = 0.0  # seconds that requests were sent late by the client's own fault
    lag_max: float = 0.0
    loop_lag_p99: float = 0.0  # seconds that the event loop was late to wake up
    cpu_share: float = 0.0  # of one core, while the load ran
    bottleneck: str = ""  # why the client itself bounded what was measured; empty if it did not


class Summary(msgspec.Struct, kw_only=True):
    """The figures of a run. Latencies are of those requests that were answered with what they asked for."""

    duration: float  # seconds, from the start to the last answer
    requests: int
    completed_requests: int
    failed_requests: int
    rejected_requests: int
    timed_out_requests: int
    invalid_requests: int
    retried_requests: int
    completed_outputs: int
    throughput_qps: float  # completed requests a second
    output_throughput_ops: float
    megapixels_per_second: float
    latency_mean: float | None = None  # seconds
    latency_median: float | None = None
    latency_p90: float | None = None
    latency_p95: float | None = None
    latency_p99: float | None = None
    latency_max: float | None = None
    queue_mean: float | None = None
    queue_p99: float | None = None
    service_mean: float | None = None
    service_p99: float | None = None
    slo_attainment_rate: float | None = None  # of all requests with a goal; those that failed missed it
    slo_met_success: int | None = None
    goodput_qps: float | None = None  # requests a second that met their goal
    peak_memory_mb_max: float | None = None
    peak_memory_mb_mean: float | None = None
    peak_memory_mb_median: float | None = None
    jobs_per_step: float | None = None


class Result(msgspec.Struct, kw_only=True):
    """A run."""

    kind: Literal["serving"] = "serving"
    created: str  # ISO 8601, UTC
    environment: dict[str, Any]  # versions and machine of the client
    options: dict[str, Any]  # the flags, without secrets
    servers: list[dict[str, Any]]  # base_url, and what each says of itself
    work: Work
    client: ClientState
    summary: Summary
    records: list[Record]
    samples: list[Sample]


def check_writable(path: Path) -> None:
    """See that a run can be kept there, before it is measured; makes the file's folder.

    Raises:
        SetupError: the file can't be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SetupError(f"can't write {path}: {error.strerror or error}") from error
    if path.is_dir():
        raise SetupError(f"can't write {path}: it is a folder")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise SetupError(f"can't write {path}: permission denied")


def make_folder(folder: str) -> Path | None:
    """The folder of ``--save-outputs``, made if it isn't there; ``None`` if that is empty.

    Raises:
        SetupError: it can't be made.
    """
    if not folder:
        return None
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SetupError(f"--save-outputs: {folder} can't be made: {error.strerror or error}") from error
    return Path(folder)


def save(result: msgspec.Struct, path: Path) -> None:
    """Write a run as JSON.

    Raises:
        SetupError: the file can't be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(msgspec.json.format(msgspec.json.encode(result), indent=1) + b"\n")
    except OSError as error:
        raise SetupError(f"can't write {path}: {error.strerror or error}") from error


def load(path: Path) -> Result:
    """Read a run that was saved.

    Raises:
        SetupError: there is none in the file.
    """
    try:
        data = path.read_bytes()
        if b'"kind": "sweep"' in data[:100]:
            raise SetupError(f"{path} is a sweep, and only results of bench serving can be compared")
        return msgspec.json.decode(data, type=Result)
    except OSError as error:
        raise SetupError(f"can't read {path}: {error.strerror or error}") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise SetupError(f"{path} is no result of stepbatch bench serving: {error}") from error
