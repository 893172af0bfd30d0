"""The GPU benchmark without a GPU: that all of it runs, and that what goes wrong costs nothing else."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
ON_CPU = ("--device", "cpu", "--small", "--quick")


@pytest.fixture
def record(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))  # as it is where a script runs
    from parts import gpu_record

    return gpu_record


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """The script in this process."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from parts import gpu_run

    def run(output: Path, *arguments: str) -> int:
        return int(gpu_run.main([*ON_CPU, "--output", str(output), *arguments], "", time.monotonic()))

    return run


def measures(output: Path, part: str, model: str, what: str) -> list[dict[str, Any]]:
    entry = json.loads((output / f"{part}.json").read_text())[model]
    assert entry["state"] == "done" and not [m for m in entry["measures"] if "error" in m]
    return [m for m in entry["measures"] if m["measure"] == what and "skipped" not in m]


def test_a_models_steps_are_measured_and_held_against_diffusers(
    main: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = ("--models", "Z-Image-Turbo", "Nothing")
    assert main(tmp_path, "--in-process", "--parts", "card", "steps", "offload", *models) == 1  # for the last of them
    steps = measures(tmp_path, "steps", "Z-Image-Turbo", "step")
    assert [(m["size"], m["batch"]) for m in steps] == [([64, 64], 1), ([96, 96], 1), ([64, 64], 2), ([96, 96], 2)]
    assert all(m["ms"] > 0 and m["diffusers_ms"] > 0 and 0 < m["matrix_share"] < 1 for m in steps)
    whole, shallow = measures(tmp_path, "steps", "Z-Image-Turbo", "parity")
    for difference in (*whole["differences"].values(), *shallow["differences"].values()):
        assert difference["relative"] < 1e-5 < difference["reference_rms"]
    (image,) = measures(tmp_path, "steps", "Z-Image-Turbo", "image")
    assert image["seconds"] >= image["encode_seconds"] + image["denoise_seconds"] + image["decode_seconds"]
    (costs,) = measures(tmp_path, "steps", "Z-Image-Turbo", "costs")
    assert set(costs["knees"]) == {"64x64", "96x96"} and min(costs["knees"].values()) >= 1
    assert costs["beside"] == 1.0  # a CPU has nothing to do it on
    assert [m["in_flight"] for m in measures(tmp_path, "offload", "Z-Image-Turbo", "step")] == [1, 8]
    assert all(m["tflops"] > 0 for m in measures(tmp_path, "card", "card", "matrix"))
    shown = capsys.readouterr().out
    assert "how far predictions are apart" in shown and "Blocks out of the CPU's memory" in shown
    failed = json.loads((tmp_path / "steps.json").read_text())["Nothing"]
    assert failed["state"] == "failed" and "there is no folder Nothing" in failed["error"]


MEASURER = """
import sys, time, types
sys.path.insert(0, {benchmarks!r})
card = sys.modules["parts.gpu_card"] = types.ModuleType("parts.gpu_card")  # the real one takes ten seconds to import
card.run = lambda task, record: record.add("matrix", of="1 x 1 x 1", dtype="float32", tflops=1.0)
from parts.gpu_run import main
sys.exit(main(sys.argv[1:], "", time.monotonic()))
"""


def test_a_part_is_measured_in_a_process_of_its_own(
    main: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "measure.py").write_text(MEASURER.format(benchmarks=str(BENCHMARKS)))
    monkeypatch.setattr("parts.gpu_run.SCRIPT", tmp_path / "measure.py")
    assert main(tmp_path, "--parts", "card") == 0, (tmp_path / "gpu.log").read_text()
    assert [m["tflops"] for m in measures(tmp_path, "card", "card", "matrix")] == [1.0]


def test_the_script_starts_from_a_checkout() -> None:
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd="/")
    assert "Everything there is to measure on a GPU" in done.stdout, done.stderr


@pytest.mark.usefixtures("forked_models")
def test_bursts_are_sent_to_servers(
    main: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--in-process", "--parts", "burst", "--models", "FLUX.1-dev", "--burst-prompts", "5")
    assert main(tmp_path, *flags) == 0
    bursts = {(m["concurrency"], m["batching"]): m for m in measures(tmp_path, "burst", "FLUX.1-dev", "burst")}
    assert set(bursts) == {(4, "off"), (4, "on"), (12, "off"), (12, "on")}
    assert all(m["completed"] == m["requests"] == len(m["latencies"]) == 5 for m in bursts.values())
    assert {bursts[of, "off"]["jobs_per_step"] for of in (4, 12)} == {1}
    assert bursts[4, "on"]["jobs_per_step"] <= 4 and bursts[12, "on"]["jobs_per_step"] > 1
    assert "A burst of requests" in capsys.readouterr().out


def test_without_the_device_nothing_is_begun(
    main: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert main(tmp_path / "output", "--device", "cuda") == 2
    assert "there is no CUDA device here" in capsys.readouterr().err
    assert not (tmp_path / "output").exists()


def test_a_measurement_is_on_disk_at_once_and_an_error_is_kept_beside_it(record: Any, tmp_path: Path) -> None:
    task = record.Task(part="steps", model="a", folder=str(tmp_path))
    kept = record.Record(task, 60.0, {"torch": "2"})
    with kept.measuring("step", size=(1, 2)) as values:
        values["ms"] = 1.23456789
    with kept.measuring("step", size=(3, 4)) as values:
        raise RuntimeError("out of memory\nand a long story")
    assert not kept.has_time("step", 100.0, size=(5, 6))
    entry = json.loads((tmp_path / "steps.json").read_text())["a"]
    assert entry["state"] == "running" and entry["environment"] == {"torch": "2"}
    first, second, third = entry["measures"]
    assert (first["size"], first["ms"]) == ([1, 2], 1.23457)
    assert second["error"] == "RuntimeError: out of memory"
    assert third["skipped"] == "60 s are left and it takes about 100"
    assert record.of(entry["measures"], "step") == [first]


def test_what_was_measured_stays_when_its_process_is_ended(record: Any, tmp_path: Path) -> None:
    tasks = {model: record.Task(part="steps", model=model, folder=str(tmp_path)) for model in "abc"}
    record.Record(tasks["a"], 60.0, {}).add("step", ms=1)
    record.close(tasks["a"], "stopped", "too late")
    done = record.Record(tasks["b"], 60.0, {})
    done.add("step", ms=2)
    done.end()
    record.close(tasks["b"], "failed", "it never began")  # another run: what the last one measured is no longer so
    record.close(tasks["c"], "skipped", "no time")
    entries = json.loads((tmp_path / "steps.json").read_text())
    assert [m["ms"] for m in entries["a"]["measures"]] == [1] and entries["a"]["state"] == "stopped"
    assert entries["b"] == {"measures": [], "state": "failed", "error": "it never began"}
    assert entries["c"]["state"] == "skipped"
