"""``stepbatch bench serving`` on a real server process that draws no pictures."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from stepbatch.__main__ import main
from stepbatch.bench.results import load
from stepbatch.demo.burst import serving

VBENCH = [{"prompt_en": f"a cat number {i}", "dimension": ["subject_consistency"]} for i in range(5)]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    flags = ["--backend", "fake", "--fake-step-ms", "2", "--served-model-name", "Qwen/Qwen-Image-2512"]
    with serving(flags, tmp_path_factory.mktemp("server") / "log") as server:
        yield f"http://{server.host}:{server.port}"


def size(path: Path) -> tuple[int, int]:
    with Image.open(path) as picture:
        return picture.size


def bench(*arguments: str) -> int:
    return main(["bench", "serving", "--disable-tqdm", *arguments])


def test_the_line_that_users_know_works(url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = tmp_path / "VBench_full_info.json"
    prompts.write_text(json.dumps(VBENCH))
    line = (
        f"--base-url {url} --model Qwen/Qwen-Image-2512 --dataset vbench --dataset-path {prompts} --task text-to-image"
    )
    line += " --width 512 --height 512 --num-prompts 64 --max-concurrency 4 --request-rate inf --disable-tqdm"
    assert main(["bench", "serving", *line.split()]) == 0
    said = capsys.readouterr().out
    for row in ("Successful requests:", "Request throughput (req/s):", "Latency P99 (s):", "Jobs per step:"):
        assert row in said
    assert "64/64" in said


def test_all_that_was_measured_is_kept(url: str, tmp_path: Path) -> None:
    output = tmp_path / "new" / "run.json"
    flags = f"--base-url {url} --dataset random --num-prompts 12 --request-rate 60 --width 64 --height 48 --seed 7"
    assert bench(*flags.split(), "--n", "2", "--slo", "30", "--api-key", "s3cret", "--output-file", str(output)) == 0
    result = load(output)
    assert result.summary.completed_requests == len(result.records) == 12
    assert result.summary.completed_outputs == 24
    assert result.summary.slo_attainment_rate == 1.0
    assert [record.asked["seed"] for record in result.records] == list(range(7, 19))
    assert all(record.queue_s is not None and record.service_s is not None for record in result.records)
    assert [record.intended for record in result.records] == sorted(record.intended for record in result.records)
    assert result.samples[-1].steps
    assert result.servers[0]["model"] == "Qwen/Qwen-Image-2512"
    assert "s3cret" not in output.read_text()
    assert size(output.with_suffix(".png"))[0] > 1000


def test_kinds_mix_and_outputs_are_saved(url: str, tmp_path: Path) -> None:
    profiles = [
        {"weight": 1, "size": "64x48", "num_inference_steps": 2},
        {"weight": 1, "task": "image-to-image", "size": "96x64", "num_inference_steps": 3, "strength": 0.6},
    ]
    folder, output = tmp_path / "outputs", tmp_path / "run.json"
    flags = f"--base-url {url} --dataset random --num-prompts 16 --max-concurrency 8 --seed 1 --save-outputs {folder}"
    arguments = ["--random-request-config", json.dumps(profiles), "--slo", "--output-file", str(output)]
    assert bench(*flags.split(), *arguments) == 0
    result = load(output)
    assert {record.asked["task"] for record in result.records} == {"text-to-image", "image-to-image"}
    assert len({record.slo_s for record in result.records}) == 2  # each kind has a goal of its own
    assert {size(path) for path in folder.iterdir()} == {(64, 48), (96, 64)}
    assert len(list(folder.iterdir())) == 16


def test_failures_are_told_and_make_the_status_1(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    line = f"--base-url {url} --dataset random --num-prompts 4 --width 64 --height 64"
    assert bench(*line.split(), "--extra-body", '{"prompt": "[raise-denoise]"}', "--warmup-requests", "0") == 1
    said = capsys.readouterr().out
    assert "0/4" in said
    assert "the model failed on this request" in said


def test_what_the_server_refuses_is_not_measured(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench("--base-url", url, "--model", "another", "--num-prompts", "4") == 2
    assert "another" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--dataset vbench", "--dataset-path"),
        ("--request-rate 0", "--request-rate"),
        ("--width 64", "--width and --height"),
        ("--base-url nonsense", "--base-url"),
        ("--base-url http://127.0.0.1:1 --ready-timeout 0", "127.0.0.1:1"),
        ("--num-promts 4", "--num-prompts"),
    ],
)
def test_what_cannot_be_is_said_in_a_line(flags: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench(*flags.split()) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_what_could_not_be_kept_is_not_measured(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    run = ["--base-url", url, "--num-prompts", "1", "--output-file"]
    for path, why in (
        (tmp_path / "run.png", "can't be both"),
        (tmp_path, "it is a folder"),
        (tmp_path / "file" / "run.json", "can't write"),
    ):
        assert bench(*run, str(path)) == 2
        said = capsys.readouterr()
        assert why in said.err
        assert not said.out  # nothing was measured in vain
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert bench(*run, str(tmp_path / "run.json")) == 2
    assert "stepbatch[bench]" in capsys.readouterr().err
