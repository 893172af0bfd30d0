import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib import rcParams
from matplotlib.figure import Figure
from PIL import Image
from tests.bench.figures import texts, titles, watched
from tests.bench.made import all_failed, made

from stepbatch.bench.report.canvas import Unit, brief, short
from stepbatch.bench.report.plots import draw_comparison, draw_run
from stepbatch.bench.report.summary import summarize
from stepbatch.bench.results import Result
from stepbatch.errors import OptionError, SetupError

Drawn = Callable[[str], tuple[Result, Figure, Path]]

SERVERS = [f"http://10.0.0.{i}:30200" for i in range(1, 11)]


def sent_late() -> Result:
    result = made(requests=30, rate=2, slo=2)
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
    "usual": lambda: made(slo=2.5, failing=["failed", "rejected", "timeout", "invalid"]),
    "one": lambda: made(requests=1, metrics=False),
    "milliseconds": lambda: made(requests=5000, seconds=0.02, slots=8, rate=300, slo=0.1),
    "all at once": lambda: made(requests=3000, seconds=0.5, slots=8, concurrency=3000, failing=["failed"] * 9),
    "hours": lambda: made(requests=20, seconds=4000, slo=3600, servers=SERVERS),
    "nothing answered": all_failed,
    "odd name": lambda: made(model="$x_$ 日本語 \\frac{1}{ % & [b] " * 20, requests=8, slo=0.001),
    "late": sent_late,
    "goals that differ": goals_that_differ,
}
WRITTEN = ("usual", "milliseconds", "nothing answered")  # the others are only laid out, which takes half as long
PANELS = {"one": 2, "hours": 3, "nothing answered": 3, "late": 3}  # of four: in most runs somebody waits


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Drawn:
    """A run of those, its figure as it was laid out, and where it is written: each is drawn once."""
    folder = tmp_path_factory.mktemp("pictures")

    @cache
    def draw(name: str) -> tuple[Result, Figure, Path]:
        with pytest.MonkeyPatch.context() as patched:
            figures, result = watched(patched, written=name in WRITTEN), RUNS[name]()
            draw_run(result, folder / f"{name}.png")
        (figure,) = figures
        return result, figure, folder / f"{name}.png"

    return draw


@pytest.mark.parametrize("name", RUNS)
def test_a_runs_picture_is_legible(name: str, drawn: Drawn) -> None:
    _, figure, path = drawn(name)
    assert titles(figure) == ["Latency", "Requests in flight", "Batch", "Queue"][: PANELS.get(name, 4)]
    inches = figure.get_size_inches()
    assert inches[0] == 12 and 800 / 1800 < inches[1] / inches[0] < 2200 / 1800
    if name in WRITTEN:
        with Image.open(path) as picture:
            picture.load()
            assert picture.format == "PNG" and picture.width == 1800 and 800 < picture.height < 2200
            colours = picture.convert("RGB").reduce(2).getcolors(1 << 24)
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
    draw_run(made(requests=3), tmp_path / "new" / "a.svg")
    assert dict(rcParams) == before
    ElementTree.parse(tmp_path / "new" / "a.svg")
    assert "<!-- Requests in flight -->" in (tmp_path / "new" / "a.svg").read_text()
    with pytest.raises(OptionError, match=r"pictures are written as .*, not as .*a\.jpg"):
        draw_run(made(requests=3), tmp_path / "a.jpg")
    (tmp_path / "file").write_text("")
    with pytest.raises(SetupError, match=r"can't write .*a\.png"):
        draw_run(made(requests=3), tmp_path / "file" / "a.png")


def test_a_comparison_names_all_runs_and_their_differences(tmp_path: Path, figures: list[Figure]) -> None:
    ours, serial = made(), made(slots=1, slo=2, failing=["failed"])
    draw_comparison({"ours": ours, "one at a time": serial, "x" * 90: made(slots=2)}, tmp_path / "a.png")
    told = texts(figures[0])
    change = serial.summary.throughput_qps / ours.summary.throughput_qps - 1
    assert f"{brief(serial.summary.throughput_qps)}  {change:+.0%}" in told
    assert "one at a time (1 of 64 failed)" in told and told.count("ours") == 4 and "SLO  2.00 s" in told
    assert titles(figures[0]) == ["Latency", "Throughput (req/s)", "Latency, mean (s)", "Latency, P99 (s)"]


def test_a_comparison_of_many_and_of_one_that_failed(tmp_path: Path, figures: list[Figure]) -> None:
    several = {f"run {i}": made(requests=3, slots=i) for i in range(1, 10)}
    draw_comparison({"none": all_failed(), **several}, tmp_path / "a.png")
    draw_comparison({"none": all_failed(), "nothing": all_failed()}, tmp_path / "b.png")
    told = texts(figures[0])
    assert "none (3 of 3 failed)" in told and told.count("none") == 2 + 3  # two latencies, and its name at three bars


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
