"""``stepbatch bench sweep`` on real server processes that draw no pictures: four steps of 10 ms, so that one job after
another makes 25 requests a second, and four side by side 100."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import msgspec
import pytest
from PIL import Image

from stepbatch.__main__ import main
from stepbatch.bench.servers import running
from stepbatch.bench.sweep import picture
from stepbatch.bench.sweep.report import SweepResult

FAKE = [
    sys.executable,
    "-m",
    "stepbatch",
    "serve",
    "--backend",
    "fake",
    "--fake-step-ms",
    "10",
    "--log-level",
    "warning",
]
START = ["--server-command", shlex.join([*FAKE, "--port", "{port}"])]
WORK = [*("--dataset", "random", "--width", "64", "--height", "64", "--num-inference-steps", "4"), "--disable-tqdm"]


pytestmark = pytest.mark.usefixtures("forked_servers")


@pytest.fixture(scope="module")
def url(forked_servers: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    command = [*FAKE, "--port", "0", "--dynamic-batch-max-size", "4"]
    with running(command, tmp_path_factory.mktemp("server") / "log") as server:
        yield server.base_url


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of something else than the picture, which takes longer than what they measure."""
    monkeypatch.setattr(picture, "draw_sweep", lambda all_series, path: None)


def sweep(*arguments: str) -> int:
    return main(["bench", "sweep", *WORK, *arguments])


def swept(output: Path, *arguments: str, status: int = 0) -> SweepResult:
    assert sweep("--output-file", str(output), *arguments) == status
    return kept(output)


def kept(output: Path) -> SweepResult:
    return msgspec.json.decode(output.read_bytes(), type=SweepResult)


def loads(result: SweepResult) -> list[list[float]]:
    return [[point.load for point in series.points] for series in result.series]


def wide(path: Path) -> bool:
    with Image.open(path) as drawn:
        return drawn.size[0] > 1000


def answers(base_url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{base_url}/health", timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def addresses(folder: Path) -> list[str]:
    """Where the servers that were started said they listen."""
    return [match for log in sorted(folder.glob("*.out")) for match in re.findall(r"http://\S+", log.read_text())]


def test_finds_where_a_server_tips_over(url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = "--slo 0.4 --slo-attainment 0.8 --duration 0.8 --precision 0.5"
    result = swept(tmp_path / "sweep.json", "--base-url", url, *flags.split())
    (series,) = result.series
    assert series.unit == "rate"
    assert series.tipping is not None
    assert series.tipping < 200  # twice what it can do
    assert result.idle_s is not None
    assert result.idle_s >= 0.04  # four steps
    assert series.points[0].load == pytest.approx(0.5 / result.idle_s, rel=0.01)
    good = [point.load for point in series.points if point.good]
    bad = [point.load for point in series.points if not point.good]
    assert max(good) == series.tipping
    assert min(bad) <= 1.5 * series.tipping
    assert all(point.summary.requests == max(16, round(0.8 * point.load)) for point in series.points)
    assert all(point.work is not None and point.work.request_rate == point.load for point in series.points)
    said = capsys.readouterr().out
    assert "tips over here" in said
    assert f"tips over at {series.tipping:g} req/s: the highest rate at which 80% of requests met 0.4 s; at " in said
    assert "throughput's knee" in said
    assert str(tmp_path / "sweep.png") in said
    assert wide(tmp_path / "sweep.png")


def test_tells_what_more_in_flight_brings_and_how_it_takes_more_a_second(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = "--concurrencies 1,8,16 --request-rates 20,40 --duration 0.5"
    result = swept(tmp_path / "sweep.json", "--base-url", url, *flags.split())
    series, by_rate = result.series
    assert loads(result) == [[1, 8, 16], [20, 40]]
    assert [point.summary.requests for point in series.points] == [16, 32, 64]
    assert [point.work.max_concurrency for point in series.points if point.work] == [1, 8, 16]
    alone, batched, _ = (point.summary for point in series.points)
    assert batched.throughput_qps > 2 * alone.throughput_qps
    assert (batched.jobs_per_step or 0) > 2 * (alone.jobs_per_step or 1)
    assert series.knee != 1
    assert series.tipping is None
    assert [point.summary.requests for point in by_rate.points] == [16, 20]
    said = capsys.readouterr().out
    assert "throughput's knee" in said
    for unit in ("concurrency", "rate"):
        assert str(tmp_path / f"sweep-{unit}.png") in said
        assert wide(tmp_path / f"sweep-{unit}.png")


@pytest.mark.usefixtures("undrawn")
def test_without_a_goal_the_search_over_what_is_in_flight_ends_where_it_brings_nothing(
    url: str, tmp_path: Path
) -> None:
    flags = ["--base-url", url, "--concurrencies", "auto", "--num-prompts", "12"]
    (series,) = swept(tmp_path / "sweep.json", *flags).series
    done = {point.load: point.summary.throughput_qps for point in series.points}
    assert list(done) == [2**i for i in range(len(done))]
    *rising, before, last = done.values()
    assert last < 1.05 * max(*rising, before)
    assert 3 <= len(done) <= 8  # 4 jobs share a step, 12 requests are all there are, a busy machine varies


@pytest.mark.usefixtures("undrawn")
def test_with_a_goal_it_ends_with_the_goal(url: str, tmp_path: Path) -> None:
    # 16 at once on four slots take four rounds of 40 ms
    flags = "--concurrencies auto --slo 0.13 --slo-attainment 0.8 --precision 1 --num-prompts 16"
    (series,) = swept(tmp_path / "sweep.json", "--base-url", url, *flags.split()).series
    *good, bad = series.points
    assert [point.load for point in series.points] == [2**i for i in range(len(series.points))]
    assert all(point.good for point in good)
    assert not bad.good
    assert series.tipping == good[-1].load < 16


def test_variants_of_a_server_are_held_to_one_goal_and_kept_when_one_does_not_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # the third variant's flag is none of the server's
    flags = "--slo --slo-scale 3 --request-rates 60 --duration 0.8 --server-flag dynamic-batch-max-size=4,1,many"
    result = swept(tmp_path / "sweep.json", *START, *flags.split(), status=2)
    batched, single = result.series
    assert [batched.name, single.name] == ["dynamic-batch-max-size=4", "dynamic-batch-max-size=1"]
    assert loads(result) == [[60], [60]]
    assert result.idle_s is not None
    assert result.slo_s == pytest.approx([3 * result.idle_s])  # measured once
    assert not single.points[0].good
    assert single.points[0].summary.jobs_per_step == pytest.approx(1.0)
    assert (batched.points[0].summary.jobs_per_step or 0) > 1.5
    assert [point.summary.requests for point in batched.points] == [48]
    assert result.options["server_flag"] == ["dynamic-batch-max-size=4,1,many"]
    urls = addresses(tmp_path / "sweep-logs")
    assert len(set(urls)) == 2
    assert not any(answers(url) for url in urls)
    said = capsys.readouterr()
    assert "dynamic-batch-max-size=1: " in said.out
    assert "the server ended with status 2: stepbatch: error: --dynamic-batch-max-size" in said.err
    assert wide(tmp_path / "sweep.png")


@pytest.mark.usefixtures("undrawn")
def test_several_servers_share_the_load_and_may_say_themselves_where_they_listen(tmp_path: Path) -> None:
    command = shlex.join([*FAKE, "--port", "0", "--dynamic-batch-max-size", "4"])
    flags = ["--server-command", command, "--servers", "2", "--concurrencies", "8", "--num-prompts", "32", "--slo"]
    result = swept(tmp_path / "sweep.json", *flags)
    urls = addresses(tmp_path / "sweep-logs")
    assert len(urls) == 2
    assert [server["base_url"] for server in result.servers] == urls
    assert not any(answers(url) for url in urls)
    summary = result.series[0].points[0].summary
    assert summary.completed_requests == 32
    assert 1 <= (summary.jobs_per_step or 0) <= 4


@pytest.mark.usefixtures("undrawn")
def test_failures_make_the_status_1_and_timeouts_do_not(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--base-url", url, "--concurrencies", "2", "--num-prompts", "4"]
    assert sweep(*flags, "--extra-body", '{"prompt": "[raise-denoise]"}') == 1
    said = capsys.readouterr().out
    assert "4 failed" in said
    assert "never met the goal: at concurrency 2 0% of requests were answered" in said
    assert sweep(*flags, "--timeout", "0.02") == 0
    assert "4 timed out" in capsys.readouterr().out


@pytest.mark.usefixtures("undrawn")
def test_outputs_of_each_load_have_a_folder(url: str, tmp_path: Path) -> None:
    assert (
        sweep("--base-url", url, "--concurrencies", "1,2", "--num-prompts", "3", "--save-outputs", str(tmp_path)) == 0
    )
    assert len(list(tmp_path.glob("server/concurrency-1/*"))) == 3
    assert len(list(tmp_path.glob("server/concurrency-2/*"))) == 3


def test_one_that_is_told_to_end_keeps_what_it_has_and_leaves_no_server(tmp_path: Path) -> None:
    told = {signal.SIGINT: 130, signal.SIGTERM: 143}
    with ExitStack() as stack:  # both at once, for most of it is starting
        processes = {number: stack.enter_context(sweeping(tmp_path / f"{number.name}.json")) for number in told}
        for process in processes.values():
            stack.callback(process.kill)  # so that one that hangs fails the test and doesn't hang it
        for number, process in processes.items():
            output, deadline = tmp_path / f"{number.name}.json", time.monotonic() + 60
            while not (output.exists() and json.loads(output.read_text() or "{}").get("series")):
                assert time.monotonic() < deadline
                time.sleep(0.05)
            time.sleep(0.5)
            process.send_signal(number)
        for number, process in processes.items():
            said, _ = process.communicate(timeout=60)
            assert process.returncode == told[number]
            assert loads(kept(tmp_path / f"{number.name}.json")) == [[1]]
            assert "throughput's knee" in said
            (address,) = addresses(tmp_path / f"{number.name}-logs")
            assert not answers(address)


def sweeping(output: Path) -> subprocess.Popen[str]:
    """A sweep in a process of its own, whose second load takes long."""
    flags = [*WORK, *START, "--concurrencies", "1,400", "--output-file", str(output)]
    command = [sys.executable, "-m", "stepbatch", "bench", "sweep", *flags]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--request-rates fast", "--request-rates"),
        ("--server-flag x=1", "--server-command"),
        ("--dataset vbench", "--dataset-path"),
        ("--precision 0", "--precision"),
        ("--server-command 'no-such-program --port {port}'", "can't start no-such-program --port"),
        ("--base-url http://127.0.0.1:1 --ready-timeout 0", "127.0.0.1:1"),
        ("--output-file /dev/null/sweep.json", "can't write /dev/null/sweep.json"),
    ],
)
def test_what_cannot_be_is_said_in_a_line(flags: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep(*shlex.split(flags)) == 2
    said = capsys.readouterr()
    assert message in said.err
    assert said.err.count("\n") == 1
    assert said.out == ""


def test_earlier_results_stay_when_nothing_comes_of_a_sweep(tmp_path: Path) -> None:
    output = tmp_path / "sweep.json"
    output.write_text("earlier")
    assert sweep("--server-command", "no-such-program", "--output-file", str(output)) == 2
    assert output.read_text() == "earlier"
