"""The benchmarks' parts, on a small random checkpoint or a fake one."""

import importlib
import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from tests.models import tiny

from stepbatch.bench.results import Record
from stepbatch.config import BatchingConfig, ModelConfig
from stepbatch.engine.cost import Costs, StepCost
from stepbatch.request import GenerationRequest
from stepbatch.testing import FakeRunner

COSTS = Costs(known=True, step=StepCost(host=0.001))
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


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Imports one of the benchmarks' modules, as a script beside it would."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    return importlib.import_module


def test_a_load_on_an_engine_in_this_process(script: Callable[[str], ModuleType]) -> None:
    open_loop = script("parts.open_loop")
    runner = FakeRunner(ModelConfig(backend="fake", fake_step_ms=1))
    requests = [GenerationRequest(prompt="x", num_inference_steps=4, seed=i) for i in range(6)]
    served = open_loop.serve(runner, COSTS, BatchingConfig(dynamic_batch_max_size=2), requests, in_flight=4)
    assert set(served.latencies) == set(range(6))
    assert served.width == 2
    assert served.rate > 0
    served = open_loop.serve(runner, COSTS, BatchingConfig(), requests, [0.1 * i for i in range(6)])
    assert served.seconds > 0.5
    assert served.mean <= served.p99


def test_what_choosing_takes(script: Callable[[str], ModuleType]) -> None:
    took = script("scheduler_time").calls("boost", waiting=40, times=3)
    assert took.pop("jobs") == 64  # as long as somebody waits, who left makes room for another
    assert set(took) == {"nothing", "one came", "one left"}
    assert min(took.values()) == took["nothing"] > 0


def test_widths_and_policies_are_held_against_each_other(script: Callable[[str], ModuleType]) -> None:
    scheduling, docs = script("scheduling"), script("parts.scheduling_docs")
    runner = FakeRunner(ModelConfig(backend="fake", fake_step_ms=0.5))
    contest = scheduling.Contest(runner, COSTS, scheduling.QUICK, lambda line: None)
    requests = scheduling.workloads(4)["mixed steps"]
    found = {"widths": {"mixed steps": contest.widths("mixed steps", requests)}}
    found["policies"] = {"1": contest.policies(requests, 1)}
    assert [row[:2] for row in docs.against_fixed(found)] == [
        ("mixed steps", load) for load in ("closed loop", "0.5", "0.8", "0.95")
    ]
    assert all(float(cell) > 0 for row in docs.against_fcfs(found) for cell in row[2:])


def test_an_overload_is_told_by_what_was_answered_in_time(script: Callable[[str], ModuleType]) -> None:
    overload = script("overload")
    common = {"asked": {}, "server": "http://x"}
    done = [Record(index=i, intended=i, sent=i, ended=i + 1, service_s=0.5, status=200, **common) for i in range(10)]
    refused = [
        Record(index=i, intended=i, sent=i, ended=i + 0.02, status=429, outcome="rejected", **common) for i in range(10)
    ]
    lost = [Record(index=1, intended=1, sent=1, ended=2, status=500, outcome="failed", **common)]
    figures = overload._figures([*done, *refused, *lost], capacity=1.0, memory=0.0)
    assert (figures["answered"], figures["refused"], figures["lost"]) == (10, 10, 1)
    assert figures["goodput"] == pytest.approx(9 / 9)  # all but the one that ended after the last was sent
    assert figures["refusal_p99"] == pytest.approx(0.02)
    assert figures["bound"] == overload.QUEUE_SECONDS + 0.5
