"""The servers that ours is compared with: they group rightly, draw what diffusers draws, and really serve."""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import runpy
import socket
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import numpy as np
import pytest
import uvicorn
from benchmarks.peers import shared
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from stepbatch import EngineConfig, GenerationRequest, ModelConfig, load_engine
from stepbatch.bench.servers import running

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks"
PEERS = BENCHMARKS / "peers"


def body(seed: int = 0, size: str = "32x32", steps: int = 2, guidance: float = 0.0, **fields: Any) -> shared.Body:
    words = " ".join(f"w{(7 * seed + i) % 96}" for i in range(3 + seed % 4))
    return shared.Body(
        prompt=words, size=size, num_inference_steps=steps, guidance_scale=guidance, seed=seed,
        max_sequence_length=64, **fields,
    )  # fmt: skip


def off_by(one: Image.Image, other: Image.Image) -> int:
    """The greatest difference of any pixel."""
    assert one.size == other.size
    return int(np.abs(np.asarray(one, np.int16) - np.asarray(other, np.int16)).max())


@pytest.fixture(scope="module")
def pipeline(z_image_path: Path) -> Any:
    return shared.load(str(z_image_path), 1)


@given(st.lists(st.tuples(st.sampled_from(["32x32", "32x48"]), st.integers(1, 3), st.sampled_from([0.0, 2.0]))))
def test_groups_are_those_of_one_signature(asked: list[tuple[str, int, float]]) -> None:
    bodies = [body(seed, *fields) for seed, fields in enumerate(asked)]
    groups = shared.groups(bodies)
    assert sorted(index for group in groups for index in group) == list(range(len(bodies)))
    assert [group[0] for group in groups] == sorted(group[0] for group in groups)
    for group in groups:
        assert group == sorted(group)
        assert len({asked[index] for index in group}) == 1
    assert len(groups) == len(set(asked))


def test_every_picture_is_the_one_that_its_request_gets_alone(pipeline: Any) -> None:
    bodies = [
        body(1, "32x48", guidance=2.0, negative_prompt="w9 w8"),
        body(2, n=3),
        body(3, "32x48", guidance=2.0),
        body(4, steps=3),
        body(5, n=7),  # with the other of its group more than a call takes
    ]
    assert [[bodies[i].seed for i in group] for group in shared.groups(bodies)] == [[1, 3], [2, 5], [4]]
    drawn = shared.draw_all(pipeline, bodies)
    assert [len(pictures) for pictures in drawn] == [1, 3, 1, 1, 7]
    seen = [pictures[0] for pictures in drawn]
    for wanted, pictures in zip(bodies, drawn, strict=True):
        for i, picture in enumerate(pictures):
            assert off_by(picture, alone(pipeline, wanted, wanted.seed + i)) <= 1
            assert all(
                other is pictures[0] or other.size != picture.size or off_by(other, picture) > 1 for other in seen
            )


def alone(pipeline: Any, wanted: shared.Body, seed: int) -> Image.Image:
    """What the pipeline draws for one request, called as its documentation says."""
    import torch

    width, height = map(int, wanted.size.split("x"))
    pictures = pipeline(
        prompt=wanted.prompt,
        negative_prompt=wanted.negative_prompt,
        width=width,
        height=height,
        num_inference_steps=wanted.num_inference_steps,
        guidance_scale=wanted.guidance_scale,
        max_sequence_length=wanted.max_sequence_length,
        generator=torch.Generator("cpu").manual_seed(seed),
    ).images
    assert isinstance(pictures[0], Image.Image)
    return pictures[0]


def test_a_request_that_cannot_be_drawn_fails_alone(pipeline: Any) -> None:
    first, bad, last = shared.draw_all(pipeline, [body(1), body(2, "33x32"), body(3)])
    assert isinstance(bad, ValueError)
    assert str(bad) == "width and height must be multiples of 8, not 33x32"
    assert isinstance(first, list) and isinstance(last, list)
    assert off_by(first[0], last[0]) > 1


@contextmanager
def fastapi_lock(pipeline: Any) -> Iterator[str]:
    """In a thread; ``test_ours_and_a_peer_side_by_side`` has it in a process of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(PEERS))
        app = importlib.import_module("fastapi_lock").create_app(pipeline)
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        thread = threading.Thread(target=server.run, args=([sock],))
        thread.start()
        yield f"http://127.0.0.1:{sock.getsockname()[1]}"
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module", params=["fastapi_lock", "litserve_server", "ray_server"])
def address(
    request: pytest.FixtureRequest, pipeline: Any, z_image_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    if request.param == "fastapi_lock":
        with fastapi_lock(pipeline) as base_url:
            yield base_url
        return
    needed = {"litserve_server": "litserve", "ray_server": "ray"}[request.param]
    if not importlib.util.find_spec(needed):
        pytest.skip(f"{needed} is not installed")
    command = [sys.executable, str(PEERS / f"{request.param}.py"), "--model-path", str(z_image_path)]
    with running([*command, "--port", "{port}"], tmp_path_factory.mktemp("server") / "log") as server:
        yield server.base_url


def test_a_peer_serves(address: str, pipeline: Any) -> None:
    bodies = [body(i, "32x48" if i % 2 else "32x32", steps=1 + i % 3, n=1 + i % 2) for i in range(10)]
    asked = [wanted.model_dump() | {"response_format": "b64_json", "model": "any"} for wanted in bodies]
    asked.insert(3, asked[3] | {"size": "33x32"})
    with ThreadPoolExecutor(len(asked)) as pool:
        answers = list(pool.map(lambda fields: httpx.post(address + shared.ROUTE, json=fields, timeout=120), asked))
    bad = answers.pop(3)
    assert bad.status_code == 400
    assert "multiples of 8" in bad.text
    for wanted, answer in zip(bodies, answers, strict=True):
        assert answer.status_code == 200
        data = answer.json()["data"]
        assert len(data) == wanted.n
        for i, item in enumerate(data):
            picture = Image.open(io.BytesIO(base64.b64decode(item["b64_json"])))
            assert (picture.format, picture.mode) == ("PNG", "RGB")
            assert off_by(picture, alone(pipeline, wanted, wanted.seed + i)) <= 1
    assert answers[0].json()["created"] > 1.6e9


def test_a_peer_refuses_what_is_no_request(address: str) -> None:
    assert httpx.get(f"{address}/health").status_code == 200
    for fields in ({}, {"prompt": ""}, {"prompt": "w1", "size": "32"}, {"prompt": "w1", "n": 0}):
        assert httpx.post(address + shared.ROUTE, json=fields).status_code == 422


def test_the_small_flux_is_the_same_model_for_us_and_for_diffusers(tmp_path: Path) -> None:
    from benchmarks.peers.checkpoint import checkpoint

    folder = checkpoint(tmp_path / "flux")
    assert checkpoint(folder) == folder
    engine = load_engine(EngineConfig(model=ModelConfig(model_path=str(folder))))
    wanted = {"num_inference_steps": 2, "guidance_scale": 3.5, "seed": 4, "max_sequence_length": 64}
    [[ours]] = engine.generate([GenerationRequest(prompt="a red star", width=64, height=48, **wanted)])
    pipeline = shared.load(str(folder), 1)
    [[theirs]] = shared.draw(pipeline, [shared.Body(prompt="a red star", size="64x48", **wanted)])
    assert off_by(Image.frombytes("RGB", (64, 48), ours.pixels), theirs) <= 1
    assert np.asarray(theirs).std() > 10  # it draws something


@pytest.fixture
def serving_docs(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("parts.serving_docs")


@pytest.mark.usefixtures("forked_models")
def test_ours_and_a_peer_side_by_side(
    z_image_path: Path,
    tmp_path: Path,
    serving_docs: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output, page = tmp_path / "serving.json", tmp_path / "benchmarks.md"
    script = str(BENCHMARKS / "serving.py")
    flags = ["--quick", "--servers", "ours", "fastapi_lock", "--model-path", str(z_image_path)]
    monkeypatch.setattr(sys, "argv", [script, *flags, "--output", str(output), "--docs", str(page)])
    with pytest.raises(SystemExit) as left:
        runpy.run_path(script, run_name="__main__")
    assert left.value.code == 0
    assert "Mixed everything" in capsys.readouterr().out
    data = json.loads(output.read_text())
    assert [run["server"] for run in data["runs"]] == ["fastapi_lock", "ours"]
    assert all(run["summary"]["completed_requests"] == 4 == len(run["latencies"]) for run in data["runs"])
    assert data["runs"][1]["summary"]["jobs_per_step"] > 1
    kept = page.read_text()
    serving_docs.write_docs(output, page)
    assert page.read_text() == kept
    [ratio] = [run["summary"]["throughput_qps"] for run in data["runs"][1:]]
    assert f"{ratio / data['runs'][0]['summary']['throughput_qps']:.2f}x" in kept


def test_the_page_is_made_of_the_results(serving_docs: ModuleType, tmp_path: Path) -> None:
    page = tmp_path / "benchmarks.md"
    serving_docs.write_docs(BENCHMARKS / "results" / "serving.json", page)
    assert page.read_text() == (ROOT / "docs" / "benchmarks.md").read_text()


def test_the_pipeline_in_one_process_draws_all(
    z_image_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [body(seed, steps=1 + seed % 2).model_dump_json() for seed in range(5)]
    (tmp_path / "requests").write_text("\n".join(asked) + "\n")
    script = str(PEERS / "in_process.py")
    flags = ["--model-path", str(z_image_path), "--requests", str(tmp_path / "requests")]
    monkeypatch.syspath_prepend(str(PEERS))  # as it is where a script runs
    monkeypatch.setattr(sys, "argv", [script, *flags])
    runpy.run_path(script, run_name="__main__")
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["answers"] == 5
    assert found["seconds"] > 0


def test_what_whole_pipelines_come_to_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    pipelines_docs = importlib.import_module("parts.pipelines_docs")
    rates = {"ours": (4.9, 4.8, 4.0), "in_process": (5.0, 5.0, 5.0), "litserve_server": (4.5, 4.5, 4.5)}
    runs = [
        {
            "checkpoint": "small",
            "workload": "same",
            "server": server,
            "round": number,
            "summary": {"throughput_qps": rate, "requests": 8, "completed_requests": 8},
        }
        for server, of_rounds in rates.items()
        for number, rate in enumerate(of_rounds)
    ]
    choices = {"size": ["128x128"], "num_inference_steps": [8], "guidance_scale": [5.0]}
    settings = {"requests": 8, "concurrency": 8, "threads": 1, "rounds": 3}
    data = {
        "environment": {"date": "2026-11-22T00:00:00", "cpu": "a CPU", "settings": settings},
        "checkpoints": {"small": {"workloads": {"same": choices}}},
        "runs": runs,
        "idle": {"medians": {"0": 0.1, "50": 0.101}},
    }
    page = " ".join(pipelines_docs.section(data).split())
    assert "96.0% of the pipeline in one process (98.0%, 96.0%, 80.0% by round); the goal is 95%." in page
    assert "100.0 ms with a delay of 0 ms and 101.0 ms with a delay of 50 ms" in page
    assert "| the pipeline in one process | 5.00 (5.00 to 5.00) | | | | 0.96x | |" in page
    assert "| LitServe | 4.50 (4.50 to 4.50) | | | | 1.07x | |" in page
