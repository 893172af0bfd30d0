from pathlib import Path

import pytest

from stepbatch.bench.profile_file import read_profile
from stepbatch.cli.profile import profile
from stepbatch.errors import OptionError, SetupError

FAKE = ("--backend", "fake", "--fake-step-ms", "2", "--profile-cache", "off")


def test_a_model_is_measured_and_written_down(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert profile([*FAKE, "-o", str(tmp_path / "out"), "--warmup-sizes", "64x64", "--warmup-sizes", "128x64"]) == 0
    said = capsys.readouterr().out
    assert "At 64x64 a step pays up to" in said
    found = read_profile(tmp_path / "out" / "profile.json")
    assert found.name == "fake"
    assert found.costs.known
    assert found.model.defaults.num_inference_steps == 4 and found.model.guidance.field == "guidance_scale"
    assert {(point.width, point.height) for point in found.points} == {(64, 64), (128, 64)}
    assert 0.0019 < found.costs.step.seconds(32, 512) < 0.02  # sleeping takes as long as it says, or longer
    assert (tmp_path / "out" / "profile.png").read_bytes().startswith(b"\x89PNG")


def test_a_folder_that_can_not_be_written_is_told_before_anything_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SetupError, match="can't write"):
        profile(["--model-path", "/nowhere", "-o", str(tmp_path / "file")])


def test_sizes_that_the_model_does_not_take_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="none of these sizes"):
        profile([*FAKE, "-o", str(tmp_path), "--warmup-sizes", "17x17"])


def test_a_profile_of_too_little_is_an_error(tmp_path: Path) -> None:
    slow = ["--backend", "fake", "--fake-step-ms", "60", "--profile-cache", "off", "--warmup-seconds", "0.1"]
    with pytest.raises(SetupError, match="too little could be measured"):
        profile([*slow, "-o", str(tmp_path)])
    assert not (tmp_path / "profile.json").exists()


def test_without_a_warm_up_there_is_nothing_to_do(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="--warmup"):
        profile([*FAKE, "-o", str(tmp_path), "--warmup", "false"])
