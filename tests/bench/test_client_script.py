"""The load client's own benchmark, a second of it."""

import json
import runpy
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "client.py"


def test_the_client_is_measured_and_the_figures_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "client.json"
    monkeypatch.syspath_prepend(str(SCRIPT.parent))  # as it is where a script runs
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--quick", "--rates", "40", "--output", str(output)])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    (case,) = json.loads(output.read_text())["parts"]["client"]
    assert case["case"] == "40 requests/s"
    assert case["raw"]["requests"] == case["raw"]["completed"] == 40
    assert case["figures"]["achieved /s"]["value"] > 0
    assert case["figures"]["lag P99 ms"]["value"] >= case["figures"]["lag P50 ms"]["value"] >= 0
