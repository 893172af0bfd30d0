"""What the benchmark clients of SGLang 0.5.23 and vLLM-Omni 0.30 send, and read of the answer; and our own's videos."""

import asyncio
import base64
import io
import json
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from PIL import Image
from tests.pictures import file, image

from stepbatch.__main__ import main

from .support import RunningServer

PHOTO = file(image("RGB", (64, 48)), "JPEG")


def post(url: str, headers: dict[str, str] | None = None, **body: Any) -> dict[str, Any]:
    """Post with aiohttp, which both clients use; its multipart differs from httpx's in small things."""

    async def send() -> dict[str, Any]:
        async with aiohttp.ClientSession() as session, session.post(url, headers=headers, **body) as response:
            assert response.status == 200, await response.text()
            answer: dict[str, Any] = await response.json()
            return answer

    return asyncio.run(send())


def sizes(answer: dict[str, Any]) -> list[tuple[int, int]]:
    return [Image.open(io.BytesIO(base64.b64decode(item["b64_json"]))).size for item in answer["data"]]


@pytest.mark.parametrize("model", ["/models/org/tiny", "org/tiny-fake"])
def test_sglang_generates(server: RunningServer, model: str) -> None:
    body = {"model": model, "prompt": "a cat", "n": 2, "response_format": "b64_json", "size": "96x64"}
    answer = post(f"{server.url}/v1/images/generations", json=body | {"num_inference_steps": 1})
    assert sizes(answer) == [(96, 64)] * 2
    assert answer["peak_memory_mb"] >= 0


def test_sglang_finds_the_model(server: RunningServer) -> None:
    async def ask() -> tuple[int, Any]:
        async with aiohttp.ClientSession() as session:
            async with (
                session.get(f"{server.url}/health") as health,
                session.get(f"{server.url}/v1/model_info") as info,
            ):
                return health.status, await info.json()

    status, info = asyncio.run(ask())
    assert status == 200
    assert info["model_path"] == "/models/org/tiny"


def test_sglang_edits(server: RunningServer) -> None:
    form = aiohttp.FormData()
    for name, value in (
        ("model", "/models/org/tiny"),
        ("prompt", "a cat"),
        ("response_format", "b64_json"),
        ("n", "1"),
    ):
        form.add_field(name, value)
    form.add_field("size", "96x64")
    form.add_field("guidance_scale", "2.5")
    form.add_field("image", io.BytesIO(PHOTO), filename="a cat.jpg", content_type="application/octet-stream")
    assert sizes(post(f"{server.url}/v1/images/edits", data=form)) == [(96, 64)]


def test_vllm_omni_generates(server: RunningServer) -> None:
    body = {"model": "/models/org/tiny", "prompt": "a cat", "n": 1, "size": "64x96", "response_format": "b64_json"}
    body |= {"seed": 42, "num_inference_steps": 2, "negative_prompt": "Negative prompt 1"}
    answer = post(f"{server.url}/v1/images/generations", {"Authorization": "Bearer EMPTY"}, json=body)
    assert sizes(answer) == [(64, 96)]


def test_vllm_omni_edits(server: RunningServer) -> None:
    form = aiohttp.FormData()
    for name, value in (
        ("model", "org/tiny-fake"),
        ("prompt", "a cat"),
        ("size", "64x64"),
        ("response_format", "b64_json"),
        ("num_inference_steps", "2"),
        ("seed", "42"),
        ("bot_task", "think"),
    ):
        form.add_field(name, value)
    for name in ("one.jpg", "two.jpg"):
        form.add_field("image", PHOTO, filename=name, content_type="image/jpeg")
    answer = post(f"{server.url}/v1/images/edits", data=form)
    assert sizes(answer) == [(64, 64)]
    assert answer["ignored"] == ["bot_task"]


@pytest.mark.parametrize("task", ["text-to-video", "image-to-video"])
def test_our_own_client_measures_videos(video_server: RunningServer, tmp_path: Path, task: str) -> None:
    load = (
        f"--base-url {video_server.url} --num-prompts 5 --num-inference-steps 2 --num-frames 13 --fps 8 --disable-tqdm"
    )
    shape = f"--task {task} --width 64 --height 32 --poll-interval 0.02 --warmup-requests 0"
    files = ["--output-file", str(tmp_path / "run.json"), "--save-outputs", str(tmp_path / "out")]
    assert main(["bench", "serving", *load.split(), *shape.split(), *files]) == 0
    assert len(list((tmp_path / "out").glob("*.mp4"))) == 5
    run = json.loads((tmp_path / "run.json").read_text())
    assert (run["summary"]["completed_requests"], run["summary"]["failed_requests"]) == (5, 0)
    assert all(record["service_s"] > 0 for record in run["records"])
