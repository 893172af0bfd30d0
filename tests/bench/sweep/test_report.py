from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from tests.bench.made import made

from stepbatch.bench.results import ClientState, Result, save
from stepbatch.bench.sweep.report import Series, SweepResult, render, said_of, sentences, series_by_unit
from stepbatch.bench.sweep.tipping import SweepPoint, Unit, kept_up


def swept(
    loads: Sequence[float], *, unit: Unit = "rate", slo: float | None = 3.0, attainment: float = 0.99, **fields: Any
) -> tuple[Series, SweepResult]:
    """A series of made runs on four slots of about a second each: four requests a second are too many."""
    result = SweepResult(created="now", environment={}, options={}, slo_attainment=attainment)
    series = Series(unit=unit, name=fields.pop("name", ""))
    result.series.append(series)
    for load in loads:
        given = {"rate": load} if unit == "rate" else {"concurrency": int(load)}
        run = made(requests=300, slots=4, slo=slo, **given, **fields)
        result.note(run)
        series.add(point_of(run, load, unit, attainment))
    return series, result


def point_of(run: Result, load: float, unit: Unit, attainment: float) -> SweepPoint:
    s = run.summary
    share = s.completed_requests / s.requests if s.slo_attainment_rate is None else s.slo_attainment_rate
    steady = unit == "concurrency" or kept_up(run.records)
    return SweepPoint(load=load, unit=unit, summary=s, meets=share >= attainment, steady=steady, work=run.work)


def text(series: Series) -> list[str]:
    console = Console(width=200)
    with console.capture() as captured:
        console.print(render(series))
    return captured.get().splitlines()


class TestSentences:
    def test_where_it_tips_over_and_why_there(self) -> None:
        series, result = swept([1, 2, 4, 8])
        first, second = sentences(series, result)
        assert first.startswith("tips over at 2 req/s: the highest rate at which 99% of requests met 3 s; at 4 req/s ")
        assert first.endswith("% did")
        assert second.startswith("throughput's knee: 4 req/s offered, 3.")
        assert (series.tipping, series.knee) == (2, 4)

    def test_a_goal_that_is_never_met(self) -> None:
        series, result = swept([8, 4])
        assert sentences(series, result)[0].startswith("never met the goal: at 4 req/s ")
        assert sentences(series, result)[0].endswith("% of requests met 3 s")
        assert series.tipping is None

    def test_no_load_that_was_too_much(self) -> None:
        series, result = swept([1, 0.5])
        assert sentences(series, result) == [
            "did not tip over up to 1 req/s, at which 99% of requests met 3 s",
            "throughput's knee was not reached up to 1 req/s, where it was 1.01 req/s",
        ]
        assert (series.tipping, series.knee) == (None, None)

    def test_without_a_goal_it_must_keep_up(self) -> None:
        series, result = swept([1, 2, 8], slo=None)
        assert sentences(series, result)[0] == (
            "tips over at 2 req/s: the highest rate at which 99% of requests were answered and the server kept up; "
            "at 8 req/s the server fell behind"
        )

    def test_without_a_goal_requests_must_be_answered(self) -> None:
        series, result = swept([1, 2], slo=None, failing=["failed"] * 30)
        assert sentences(series, result)[0] == "never met the goal: at 1 req/s 90% of requests were answered"

    def test_by_concurrency(self) -> None:
        series, result = swept([1, 2, 4, 8, 16], unit="concurrency", slo=None)
        first, second = sentences(series, result)
        assert first == "did not tip over up to concurrency 16, at which 99% of requests were answered"
        assert second.startswith("throughput's knee: concurrency 4, 3.")

    def test_goals_that_differ(self) -> None:
        series, result = swept([1])
        result.slo_s = [0.5, 1.0, 3.0]
        assert sentences(series, result)[0].endswith("at which 99% of requests met their goals of 0.5 to 3 s")

    def test_nothing_that_was_answered(self) -> None:
        series, result = swept([1, 2])
        for point in series.points:
            point.meets, point.summary.slo_attainment_rate, point.summary.throughput_qps = False, 0.0, 0.0
        assert sentences(series, result) == [
            "never met the goal: at 1 req/s 0% of requests met 3 s",
            "nothing was answered",
        ]

    def test_a_variant_goes_by_its_name(self) -> None:
        series, result = swept([1, 2], name="size=[4]")
        assert all(sentence.startswith("size=[4]: ") for sentence in sentences(series, result))
        assert "size=[4]" in text(series)[0]

    def test_a_client_that_was_too_slow_is_told(self) -> None:
        series, result = swept([1, 2])
        series.points[0].client = ClientState(bottleneck="its own lag was 80 ms")
        assert sentences(series, result)[-1].endswith(
            "the client was the bottleneck, not the server: its own lag was 80 ms (at 1 req/s)"
        )
        assert "client too slow" in said_of(series.points[0], series)


class TestTable:
    def test_has_a_line_for_each_load_and_marks(self) -> None:
        series, _ = swept([8, 1, 4, 2], failing=["rejected", "timeout", "failed", "invalid"], attainment=0.95)
        lines = [line for line in text(series) if line.startswith("│")]
        assert [line.split("│")[1].strip() for line in lines] == ["1", "2", "4", "8"]
        assert "tips over here" in lines[1]
        assert "knee, too late" in lines[2]
        assert "too late, fell behind, 1 turned away, 1 timed out, 2 failed" in lines[3]
        assert "tips over" not in lines[0] + lines[2] + lines[3]

    def test_shows_no_goal_where_there_is_none(self) -> None:
        series, _ = swept([1, 2], slo=None)
        lines = [line.split("│") for line in text(series) if line.startswith("│")]
        assert [line[6].strip() for line in lines] == ["-", "-"]

    def test_a_line_of_progress(self) -> None:
        series, _ = swept([1])
        assert said_of(series.points[0], series).startswith("1 req/s: 1.01 req/s, P99 ")
        assert said_of(series.points[0], series).endswith("% met their goal")


def test_a_sweep_is_kept_and_read(tmp_path: Path) -> None:
    _, result = swept([1, 2, 8])
    save(result, tmp_path / "sweep.json")
    assert msgspec.json.decode((tmp_path / "sweep.json").read_bytes(), type=SweepResult) == result
    assert result.name == "some-model"
    assert result.slo_s == [3.0]


def test_each_kind_of_load_has_a_picture() -> None:
    by_rate, result = swept([1])
    by_concurrency, _ = swept([1], unit="concurrency", name="size=4")
    result.series += [by_concurrency, Series(unit="rate", name="empty")]
    drawn = {unit: [(s.name, s.points) for s in all_series] for unit, all_series in series_by_unit(result).items()}
    assert drawn == {
        "rate": [("some-model", by_rate.points)],
        "concurrency": [("size=4", by_concurrency.points)],
    }
    assert by_rate.name == ""  # as it is kept
