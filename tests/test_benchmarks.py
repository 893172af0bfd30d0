"""The benchmark's quick run, on a small random checkpoint."""

import json
import runpy
import sys
from pathlib import Path

import pytest
from tests.models import tiny

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "batching.py"


def test_the_steps_are_measured_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, output = tiny.z_image(tmp_path / "tiny"), tmp_path / "results" / "batching.json"
    monkeypatch.syspath_prepend(str(SCRIPT.parent))  # as it is where a script runs
    arguments = ["--quick", "--only", "steps", "--model-path", str(model), "--output", str(output)]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    kept = json.loads(output.read_text())
    assert kept["environment"]["model"] == "tiny"
    assert set(kept["parts"]) == {"steps"}
    for case in kept["parts"]["steps"]:
        assert case["figures"]["parts / wide"]["value"] > 0
        assert len(case["raw"]["wide"]) == len(case["raw"]["parts"]) == 1
