"""A run's figures as a table for the terminal, in the form that users of other servers' benchmarks know."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from stepbatch.bench.results import ClientState, Result, Summary, Work

WIDTH, DIVIDER = 60, 50  # characters: of the table's ends, and between its sections
ERROR_LENGTH, ERROR_KINDS = 100, 5  # characters that are shown of an error, and how many different ones

Row = tuple[str, str | None]  # label and value; None leaves the row out


def render(result: Result) -> str:
    """The table, as lines of text without one at the end."""
    summary = result.summary
    sections = [
        _rows(_subject(result)),
        _rows(_traffic(result)),
        _rows(_performance(summary)),
        _rows(_server(summary)),
        _rows(_goal(result)),
        _rows(_failures(summary)) + _errors(result),
        _rows(_client(result.client)),
    ]
    lines = [f"{' Serving Benchmark Result ':=^{WIDTH}}"]
    for i, section in enumerate(section for section in sections if section):
        lines += ["-" * DIVIDER] * (i > 0) + section
    lines.append("-" * WIDTH)
    if result.client.bottleneck:
        lines += ["!" * WIDTH, bottleneck_text(result.client), "!" * WIDTH]
    return "\n".join(lines)


def number(value: float) -> str:
    """A figure to read: two decimals, or as many as it takes to show three digits that count."""
    if value == 0 or not math.isfinite(value):
        return f"{value:.2f}"
    return f"{value:.{min(9, max(2, 2 - math.floor(math.log10(abs(value)))))}f}"


def share(value: float) -> str:
    """A share as a percentage; never rounded up, so that what just fails a goal doesn't read as if it met it."""
    return f"{math.floor(1000 * value + 1e-6) / 10:g}%"


def console_for(table: Table) -> Console:
    """Where a table is printed: the terminal, or a file or a pipe, which has no width and so gets the table's."""
    console = Console()
    if console.is_terminal:
        return console
    return Console(width=console.measure(table, options=console.options.update(max_width=10_000)).maximum)


def work_text(work: Work) -> str:
    """What was asked for, in a few words."""
    plural = "" if work.requests == 1 else "s"
    return f"{work.requests} request{plural} of {work.dataset}, {work.task}, {load_text(work)}"


def load_text(work: Work) -> str:
    """How the load of a run came, in a few words."""
    bound = f"at most {work.max_concurrency} at once" if work.max_concurrency else ""
    if work.request_rate is not None:
        shape = "" if work.burstiness == 1 else f" (burstiness {work.burstiness:g})"
        return ", ".join(part for part in (f"{work.request_rate:g} req/s offered{shape}", bound) if part)
    if work.is_timed:
        return ", ".join(part for part in ("at the trace's times", bound) if part)
    return f"concurrency {work.max_concurrency}" if work.max_concurrency else "all at once"


def model_name(result: Result) -> str:
    """The model that the run's requests named, or that the server says it has; empty if neither is known."""
    said = [server["model"] for server in result.servers if server.get("model")]
    return str(result.options.get("model") or (said[0] if said else ""))


def bottleneck_text(client: ClientState) -> str:
    """What to say of a run that the client itself bounded."""
    return f"WARNING: the client was the bottleneck, not the server: {client.bottleneck}"


def _rows(rows: Sequence[Row]) -> list[str]:
    return [f"{label + ':':<40} {value:<15}".rstrip() for label, value in rows if value is not None]


def _figure(value: float | None) -> str | None:
    return None if value is None else number(value)


def _subject(result: Result) -> list[Row]:
    return [
        ("Task", result.work.task),
        ("Model", model_name(result) or None),
        ("Dataset", result.work.dataset),
        ("Servers", str(len(result.servers)) if len(result.servers) > 1 else None),
    ]


def _traffic(result: Result) -> list[Row]:
    work, summary = result.work, result.summary
    asked = sorted({int(record.asked.get("n", 1)) for record in result.records})
    rate = "the trace's" if work.is_timed else "inf"
    return [
        ("Benchmark duration (s)", number(summary.duration)),
        ("Request rate", rate if work.request_rate is None else f"{work.request_rate:g}"),
        ("Burstiness", None if work.request_rate is None or work.burstiness == 1 else f"{work.burstiness:g}"),
        ("Max request concurrency", str(work.max_concurrency) if work.max_concurrency else "not set"),
        (
            "Stopped after",
            None if summary.requests >= work.requests else f"{summary.requests} of {work.requests} requests",
        ),
        ("Successful requests", f"{summary.completed_requests}/{summary.requests}"),
        ("Completed outputs", str(summary.completed_outputs)),
        ("Outputs per prompt", f"{asked[0]}" if len(asked) == 1 else f"{asked[0]} to {asked[-1]}" if asked else None),
    ]


def _performance(summary: Summary) -> list[Row]:
    return [
        ("Request throughput (req/s)", number(summary.throughput_qps)),
        ("Output throughput (outputs/s)", number(summary.output_throughput_ops)),
        ("Megapixel throughput (MP/s)", _figure(summary.megapixels_per_second or None)),
        ("Latency Mean (s)", _figure(summary.latency_mean)),
        ("Latency Median (s)", _figure(summary.latency_median)),
        ("Latency P90 (s)", _figure(summary.latency_p90)),
        ("Latency P95 (s)", _figure(summary.latency_p95)),
        ("Latency P99 (s)", _figure(summary.latency_p99)),
        ("Latency Max (s)", _figure(summary.latency_max)),
        ("Queue Time Mean (s)", _figure(summary.queue_mean)),
        ("Queue Time P99 (s)", _figure(summary.queue_p99)),
        ("Service Time Mean (s)", _figure(summary.service_mean)),
        ("Service Time P99 (s)", _figure(summary.service_p99)),
    ]


def _server(summary: Summary) -> list[Row]:
    return [
        ("Peak Memory Max (MB)", _figure(summary.peak_memory_mb_max)),
        ("Peak Memory Mean (MB)", _figure(summary.peak_memory_mb_mean)),
        ("Peak Memory Median (MB)", _figure(summary.peak_memory_mb_median)),
        ("Jobs per step", _figure(summary.jobs_per_step)),
    ]


def _goal(result: Result) -> list[Row]:
    summary = result.summary
    goals = [record.slo_s for record in result.records if record.slo_s is not None]
    if summary.slo_attainment_rate is None or not goals:
        return []
    scale = result.options.get("slo_scale") if result.options.get("slo") == 0 else None  # --slo without a value
    least, most = number(min(goals)), number(max(goals))
    return [
        ("SLO Attainment Rate", f"{summary.slo_attainment_rate:.2%}"),
        ("SLO Met (Success)", str(summary.slo_met_success)),
        ("SLO Scale", _figure(scale)),
        ("SLO (s)", least if least == most else f"{least} to {most}"),
        ("Goodput (req/s)", _figure(summary.goodput_qps)),
    ]


def _failures(summary: Summary) -> list[Row]:
    counts = (
        ("Failed requests", summary.failed_requests),
        ("Rejected requests", summary.rejected_requests),
        ("Timed out requests", summary.timed_out_requests),
        ("Invalid answers", summary.invalid_requests),
        ("Retried requests", summary.retried_requests),
    )
    return [(label, str(count) if count else None) for label, count in counts]


def _errors(result: Result) -> list[str]:
    """The commonest error messages, with how often they came."""
    messages = Counter(" ".join(record.error.split()) for record in result.records if record.error)
    lines = []
    for message, count in messages.most_common(ERROR_KINDS):
        cut = message if len(message) <= ERROR_LENGTH else f"{message[: ERROR_LENGTH - 3]}..."
        lines.append(f"{count:>6} x {cut}")
    if len(messages) > ERROR_KINDS:
        lines.append(f"         and {len(messages) - ERROR_KINDS} other errors")
    return lines


def _client(client: ClientState) -> list[Row]:
    return [
        ("Client lag P99 (ms)", number(1000 * client.lag_p99)),
        ("Client lag Max (ms)", number(1000 * client.lag_max)),
        ("Client CPU (cores)", number(client.cpu_share)),
    ]
