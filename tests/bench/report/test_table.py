import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.bench.made import made

from stepbatch.bench.report.summary import summarize
from stepbatch.bench.report.table import load_text, model_name, number, render, share
from stepbatch.bench.results import Result


def rows(result: Result) -> dict[str, str]:
    return dict(re.findall(r"^(\S.*?): +(\S.*)$", render(result), re.MULTILINE))


def test_the_form_is_the_known_one() -> None:
    lines = render(made(requests=64, slo=2.5)).splitlines()
    assert lines[0] == "================= Serving Benchmark Result =================" and len(lines[0]) == 60
    assert lines[1] == "Task:                                    text-to-image"
    assert lines[4] == "-" * 50 and lines[-1] == "-" * 60
    known = """Task Model Dataset|Benchmark duration (s)|Request rate|Max request concurrency|Successful requests
        |Completed outputs|Outputs per prompt|Request throughput (req/s)|Output throughput (outputs/s)|Latency Mean (s)
        |Latency Median (s)|Latency P90 (s)|Latency P95 (s)|Latency P99 (s)|SLO Attainment Rate|SLO Met (Success)"""
    labels = [line[:41].rstrip(" :") for line in lines if line[:1].isalpha()]
    wanted = "Task|Model|Dataset|" + "|".join(part.strip() for part in known.split("|")[1:])
    assert [label for label in labels if label in wanted.split("|")] == wanted.split("|")


def test_figures_stand_in_one_column() -> None:
    for line in render(made(requests=8, slo=1.0, failing=["failed"])).splitlines():
        if line[:1].isalpha():
            assert line[40] == " " and line[41] != " ", line


def test_what_was_measured_is_told() -> None:
    result = made(requests=64, slo=2.5, failing=["failed", "rejected", "rejected", "timeout", "invalid"])
    result.records[3].attempts = 2
    result.records[0].peak_memory_mb = 1234.5
    result.summary = summarize(result.records, result.samples)
    told = rows(result)
    assert told["Model"] == "some-model" and told["Request rate"] == "inf" and told["Max request concurrency"] == "8"
    assert told["Successful requests"] == "59/64" and told["Outputs per prompt"] == "1"
    assert told["Failed requests"] == told["Timed out requests"] == told["Invalid answers"] == "1"
    assert told["Rejected requests"] == "2" and told["Retried requests"] == "1"
    assert told["Latency P99 (s)"] == number(result.summary.latency_p99 or 0)
    assert told["SLO Attainment Rate"].endswith("%") and told["SLO (s)"] == "2.50" and "SLO Scale" not in told
    assert told["Peak Memory Max (MB)"] == told["Peak Memory Median (MB)"] == "1234.50"
    assert told["Jobs per step"] == number(result.summary.jobs_per_step or 0)
    assert told["Client lag P99 (ms)"] == "0.400"
    assert "     2 x the server said rejected" in render(result).splitlines()


def test_rows_without_a_value_are_left_out() -> None:
    result = made(requests=4, metrics=False)
    for record in result.records:
        record.queue_s = record.service_s = None
    result.summary = summarize(result.records, [])
    text = render(result)
    for absent in ("None", "Queue", "Service", "Peak Memory", "Jobs per step", "SLO", "Failed", "Rejected", "Retried"):
        assert absent not in text, absent
    assert "-" * 50 + "\n" + "-" * 50 not in text  # nor is a section that has no rows


def test_a_run_in_which_all_failed_has_a_table() -> None:
    result = made(requests=3)
    for record in result.records:
        record.outcome, record.error = "failed", "Connection\n  refused " + "x" * 200
    result.summary = summarize(result.records, [])
    text = render(result)
    assert "Latency" not in text and rows(result)["Successful requests"] == "0/3"
    (error,) = [line for line in text.splitlines() if " x Connection refused xxx" in line]
    assert error.endswith("...") and len(error) < 120


def test_the_commonest_errors_come_first_and_the_rest_is_counted() -> None:
    result = made(requests=40)
    for i, record in enumerate(result.records):
        record.outcome, record.error = "failed", f"fault {min(i, 33)}"
    lines = render(result).splitlines()
    assert next(line for line in lines if " x fault" in line) == "     7 x fault 33"
    assert any("and 29 other errors" in line for line in lines)


def test_a_bottleneck_is_loud() -> None:
    result = made(requests=4)
    assert "WARNING" not in render(result)
    result.client.bottleneck = "requests were sent 80 ms late"
    last = render(result).splitlines()[-3:]
    assert last[0] == last[2] == "!" * 60 and last[1].startswith("WARNING: ") and "80 ms late" in last[1]


def test_a_run_that_was_stopped_says_so() -> None:
    result = made(requests=8)
    assert "Stopped after" not in rows(result)
    result.records = result.records[:5]
    result.summary = summarize(result.records, result.samples)
    assert rows(result)["Stopped after"] == "5 of 8 requests" and rows(result)["Successful requests"] == "5/5"


def test_goals_by_scale_and_of_a_trace() -> None:
    result = made(requests=4, slo=2.0)
    result.options["slo"] = 0.0
    assert rows(result)["SLO Scale"] == "3.00"
    result.records[0].slo_s = 0.5
    assert rows(result)["SLO (s)"] == "0.500 to 2.00"


def test_outputs_per_prompt_may_differ() -> None:
    result = made(requests=4)
    result.records[2].asked["n"] = 4
    assert rows(result)["Outputs per prompt"] == "1 to 4"


def test_the_load_in_words() -> None:
    work = made(requests=1).work
    assert load_text(work) == "concurrency 8"
    work.max_concurrency = 0
    assert load_text(work) == "all at once"
    work.is_timed = True
    assert load_text(work) == "at the trace's times"
    work.request_rate, work.burstiness, work.max_concurrency = 2.5, 0.5, 3
    assert load_text(work) == "2.5 req/s offered (burstiness 0.5), at most 3 at once"


def test_the_model_is_the_flags_or_the_servers() -> None:
    result = made(requests=1)
    result.servers = [{"base_url": "a"}, {"base_url": "b", "model": "told"}]
    assert model_name(result) == "some-model"
    result.options["model"] = ""
    assert model_name(result) == "told"
    result.servers = []
    assert model_name(result) == "" and "Model" not in rows(result)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0.00"), (1234.5, "1234.50"), (9.999, "10.00"), (0.5, "0.500"), (0.02134, "0.0213"), (1e-12, "0.000000000")],
)
def test_figures_show_three_digits(value: float, text: str) -> None:
    assert number(value) == text


@given(st.floats(1e-6, 1e9))
def test_a_figure_is_close_to_its_value(value: float) -> None:
    assert float(number(value)) == pytest.approx(value, rel=0.0051, abs=0)
    assert "e" not in number(value)


def test_a_share_is_never_rounded_up() -> None:
    assert [share(value) for value in (1.0, 0.9899, 0.99, 0.5, 0.0)] == ["100%", "98.9%", "99%", "50%", "0%"]
