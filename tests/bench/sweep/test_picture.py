from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from tests.bench.figures import texts, titles
from tests.bench.made import all_failed, made

from stepbatch.bench.sweep.picture import draw_sweep
from stepbatch.bench.sweep.report import Series
from stepbatch.bench.sweep.tipping import SweepPoint, Unit


def sweep(
    name: str, loads: Sequence[float], slots: int, unit: Unit = "rate", slo: float | None = 2.5, seconds: float = 1.0
) -> Series:
    series = Series(name=name, unit=unit)
    for load in loads:
        rate = load if unit == "rate" else None
        at_once = 1 if unit == "rate" else int(load)
        run = made(rate=rate, concurrency=at_once, slots=slots, slo=slo, seconds=seconds, metrics=False)
        attained = run.summary.slo_attainment_rate
        meets = attained is None or attained >= 0.95
        series.add(SweepPoint(load=load, unit=unit, summary=run.summary, meets=meets))
    return series


def test_a_sweep_shows_where_the_server_tips_over(tmp_path: Path, figures: list[Figure]) -> None:
    draw_sweep([sweep("ours", [0.5, 1, 2, 4, 8, 16, 3.1], 4)], tmp_path / "a.png")
    told = texts(figures[0])
    verdicts = [text for text in told if text.startswith("ours: tips over at ")]
    assert len(verdicts) == 1 and "knee at" in verdicts[0]
    assert {"0.5", "16", "tipping point", "knee", "more than the server takes"} <= set(told)
    assert titles(figures[0]) == ["Latency over throughput", "Throughput over load", "SLO attainment"]


def test_a_sweep_over_flags_has_a_line_for_each(tmp_path: Path, figures: list[Figure]) -> None:
    name = "--dynamic-batch-max-size {} and more flags"
    draw_sweep([sweep(name.format(n), [0.5, 1, 2, 4, 8], n) for n in (1, 2, 4, 8)], tmp_path / "a.png")
    assert sum("--dynamic-batch-max-size" in text for text in texts(figures[0])) == 4
    assert any("too much already at 0.5 req/s" in text for text in texts(figures[0]))


def test_a_sweep_over_concurrency_without_a_goal(tmp_path: Path, figures: list[Figure]) -> None:
    draw_sweep([sweep("", [1, 2, 4, 8, 16, 32, 64], 4, "concurrency", None, 0.01)], tmp_path / "a.png")
    told = texts(figures[0])
    assert any(text.startswith("server: takes concurrency 64, the most that was tried; ") for text in told)
    assert "tipping point" not in told and "knee" in told and "latency (ms)" in told
    assert titles(figures[0]) == ["Latency over throughput", "Throughput over load"]


def test_a_sweep_of_one_point_or_of_nothing_that_was_answered(tmp_path: Path, figures: list[Figure]) -> None:
    draw_sweep([sweep("one", [2], 4)], tmp_path / "a.png")
    dead = SweepPoint(load=2, unit="rate", summary=all_failed().summary, meets=False)
    draw_sweep(
        [Series(name="dead", unit="rate", points=[dead]), Series(name="nothing", unit="rate")], tmp_path / "b.png"
    )
    assert "nothing: nothing was measured" in texts(figures[1])
