from __future__ import annotations

import base64
import io
import json
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from PIL import Image

from stepbatch.errors import EngineDied, GenerationFailed
from stepbatch.testing import FakeRunner

from .support import MAX_BODY_BYTES, MODEL, RunningServer, StubEngine, assert_error, call, make_app, within

Generate = Callable[..., httpx.Response]


def picture(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def test_the_answer_has_openais_fields_and_ours(generate: Generate) -> None:
    response = generate(n=2, seed=7, num_inference_steps=3)
    assert response.status_code == 200, response.text
    body = response.json()
    assert abs(body["created"] - time.time()) < 60
    assert [item["seed"] for item in body["data"]] == body["seeds"] == [7, 8]
    assert (body["size"], body["output_format"], body["background"]) == ("64x64", "png", "opaque")
    assert body["model"] == MODEL.served_model_name
    assert set(body["timings"]) == {"queue", "encode", "denoise", "decode"}
    assert body["timings"]["denoise"] >= 3 * MODEL.fake_step_ms / 1000
    assert body["inference_time_s"] >= body["timings"]["denoise"] - 1e-6
    assert body["peak_memory_mb"] == 0.0
    assert body["predicted"] is None or set(body["predicted"]) == {"queue", "total"}
    assert body["ignored"] == []
    assert "usage" not in body


def test_pictures_are_those_of_their_seeds(generate: Generate) -> None:
    for seed, item in zip((5, 6), generate(n=2, seed=5, size="32x16").json()["data"], strict=True):
        image = picture(base64.b64decode(item["b64_json"]))
        assert image.format == "PNG"
        assert image.size == (32, 16)
        assert image.tobytes() == FakeRunner.pixels("a cat", seed, 32, 16)


@pytest.mark.parametrize("output_format", ["png", "jpeg", "webp"])
def test_every_format_decodes(generate: Generate, output_format: str) -> None:
    body = generate(output_format=output_format, size="48x32").json()
    image = picture(base64.b64decode(body["data"][0]["b64_json"]))
    assert (image.format, image.size) == (output_format.upper(), (48, 32))
    assert body["output_format"] == output_format


@pytest.mark.parametrize("output_compression", [0, 50, 100])
def test_compression_is_taken_for_jpeg(generate: Generate, output_compression: int) -> None:
    assert generate(output_format="jpeg", output_compression=output_compression).status_code == 200


def test_a_url_can_be_fetched(http: httpx.Client, server: RunningServer, generate: Generate) -> None:
    items = generate(response_format="url", output_format="webp", n=2).json()["data"]
    assert len({item["url"] for item in items}) == 2
    assert all("b64_json" not in item for item in items)
    assert items[0]["url"].startswith(f"{server.url}/v1/files/")
    answer = http.get(items[0]["url"])
    assert answer.headers["content-type"] == "image/webp"
    assert picture(answer.content).size == (64, 64)


def test_ignored_fields_are_listed(generate: Generate) -> None:
    body = generate(quality="hd", style="vivid", user="u", moderation="low", background="opaque", profile=True).json()
    assert set(body["ignored"]) == {"quality", "style", "user", "moderation", "background", "profile"}


def test_nothing_optional_is_needed(http: httpx.Client) -> None:
    response = http.post(
        "/v1/images/generations", content=b'{"prompt": "a cat"}', headers={"content-type": "text/plain"}
    )
    assert response.status_code == 200
    assert 0 <= response.json()["seeds"][0] < 2**63


BAD_VALUES: list[tuple[str, Any]] = [
    ("prompt", ""), ("prompt", "  "), ("prompt", None), ("prompt", 5), ("prompt", ["a"]), ("prompt", "\ud800"),
    ("prompt", "x" * 32_001), ("prompt", "[long]"),
    ("n", "4"), ("n", 0), ("n", 11), ("n", True), ("n", 1.0), ("n", -1), ("n", 10**30), ("n", float("nan")), ("n", []),
    ("size", "big"), ("size", "64"), ("size", "64x"), ("size", "64X64"), ("size", "0x64"), ("size", "65x64"),
    ("size", "99999x64"), ("size", "4096x64"), ("size", 64), ("size", ""), ("size", "\u0664x\u0664"),
    ("response_format", "file"), ("response_format", 1),
    ("output_format", "gif"), ("output_format", "jpg"), ("output_format", True),
    ("output_compression", 50), ("output_compression", 101), ("output_compression", "9"), ("output_compression", True),
    ("num_inference_steps", 0), ("num_inference_steps", 1001), ("num_inference_steps", "3"),
    ("num_inference_steps", 2.5), ("num_inference_steps", False),
    ("guidance_scale", "1"), ("guidance_scale", float("nan")), ("guidance_scale", float("inf")), ("guidance_scale", -1),
    ("guidance_scale", 10**400), ("guidance_scale", 101), ("guidance_scale", {}),
    ("true_cfg_scale", 3.0), ("flow_shift", 3.0),
    ("max_sequence_length", 0), ("max_sequence_length", 513), ("max_sequence_length", "77"),
    ("negative_prompt", 3), ("negative_prompt", "x" * 32_001),
    ("seed", True), ("seed", -1), ("seed", 2**63), ("seed", 10**50), ("seed", "1"), ("seed", 1.5), ("seed", [1]),
    ("timeout", 0), ("timeout", -1), ("timeout", "5"), ("timeout", float("inf")), ("timeout", 1e7), ("timeout", True),
    ("priority", 1.5), ("priority", "1"), ("priority", 1001), ("priority", -1001), ("priority", False),
    ("stream", True), ("stream", "false"), ("stream", 0), ("partial_images", 1), ("partial_images", False),
    ("background", "transparent"), ("background", "white"), ("background", 1),
    ("generator_device", "cuda"), ("generator_device", "gpu"), ("generator_device", "musa"), ("generator_device", 0),
    ("enable_upscaling", True), ("output_quality", "maximum"),
    ("model", 3),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), BAD_VALUES, ids=lambda v: ascii(v)[:24])
def test_a_bad_value_is_refused_by_name(http: httpx.Client, name: str, value: Any) -> None:
    # 10**400 as text and NaN as such: what the standard library writes, and reads
    body = json.dumps({"prompt": "a cat", name: value}).encode()
    assert_error(http.post("/v1/images/generations", content=body), 400, "invalid_value", name)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"size": "64x64", "width": 32, "height": 64}, "size"),
        ({"size": "64x64", "height": 32}, "size"),
        ({"size": "64x64", "width": "64"}, "size"),
        ({"width": 64}, "height"),
        ({"height": 64}, "width"),
        ({"width": 65, "height": 64}, "width"),
        ({"width": 64, "height": 4096}, "height"),
        ({"n": 2, "seed": 2**63 - 1}, "seed"),
    ],
)
def test_values_that_do_not_go_together_are_refused(generate: Generate, fields: dict[str, Any], param: str) -> None:
    assert_error(generate(**fields), 400, "invalid_value", param)


def test_a_prompt_is_required(http: httpx.Client) -> None:
    assert_error(http.post("/v1/images/generations", json={}), 400, "invalid_value", "prompt")


@pytest.mark.parametrize("name", ["promt", "lora", "", "\ud800", "x" * 100])
def test_an_unknown_field_is_refused_by_name(http: httpx.Client, name: str) -> None:
    body = json.dumps({"prompt": "a cat", name: None}).encode()
    shown = "?" if name == "\ud800" else name[:64]
    assert_error(http.post("/v1/images/generations", content=body), 400, "unknown_parameter", shown)


@pytest.mark.parametrize("model", ["dall-e-3", "", "models", "\ud800"])
def test_another_model_is_not_found(http: httpx.Client, model: str) -> None:
    body = json.dumps({"prompt": "a cat", "model": model}).encode()
    assert_error(http.post("/v1/images/generations", content=body), 404, "model_not_found", "model")


@pytest.mark.parametrize("model", ["org/tiny-fake", "/models/org/tiny", "tiny"])
def test_the_served_model_goes_by_its_names(generate: Generate, model: str) -> None:
    assert generate(model=model).status_code == 200


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b"\xff\xfe{}", b"[" * 60_000, b"prompt=a+cat"])
def test_a_body_that_is_no_json_object_is_refused(http: httpx.Client, body: bytes) -> None:
    assert_error(http.post("/v1/images/generations", content=body), 400, "invalid_json")


def test_a_body_that_says_it_is_too_long_is_refused(http: httpx.Client) -> None:
    response = http.post("/v1/images/generations", content=b" " * (MAX_BODY_BYTES + 1))
    assert_error(response, 413, "payload_too_large")


def test_a_body_that_turns_out_too_long_is_refused_before_its_end(server: RunningServer) -> None:
    taken = 0

    def chunks() -> Iterator[bytes]:
        nonlocal taken
        for _ in range(20_000):
            taken += 1
            yield b" " * 4096

    assert_error(httpx.post(f"{server.url}/v1/images/generations", content=chunks()), 413, "payload_too_large")


@pytest.mark.parametrize("stage", ["[raise-encode]", "[raise-denoise]", "[raise-decode]"])
def test_a_failure_in_the_model_is_a_500_not_to_be_retried(generate: Generate, stage: str) -> None:
    response = generate(prompt=stage)
    assert_error(response, 500, GenerationFailed.code)
    assert response.headers["x-should-retry"] == "false"


def test_a_model_that_makes_nan_is_told_apart(generate: Generate) -> None:
    assert_error(generate(prompt="[nan]"), 500, "invalid_model_output")


@pytest.mark.parametrize("whole_body", [True, False])
def test_hanging_up_frees_the_place(server: RunningServer, whole_body: bool) -> None:
    body = json.dumps({"prompt": "a cat", "num_inference_steps": 1000, "n": 3}).encode()
    head = f"POST /v1/images/generations HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n\r\n".encode()
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as sock:
        sock.sendall(head + (body if whole_body else body[:10]))
        if whole_body:
            assert within(2.0, lambda: server.engine.stats.running == 3)
    assert within(5.0, lambda: server.engine.stats.running == server.engine.stats.waiting == 0)


def test_without_an_engine_a_request_is_told_to_come_back() -> None:
    response = call(make_app(StubEngine()), "POST", "/v1/images/generations", json={"prompt": "a cat"})
    assert_error(response, 503, "engine_unavailable")
    assert int(response.headers["retry-after"]) > 0


def test_an_engine_that_died_on_a_request_is_not_to_be_tried_again() -> None:
    app = make_app(StubEngine(error=EngineDied("twice")))
    response = call(app, "POST", "/v1/images/generations", json={"prompt": "a cat"})
    assert_error(response, 503, "engine_died")
    assert response.headers["x-should-retry"] == "false"
