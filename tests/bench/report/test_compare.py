import re
from pathlib import Path

import pytest
from PIL import Image
from tests.bench.made import made

from stepbatch.bench.report.compare import run_compare
from stepbatch.bench.report.summary import summarize
from stepbatch.bench.report.table import number
from stepbatch.bench.results import Result, save
from stepbatch.errors import OptionError, SetupError


def saved(folder: Path, **results: Result) -> list[Path]:
    for name, result in results.items():
        save(result, folder / f"{name}.json")
    return [folder / f"{name}.json" for name in results]


def rows(text: str) -> dict[str, list[str]]:
    lines = [[cell.strip() for cell in line.strip("│").split("│")] for line in text.splitlines() if line[:1] == "│"]
    return {cells[0]: cells[1:] for cells in lines}


def test_differences_are_told_with_whether_they_are_for_the_better(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slow, fast = made(slots=1, slo=3.0), made(slots=4, slo=3.0)
    assert run_compare(saved(tmp_path, a=slow, b=fast)) == 0
    text = capsys.readouterr().out
    assert "64 requests of demo, text-to-image, concurrency 8" in text
    found, a, b = rows(text), slow.summary, fast.summary
    share = 100 * (b.throughput_qps / a.throughput_qps - 1)
    assert found["Request throughput (req/s)"] == [
        number(a.throughput_qps),
        number(b.throughput_qps),
        f"+{share:.1f}% better",
    ]
    assert re.fullmatch(r"-\d+\.\d% better", found["Latency P99 (s)"][2])
    assert re.fullmatch(r"-\d+\.\d% better", found["Duration (s)"][2])
    assert re.fullmatch(r"\+\d+\.\d points better", found["SLO attainment"][2])
    assert re.fullmatch(r"\+\d+\.\d%", found["Jobs per step"][2])  # more is no merit by itself
    assert found["Requests not answered well"] == ["0", "0", ""]
    assert "Peak memory (MB)" not in found and "warning" not in text

    run_compare(saved(tmp_path, b=fast, a=slow))
    assert rows(capsys.readouterr().out)["Latency P99 (s)"][2].endswith("% worse")


def test_a_small_difference_is_neither_better_nor_worse(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = made(), made()
    b.summary.throughput_qps = a.summary.throughput_qps * 1.004
    run_compare(saved(tmp_path, a=a, b=b))
    assert rows(capsys.readouterr().out)["Request throughput (req/s)"][2] == "+0.4%"


def test_several_runs_are_each_held_against_the_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_compare(saved(tmp_path, a=made(), b=made(), c=made(slots=2)))
    text = capsys.readouterr().out
    (heads,) = [line for line in text.splitlines() if line[:1] == "┃"]
    assert heads.replace("┃", " ").split() == ["a", "b", "Δ", "c", "Δ"]
    assert rows(text)["Duration (s)"][2] == "+0.0%" and rows(text)["Duration (s)"][4].endswith("worse")


def test_files_of_one_name_are_told_apart_by_their_paths(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    run_compare([*saved(one, run=made()), *saved(two, run=made())])
    text = capsys.readouterr().out
    assert str(one / "run.json") in text and str(two / "run.json") in text


def test_brackets_in_names_are_no_markup(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_compare(saved(tmp_path, **{"[red]a": made(), "[bold]b": made()}))
    text = capsys.readouterr().out
    assert "[red]a" in text and "[bold]b" in text


def test_a_picture_is_drawn_where_it_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "pictures" / "both.png"
    run_compare(saved(tmp_path, a=made(), b=made(slots=2)), path)
    assert capsys.readouterr().out.endswith(f"{path}\n")
    with Image.open(path) as picture:
        assert picture.format == "PNG" and picture.width > 1000


def test_different_work_is_not_compared(tmp_path: Path) -> None:
    a, b = saved(tmp_path, a=made(), b=made(concurrency=4))
    with pytest.raises(OptionError, match=rf"^{re.escape(f'{a} and {b}')} did different work: load$"):
        run_compare([a, b])
    other = made()
    other.work.parts = other.work.parts | {"sizes": "others", "load": "other"}
    other.work.digest = "another"
    with pytest.raises(OptionError, match=r"did different work: sizes, load$"):
        run_compare([a, *saved(tmp_path, c=other)])


def test_work_that_differs_in_no_known_part_is_refused_too(tmp_path: Path) -> None:
    other = made()
    other.work.digest = "another"
    with pytest.raises(OptionError, match="did different work: their digests differ"):
        run_compare(saved(tmp_path, a=made(), b=other))


def test_what_can_not_be_compared(tmp_path: Path) -> None:
    (path,) = saved(tmp_path, a=made(requests=2))
    for few in ([], [path]):
        with pytest.raises(OptionError, match="needs the files of two runs or more"):
            run_compare(few)
    with pytest.raises(OptionError, match=r"a\.json is given twice"):
        run_compare([path, tmp_path / "." / "a.json"])
    with pytest.raises(SetupError, match=r"can't read .*none\.json"):
        run_compare([path, tmp_path / "none.json"])
    other = tmp_path / "other.json"
    other.write_text('{"some": "JSON"}')
    with pytest.raises(SetupError, match=r"other\.json is no result of stepbatch bench serving"):
        run_compare([path, other])
    with pytest.raises(OptionError, match=r"pictures are written as \.png, \.svg, \.pdf, not as .*both\.txt"):
        run_compare(saved(tmp_path, b=made(requests=2), c=made(requests=2)), tmp_path / "both.txt")


def test_what_readers_should_know_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b, c = made(), made(failing=["failed", "timeout"]), made()
    b.environment = b.environment | {"python": "3.12", "date": "later"}
    c.client.bottleneck = "requests were sent 80 ms late"
    c.records = c.records[:60]
    c.summary = summarize(c.records, c.samples)
    run_compare(saved(tmp_path, a=a, b=b, c=c))
    text = capsys.readouterr().out
    assert rows(text)["Requests not answered well"] == ["0", "2", "+2 worse", "0", ""]
    assert [line for line in text.splitlines() if line.startswith("warning: ")] == [
        "warning: b: 2 of 64 requests were not answered well, and are in no latency",
        "warning: c: the client was the bottleneck, not the server: requests were sent 80 ms late",
        "warning: c: stopped after 60 of its requests",
        "warning: b: measured elsewhere or otherwise than a: python (3.12, not 3.11)",
    ]


def test_other_goals_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_compare(saved(tmp_path, a=made(slo=2.0), b=made(slo=3.0), c=made()))
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")] == [
        "warning: b: held to other goals than a: 3.00 s, not 2.00 s: attainment and goodput don't compare",
        "warning: c: held to other goals than a: none, not 2.00 s: attainment and goodput don't compare",
    ]


def test_a_run_without_an_answer_has_no_differences(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dead = made(requests=6)
    for record in dead.records:
        record.outcome = "failed"
    dead.summary = summarize(dead.records, [])
    alive = made(requests=6)
    run_compare(saved(tmp_path, a=dead, b=alive), tmp_path / "both.png")
    found = rows(capsys.readouterr().out)
    assert found["Latency mean (s)"] == ["-", number(alive.summary.latency_mean or 0), ""]
    assert found["Request throughput (req/s)"] == ["0.00", number(alive.summary.throughput_qps), ""]
    assert found["Requests not answered well"] == ["6", "0", "-6 better"]
