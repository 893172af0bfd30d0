"""Bulk generation with the fake model: names, tables, resuming, failures."""

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from tests.pictures import file, image

from stepbatch.__main__ import main
from stepbatch.cli.bulk import Bulk, Results, bars, generate_all
from stepbatch.cli.requests import Source
from stepbatch.config import BatchingConfig, EngineConfig, ModelConfig
from stepbatch.errors import SetupError
from stepbatch.image import InputImage
from stepbatch.testing import FakeRunner

CONFIG = EngineConfig(model=ModelConfig(fake_step_ms=0.0), batching=BatchingConfig(dynamic_batch_max_size=4))
Run = Callable[..., Bulk]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Run lines, and prompts, into ``tmp_path / "out"``."""

    def go(lines: list[Any], prompts: list[str] | None = None, **common: Any) -> Bulk:
        file = tmp_path / "in.jsonl"
        file.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
        (tmp_path / "out").mkdir(exist_ok=True)
        with bars(Console(file=io.StringIO())) as progress:
            results = Results(tmp_path / "out", "png")
            bulk = Bulk(Source(prompts or [], file, common), results, FakeRunner(CONFIG.model), CONFIG, progress)
            bulk.run()
        return bulk

    return go


def table(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "out" / name).read_text().splitlines()]


def test_a_request_a_line(run: Run, tmp_path: Path) -> None:
    bulk = run([{"prompt": "a", "seed": 5, "n": 2}, "", {"prompt": "b", "size": "32x48", "id": "x.y"}], seed=9)
    assert (bulk.made, bulk.skipped, bulk.failed) == (3, 0, 0)
    lines = {line["file"]: line for line in table(tmp_path, "results.jsonl")}
    assert {file: line["seed"] for file, line in lines.items()} == {
        "000001-0.png": 5,
        "000001-1.png": 6,
        "x.y-0.png": 9,
    }
    assert lines["x.y-0.png"]["size"] == "32x48"
    assert set(lines["x.y-0.png"]["times"]) == {"queue", "encode", "denoise", "decode"}
    for name, line in lines.items():
        picture = Image.open(tmp_path / "out" / name)
        assert picture.tobytes() == FakeRunner.pixels(line["prompt"], line["seed"], *picture.size)


def test_what_a_line_says_goes_before_the_flags(run: Run, tmp_path: Path) -> None:
    run([{"prompt": "a", "width": 16, "height": 32}, {"prompt": "b"}], size="48x64", num_inference_steps=2)
    assert [line["size"] for line in table(tmp_path, "results.jsonl")] == ["16x32", "48x64"]


def test_goes_on_where_it_stopped(run: Run, tmp_path: Path) -> None:
    lines = [{"prompt": f"p{i}"} for i in range(6)]
    run(lines)
    out = tmp_path / "out"
    (out / "000002-0.png").unlink()  # its file is gone
    text = (out / "results.jsonl").read_text().splitlines()
    (out / "results.jsonl").write_text("\n".join(text[:-1]) + "\n" + text[-1][:20])  # its line was cut off
    lines[3] = {"prompt": "another"}  # it is another request now
    again = run(lines)
    assert (again.made, again.skipped) == (3, 3)
    assert run(lines).skipped == 6


def test_failures_are_written_down_and_hold_up_nobody(run: Run, tmp_path: Path) -> None:
    bad: list[Any] = [
        "not json",
        "[1]",
        {"prompt": "a", "stps": 3},
        {"prompt": "a", "size": "1x"},
        {"prompt": "a", "size": "16x16", "width": 16},
        {"prompt": "a", "id": "../x"},
        {"prompt": "a", "width": 17, "height": 16},
        {"prompt": "[nan]"},
        {"prompt": "[raise-encode]"},
        {},
        {"prompt": "a", "id": "000001"},
    ]
    bulk = run([*bad, {"prompt": "good"}])
    assert (bulk.made, bulk.failed) == (1, len(bad))
    errors = {line["id"]: line["code"] for line in table(tmp_path, "errors.jsonl")}
    assert errors["000003"] == "unknown_parameter"
    assert errors["000008"] == "invalid_model_output"
    assert errors["000009"] == "generation_failed"
    assert len(table(tmp_path, "errors.jsonl")) == len(bad)
    assert [line["prompt"] for line in table(tmp_path, "results.jsonl")] == ["good"]


def test_holds_a_window_not_the_file(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    most = 0
    step = FakeRunner.denoise

    def denoise(self: FakeRunner, jobs: Any, tick: Any) -> None:
        nonlocal most
        most = max(most, len(jobs))
        step(self, jobs, tick)

    monkeypatch.setattr(FakeRunner, "denoise", denoise)
    taken: list[int] = []
    take = Bulk._take
    monkeypatch.setattr(Bulk, "_take", lambda self, item: (take(self, item), taken.append(len(self._open))))
    bulk = run([{"prompt": str(i), "num_inference_steps": 4} for i in range(60)])
    assert bulk.made == 60
    assert most == 4
    assert max(taken) <= bulk.window


def test_prompts_never_overwrite_each_other(run: Run, tmp_path: Path) -> None:
    for _ in range(2):
        run([], ["A star!", "a star", "ein Stern / étoile"])
    assert len(list((tmp_path / "out").glob("a-star-????????-0.png"))) == 4
    assert run([], ["a star"], seed=1).made == 1
    assert run([], ["a star"], seed=1).skipped == 1


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands run the fake model; the real module loads torch."""
    runner = SimpleNamespace(load_runner=lambda config: FakeRunner(config.model))
    monkeypatch.setitem(sys.modules, "stepbatch.engine.backends", runner)


@pytest.mark.usefixtures("fake")
def test_images_are_edited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    room, chair, hole = image(size=(48, 32)), image(size=(16, 16), seed=1), Image.new("L", (48, 32), 255)
    for name, picture in (("room.png", room), ("chair.webp", chair), ("hole.png", hole)):
        (tmp_path / name).write_bytes(file(picture, Path(name).suffix[1:], lossless=True))

    def made(*arguments: str) -> set[Path]:
        before = set(Path("output").glob("*.png"))
        assert main(["edit", *arguments, "A cat!", "--seed", "5", "--fake-step-ms", "0"]) == 0
        return set(Path("output").glob("*.png")) - before

    for arguments, pictures in (
        (["room.png"], [room]),
        (["room.png", "chair.webp"], [room, chair]),
        (["chair.webp", "room.png"], [chair, room]),
        (["room.png", "--mask", "hole.png", "--strength", "0.5"], [room, hole]),
    ):
        (path,) = made(*arguments)
        got = Image.open(path)
        inputs = [InputImage(*picture.size, picture.tobytes()) for picture in pictures]
        assert got.size == pictures[0].size
        assert got.tobytes() == FakeRunner.pixels("A cat!", 5, *got.size, inputs)
        assert path.name.startswith("a-cat-")
        assert made(*arguments) == set()  # it is there already
    assert made("room.png", "--strength", "0.5")
    (tmp_path / "room.png").write_bytes(file(room.rotate(180)))
    assert made("room.png")  # the same file's name, another picture


@pytest.mark.usefixtures("fake")
def test_what_the_model_can_not_do_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.png").write_bytes(file(image()))
    arguments = [*[str(tmp_path / "a.png")] * 5, "a cat", "-o", str(tmp_path / "out")]
    assert main(["edit", *arguments]) == 1
    assert "at most 4 images" in " ".join(capsys.readouterr().err.split())


def test_the_bars_count_the_steps_that_are_taken(run: Run, tmp_path: Path) -> None:
    picture = InputImage(16, 16, bytes(3 * 256))
    common = {"images": (picture,), "strength": 0.5, "num_inference_steps": 8, "seed": 1}
    for _ in range(2):  # the second time they are skipped
        bars = run([], ["a"], **common).progress.tasks
        assert [(bar.total, bar.completed) for bar in bars] == [(1, 1), (4, 4)]


@pytest.mark.usefixtures("fake")
def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate_all(Source(["a", "b"], None, {"n": 2}), tmp_path / "o", "webp", CONFIG) == 0
    assert len(list((tmp_path / "o").glob("*.webp"))) == 4
    assert "4 made, 0 there already, 0 failed" in " ".join(capsys.readouterr().err.split())
    assert generate_all(Source(["[nan]"], None, {}), tmp_path / "o", "webp", CONFIG) == 1
    (tmp_path / "file").touch()
    with pytest.raises(SetupError, match="can't write to"):
        generate_all(Source(["a"], None, {}), tmp_path / "file", "png", CONFIG)


VIDEOS = EngineConfig(model=ModelConfig(fake_step_ms=0.0, fake_videos=True))


def clip(path: Path) -> tuple[int, float, tuple[int, int]]:
    """How many frames a video has, how many a second, and its size."""
    with av.open(str(path)) as video:
        stream = video.streams.video[0]
        return len(list(video.decode(stream))), float(stream.average_rate or 0), (stream.width, stream.height)


@pytest.mark.usefixtures("fake")
def test_a_model_of_videos_makes_videos(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [
        {"prompt": "a", "id": "short"},
        {"prompt": "a", "seconds": 0.5, "fps": 16, "id": "timed"},
        {"prompt": "a", "num_frames": 5, "n": 2, "id": "two"},
        {"prompt": "a", "seconds": 99, "id": "long"},
        {"prompt": "a", "seconds": "x", "id": "never"},
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    source = Source([], tmp_path / "in.jsonl", {"seconds": "2"})
    out = tmp_path / "out"
    assert generate_all(source, out, None, VIDEOS, video=True) == 1
    assert "4 made, 0 there already, 2 failed" in " ".join(capsys.readouterr().err.split())
    assert {path.name: clip(path) for path in out.glob("*.mp4")} == {
        "short-0.mp4": (17, 8.0, (64, 64)),
        "timed-0.mp4": (9, 16.0, (64, 64)),
        "two-0.mp4": (5, 8.0, (64, 64)),
        "two-1.mp4": (5, 8.0, (64, 64)),
    }
    table = {line["file"]: line for line in map(json.loads, (out / "results.jsonl").read_text().splitlines())}
    assert (table["timed-0.mp4"]["num_frames"], table["timed-0.mp4"]["fps"]) == (9, 16)
    errors = {line["id"]: line["param"] for line in map(json.loads, (out / "errors.jsonl").read_text().splitlines())}
    assert errors == {"long": "seconds", "never": "seconds"}
    assert generate_all(source, out, None, VIDEOS) == 1
    assert "0 made, 4 there already" in " ".join(capsys.readouterr().err.split())


@pytest.mark.usefixtures("fake")
def test_the_command_makes_videos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    room = image(size=(48, 32))
    (tmp_path / "room.png").write_bytes(file(room))
    flags = "--video --seconds 1 --fps 12 --image room.png --seed 5 --guidance-scale-2 2 --fake-videos --fake-step-ms 0"
    assert main(["generate", "A cat!", *flags.split()]) == 0
    (path,) = Path("output").glob("a-cat-*.mp4")
    assert clip(path) == (13, 12.0, (48, 32))
    with av.open(str(path)) as video:
        first = next(video.decode(video=0)).to_ndarray(format="rgb24")
    drawn = FakeRunner.pixels("A cat! 0", 5, 1, 1, [InputImage(*room.size, room.tobytes())])
    assert np.abs(first.mean((0, 1)) - np.frombuffer(drawn, np.uint8)).max() < 8
    assert main(["generate", "A cat!", *flags.replace("seconds 1", "seconds 2").split()]) == 0
    assert len(list(Path("output").glob("a-cat-*.mp4"))) == 2  # another length, another file


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--video", "--video: fake makes pictures"),
        ("--fake-videos --output-format png", "--output-format is for pictures: fake makes videos, which are mp4"),
        ("--video --output-format png", "--output-format is for pictures: videos are mp4"),
        ("--seconds 0", "--seconds: seconds must be a number of more than 0"),
        ("--seconds 2 --num-frames 9", "--seconds: seconds goes without num_frames"),
        ("--image nowhere.png", "there is no file nowhere.png"),
    ],
)
def test_videos_that_can_not_be(flags: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "a cat", *flags.split(), "-o", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("fake")
def test_seconds_of_a_picture_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "a cat", "--seconds", "2", "-o", str(tmp_path / "out")]) == 1
    assert "seconds has no effect on this model" in " ".join(capsys.readouterr().err.split())
