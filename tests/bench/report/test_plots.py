import re
from collections.abc import Callable, Sequence
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib import rcParams
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image
from tests.bench.made import made

from stepbatch.bench.report.canvas import Unit, brief, short
from stepbatch.bench.report.plots import draw_comparison, draw_run, draw_sweep
from stepbatch.bench.report.summary import summarize
from stepbatch.bench.results import Result
from stepbatch.bench.sweep.tipping import SweepPoint
from stepbatch.errors import OptionError, SetupError

Drawn = Callable[[str], tuple[Result, Figure, Path]]

SERVERS = [f"http://10.0.0.{i}:30200" for i in range(1, 11)]


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that were written, as they were then."""
    return watched(monkeypatch)


def watched(patched: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are written from now on."""
    seen: list[Figure] = []
    write = Figure.savefig

    def savefig(figure: Figure, *args: Any, **options: Any) -> None:
        write(figure, *args, **options)
        assert_texts_are_apart(figure)
        seen.append(figure)

    patched.setattr(Figure, "savefig", savefig)
    return seen


def assert_texts_are_apart(figure: Figure) -> None:
    """No text lies over another or beyond the figure's edge."""
    unseen = ticks_out_of_view(figure)
    found = [text for text in figure.findobj(Text) if isinstance(text, Text) and text.get_visible()]
    boxes = [(text.get_text(), text.get_window_extent()) for text in found if text.get_text() and text not in unseen]
    assert len(boxes) > 10
    width, height = figure.bbox.size
    for content, box in boxes:
        assert box.x0 >= -1 and box.y0 >= -1 and box.x1 <= width + 1 and box.y1 <= height + 1, (content, box)
    for (content, box), (other, its_box) in combinations([(text, box.padded(-1)) for text, box in boxes], 2):
        assert not box.overlaps(its_box), (content, other)


def ticks_out_of_view(figure: Figure) -> set[Text]:
    """Labels that matplotlib keeps but doesn't draw."""
    unseen = set()
    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        low, high = sorted(axis.get_view_interval())
        near = 1e-9 * (high - low)
        for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()):
            if not low - near <= tick.get_loc() <= high + near:
                unseen |= {tick.label1, tick.label2}
    return unseen


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(Text) if isinstance(text, Text) and text.get_visible()]


def titles(figure: Figure) -> list[str]:
    return [axes.get_title(loc="left") for axes in figure.axes]


def all_failed() -> Result:
    result = made("none", requests=3)
    for record in result.records:
        record.outcome = "failed"
    result.summary = summarize(result.records, result.samples)
    return result


def sent_late() -> Result:
    result = made("late", requests=30, rate=2, slo=2)
    for record in result.records:
        record.sent += 0.3
        record.ended += 0.3
    result.client.bottleneck = "its event loop was late by 300 ms, " + "and so on, " * 20
    result.summary = summarize(result.records, result.samples)
    return result


def goals_that_differ() -> Result:
    result = made(requests=8, slo=1.0)
    for record in result.records:
        record.slo_s = 2.0 + record.index
    result.summary = summarize(result.records, result.samples)
    return result


RUNS = {
    "usual": lambda: made("usual", slo=2.5, failing=["failed", "rejected", "timeout", "invalid"]),
    "one": lambda: made("one", requests=1, metrics=False),
    "milliseconds": lambda: made("many", requests=5000, seconds=0.02, slots=8, rate=300, slo=0.1),
    "all at once": lambda: made("burst", requests=3000, seconds=0.5, slots=8, concurrency=3000, failing=["failed"] * 9),
    "hours": lambda: made("hours", requests=20, seconds=4000, slo=3600, servers=SERVERS),
    "nothing answered": all_failed,
    "odd name": lambda: made("$x_$ 日本語 \\frac{1}{ % & [b] " * 20, requests=8, slo=0.001),
    "late": sent_late,
    "goals that differ": goals_that_differ,
}
PANELS = {"one": 2, "hours": 3, "nothing answered": 3, "late": 3}  # of four: in most runs somebody waits


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Drawn:
    """A run of those, its figure as it was written, and where: each is drawn once."""
    folder = tmp_path_factory.mktemp("pictures")

    @cache
    def draw(name: str) -> tuple[Result, Figure, Path]:
        with pytest.MonkeyPatch.context() as patched:
            figures, result = watched(patched), RUNS[name]()
            draw_run(result, folder / f"{name}.png")
        (figure,) = figures
        return result, figure, folder / f"{name}.png"

    return draw


@pytest.mark.parametrize("name", RUNS)
def test_a_runs_picture_is_legible(name: str, drawn: Drawn) -> None:
    _, figure, path = drawn(name)
    assert titles(figure) == ["Latency", "Requests in flight", "Batch", "Queue"][: PANELS.get(name, 4)]
    with Image.open(path) as picture:
        picture.load()
        assert picture.format == "PNG" and picture.width == 1800 and 800 < picture.height < 2200
        colours = picture.convert("RGB").getcolors(1 << 24)
        assert colours is not None and len(colours) > 50


def test_a_runs_picture_tells_how_requests_ended(drawn: Drawn) -> None:
    told = texts(drawn("usual")[1])
    assert "not in it: 1 invalid, 1 rejected, 1 timed out, 1 failed, of 64 requests" in told
    assert "answered (60)" in told and "failed (1)" in told and "in the server's queue" in told
    assert "SLO  2.50 s" in told and any(re.fullmatch(r"P99  \d\.\d\d s", text) for text in told)


def test_panels_without_data_are_left_out_with_a_note(drawn: Drawn) -> None:
    assert any("the server told nothing of its steps" in text for text in texts(drawn("one")[1]))
    assert not any("nothing of its steps" in text for text in texts(drawn("late")[1]))


def test_percentiles_lie_on_the_curve(drawn: Drawn) -> None:
    result, figure, _ = drawn("goals that differ")
    curve, *marks = figure.axes[0].lines
    x, y = curve.get_data()
    assert [mark.get_ydata()[0] for mark in marks] == [50, 90, 95, 99]  # type: ignore[index] # and no line for a goal
    for mark, known in zip(marks, ("latency_median", "latency_p90", "latency_p95", "latency_p99"), strict=True):
        (at,), (share,) = mark.get_data()
        assert at == pytest.approx(getattr(result.summary, known))
        assert share == pytest.approx(float(np.interp(at, x, y)))


def test_a_bottleneck_is_written_on_the_picture(drawn: Drawn) -> None:
    told = texts(drawn("late")[1])
    assert any(text.startswith("WARNING: the client was the bottleneck") for text in told)
    assert "due, not sent yet" in told


def test_goals_that_differ_by_request_are_told_as_a_span(drawn: Drawn) -> None:
    told = texts(drawn("goals that differ")[1])
    assert "SLO  2.00 s to 9.00 s, by request" in told
    assert any("% met their SLO" in text for text in told)


def test_other_formats_and_matplotlibs_settings_left_alone(tmp_path: Path) -> None:
    before = dict(rcParams)
    draw_run(made("ours", requests=3), tmp_path / "new" / "a.svg")
    assert dict(rcParams) == before
    ElementTree.parse(tmp_path / "new" / "a.svg")
    assert "<!-- Requests in flight -->" in (tmp_path / "new" / "a.svg").read_text()
    with pytest.raises(OptionError, match=r"pictures are written as .*, not as .*a\.jpg"):
        draw_run(made(requests=3), tmp_path / "a.jpg")
    (tmp_path / "file").write_text("")
    with pytest.raises(SetupError, match=r"can't write .*a\.png"):
        draw_run(made(requests=3), tmp_path / "file" / "a.png")


def test_a_comparison_names_all_runs_and_their_differences(tmp_path: Path, figures: list[Figure]) -> None:
    runs = [made("ours"), made("one at a time", slots=1, slo=2, failing=["failed"]), made("x" * 90, slots=2)]
    draw_comparison(runs, tmp_path / "a.png")
    told = texts(figures[0])
    change = runs[1].summary.throughput_qps / runs[0].summary.throughput_qps - 1
    assert f"{brief(runs[1].summary.throughput_qps)}  {change:+.0%}" in told
    assert "one at a time (1 of 64 failed)" in told and told.count("ours") == 4 and "SLO  2.00 s" in told
    assert titles(figures[0]) == ["Latency", "Throughput (req/s)", "Latency, mean (s)", "Latency, P99 (s)"]


def test_a_comparison_of_many_and_of_one_that_failed(tmp_path: Path, figures: list[Figure]) -> None:
    draw_comparison([all_failed(), *(made(f"run {i}", requests=3, slots=i) for i in range(1, 10))], tmp_path / "a.png")
    draw_comparison([all_failed(), all_failed()], tmp_path / "b.png")
    told = texts(figures[0])
    assert "none (3 of 3 failed)" in told and told.count("none") == 2 + 3  # two latencies, and its name at three bars


def sweep(
    loads: Sequence[float], slots: int, unit: Any = "rate", slo: float | None = 2.5, seconds: float = 1.0
) -> list[SweepPoint]:
    points = []
    for load in loads:
        rate = load if unit == "rate" else None
        at_once = 1 if unit == "rate" else int(load)
        run = made(rate=rate, concurrency=at_once, slots=slots, slo=slo, seconds=seconds, metrics=False)
        attained = run.summary.slo_attainment_rate
        meets = attained is None or attained >= 0.95
        points.append(SweepPoint(load=load, unit=unit, summary=run.summary, meets=meets))
    return points


def test_a_sweep_shows_where_the_server_tips_over(tmp_path: Path, figures: list[Figure]) -> None:
    points = sweep([0.5, 1, 2, 4, 8, 16, 3.1], 4)
    draw_sweep([("ours", points)], tmp_path / "a.png")
    told = texts(figures[0])
    verdicts = [text for text in told if text.startswith("ours: tips over at ")]
    assert len(verdicts) == 1 and "knee at" in verdicts[0]
    assert {"0.5", "16", "tipping point", "knee", "more than the server takes"} <= set(told)
    assert titles(figures[0]) == ["Latency over throughput", "Throughput over load", "SLO attainment"]


def test_a_sweep_over_flags_has_a_line_for_each(tmp_path: Path, figures: list[Figure]) -> None:
    runs = [(f"--dynamic-batch-max-size {n} and more flags", sweep([0.5, 1, 2, 4, 8], n)) for n in (1, 2, 4, 8)]
    draw_sweep(runs, tmp_path / "a.png")
    assert sum("--dynamic-batch-max-size" in text for text in texts(figures[0])) == 4
    assert any("too much already at 0.5 req/s" in text for text in texts(figures[0]))


def test_a_sweep_over_concurrency_without_a_goal(tmp_path: Path, figures: list[Figure]) -> None:
    draw_sweep([("", sweep([1, 2, 4, 8, 16, 32, 64], 4, "concurrency", None, 0.01))], tmp_path / "a.png")
    told = texts(figures[0])
    assert any(text.startswith("server: takes concurrency 64, the most that was tried; ") for text in told)
    assert "tipping point" not in told and "knee" in told and "latency (ms)" in told
    assert titles(figures[0]) == ["Latency over throughput", "Throughput over load"]


def test_a_sweep_of_one_point_or_of_nothing_that_was_answered(tmp_path: Path, figures: list[Figure]) -> None:
    draw_sweep([("one", sweep([2], 4))], tmp_path / "a.png")
    dead = SweepPoint(load=2, unit="rate", summary=all_failed().summary, meets=False)
    draw_sweep([("dead", [dead]), ("nothing", [])], tmp_path / "b.png")
    assert "nothing: nothing was measured" in texts(figures[1])


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0, "0.00 ms"), (0.0123, "12.3 ms"), (1.5, "1.50 s"), (299.0, "299 s"), (600.0, "10.0 min"), (9000.0, "2.50 h")],
)
def test_times_are_told_in_a_unit_that_suits_them(seconds: float, text: str) -> None:
    assert Unit(seconds).text(seconds) == text


def test_long_names_keep_both_ends() -> None:
    assert short("short") == "short"
    for length in (20, 31):
        name = short("a" * 40 + "z" * 40, length)
        assert len(name) in (length - 1, length) and re.fullmatch(r"a+…z+", name)
