"""The command, from flags to files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stepbatch.__main__ import main

CURVE = "qwen-image-2512-h200-512"
STEPS = '[{"weight": 6, "num_inference_steps": 2}, {"weight": 1, "num_inference_steps": 12}]'


def simulate(*flags: str) -> int:
    return main(["bench", "simulate", "--num-requests", "300", *flags])


def test_a_sweep_is_told_kept_and_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.bench.figures import watched  # here, for it takes a second to import

    figures = watched(monkeypatch)
    path = tmp_path / "simulated.json"
    wanted = ["--curve", CURVE, "--random-request-config", STEPS, "--slo", "--output-file", str(path)]
    machines = ["--loads", "0.5,0.8", "--policies", "fcfs,srpt", "--ageings", "0.1,1", "--widths", "auto,8"]
    assert simulate(*wanted, *machines, "--replicas", "2") == 0
    said = capsys.readouterr().out
    assert "load 0.5, 300 requests" in said and "srpt 0.1, width 8" in said
    kept = json.loads(path.read_text())
    assert kept["kind"] == "simulation" and len(kept["outcomes"]) == 2 * 2 * 3
    assert all(outcome["finished"] == 300 for outcome in kept["outcomes"])
    (figure,) = figures
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        "Mean latency",
        "P99 of latency",
        "Goodput: requests that met their goal",
        "Machines that have something to do",
        "P99 against mean, by the weight of ageing",
        "",
    ]
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_what_is_refused_and_dropped_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "simulated.json"
    flags = ["--loads", "3", "--max-queue-seconds", "20", "--timeout", "25", "--output-file", str(path)]
    assert simulate("--curve", CURVE, *flags) == 0
    assert "refused" in capsys.readouterr().out
    (outcome,) = json.loads(path.read_text())["outcomes"]
    assert outcome["refused"] > 100
    assert outcome["finished"] + outcome["refused"] + outcome["dropped"] == 300


def test_a_closed_loop(capsys: pytest.CaptureFixture[str]) -> None:
    assert simulate("--curve", CURVE, "--concurrencies", "4", "--num-inference-steps", "3") == 0
    assert "concurrency 4" in capsys.readouterr().out


def test_a_profile_of_a_video_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fake = ["--backend", "fake", "--fake-videos", "true", "--fake-step-ms", "2", "--profile-cache", "off"]
    assert main(["profile", *fake, "-o", str(tmp_path)]) == 0
    assert "steps of videos of 9 frames" in capsys.readouterr().out
    curve = ["--curve", str(tmp_path / "profile.json")]
    assert simulate(*curve) == simulate(*curve, "--num-frames", "5") == 0
    assert simulate(*curve, "--num-frames", "6") == 2
    assert "num_frames must be one more than a multiple of 4: 5 or 9, not 6" in capsys.readouterr().err


def test_the_examples_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert simulate("--curve", "list") == 0
    assert CURVE in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--curve must be a profile's file or one of"),
        (["--curve", CURVE, "--task", "image-to-image"], "bench simulate knows requests of prompts alone"),
        (["--curve", CURVE, "--polices", "fcfs"], "did you mean --policies?"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert simulate(*flags) == 2
    said = capsys.readouterr().err
    assert said.startswith("stepbatch: error: ") and message in said and said.count("\n") == 1
