from __future__ import annotations

import time
from pathlib import Path

import httpx
import msgspec
import pytest

from stepbatch.bench.simulate.curves import read_curve
from stepbatch.model_info import Defaults, Guidance

from .support import MODEL, DrawingEngine, StubEngine, assert_error, call, make_app


def test_the_model_is_listed(http: httpx.Client) -> None:
    body = http.get("/v1/models").json()
    assert body["object"] == "list"
    (model,) = body["data"]
    assert (model["id"], model["object"], model["owned_by"]) == (MODEL.served_model_name, "model", "stepbatch")
    assert (model["device"], model["dtype"], model["pipeline"]) == ("cpu", "float32", "FakePipeline")
    assert model["defaults"]["num_inference_steps"] == 4
    assert model["tasks"] == ["text-to-image", "image-to-image", "inpainting", "editing"]
    assert (model["limits"]["max_images"], model["guidance"]) == (4, "guidance_scale")
    assert model["limits"]["size_multiple"] == 16
    assert (model["limits"]["max_frames"], model["limits"]["n"]) == (1, 10)
    assert http.get("/v1/models/org/tiny-fake").json() == model
    assert http.get("/v1/models/tiny").json() == model


def test_a_model_says_how_it_is_guided_and_that_it_takes_no_images() -> None:
    engine = StubEngine()
    guidance = Guidance(field="true_cfg_scale")
    for uses, field in (("true_cfg_scale",), "true_cfg_scale"), ((), None):
        engine.info = msgspec.structs.replace(engine.info, tasks=("text-to-image",), uses=uses, guidance=guidance)
        (model,) = call(make_app(engine), "GET", "/v1/models").json()["data"]
        assert (model["limits"]["max_images"], model["guidance"]) == (0, field)


def test_the_server_s_own_limits_are_told() -> None:
    app = make_app(StubEngine(), max_outputs=3, max_steps=50, max_prompt_bytes=1000, docs=True)
    (model,) = call(app, "GET", "/v1/models").json()["data"]
    assert {name: model["limits"][name] for name in ("n", "num_inference_steps", "prompt_bytes")} == {
        "n": 3,
        "num_inference_steps": 50,
        "prompt_bytes": 1000,
    }
    schemas = call(app, "GET", "/openapi.json").json()["components"]["schemas"]
    for name in ("ImageRequest", "EditRequest", "VideoRequest", "VideoForm"):
        fields = schemas[name]["properties"]
        assert fields["num_inference_steps"]["maximum"] == 50
        assert fields.get("n", {"maximum": 3})["maximum"] == 3
    for path, fields in (("/v1/images/generations", {"n": 4}), ("/v1/images/generations", {"prompt": 1001 * "x"})):
        assert_error(call(app, "POST", path, json={"prompt": "x", **fields}), 400, "invalid_value", *fields)
    form = {"prompt": "x", "num_inference_steps": "51"}
    response = call(app, "POST", "/v1/images/edits", data=form, files={"image": b"x"})
    assert_error(response, 400, "invalid_value", "num_inference_steps")


def test_another_model_is_not_there(http: httpx.Client) -> None:
    assert_error(http.get("/v1/models/dall-e-3"), 404, "model_not_found", "model")


def test_what_is_known_of_costs_is_a_curve_to_simulate(http: httpx.Client, tmp_path: Path) -> None:
    (tmp_path / "learned.json").write_bytes(http.get("/v1/profile").content)
    curve = read_curve(str(tmp_path / "learned.json"))
    assert curve.costs.known
    assert curve.costs.step.seconds(100, 100) > 0
    assert curve.model.defaults == msgspec.convert(http.get("/v1/model_info").json()["defaults"], Defaults)
    assert curve.model.path == ""  # which is the business of /v1/model_info alone


def test_model_info_names_the_path(http: httpx.Client) -> None:
    assert http.get("/v1/model_info").json()["model_path"] == MODEL.model_path


def test_a_running_server_is_healthy_and_ready(http: httpx.Client) -> None:
    answer = http.get("/health")
    assert answer.json() == {"status": "ok", "engine": "ready"}
    assert "server" not in answer.headers
    assert http.get("/ready").json() == {"status": "ready"}
    assert http.head("/health").status_code == 200


def test_while_the_engine_restarts_the_server_is_alive_but_not_ready() -> None:
    app = make_app(StubEngine(state="restarting"))
    assert call(app, "GET", "/health").json() == {"status": "ok", "engine": "restarting"}
    response = call(app, "GET", "/ready")
    assert_error(response, 503, "engine_unavailable")
    assert 5 <= int(response.headers["retry-after"]) <= 10


def test_once_the_engine_has_failed_for_good_the_server_is_not_worth_keeping() -> None:
    app = make_app(StubEngine(state="failed"))
    for path in ("/health", "/ready"):
        assert_error(call(app, "GET", path), 503, "engine_unavailable")


@pytest.mark.parametrize("name", ["x.png", "..%2f..%2fetc%2fpasswd", "%00"])
def test_a_file_that_never_was_is_not_found(http: httpx.Client, name: str) -> None:
    assert_error(http.get(f"/v1/files/{name}"), 404, "not_found")


def test_a_url_expires() -> None:
    app = make_app(DrawingEngine(), url_ttl_seconds=1)
    body = {"prompt": "a cat", "response_format": "url"}
    url = call(app, "POST", "/v1/images/generations", json=body).json()["data"][0]["url"]
    assert url.startswith("http://localhost/v1/files/")
    assert call(app, "GET", url).headers["cache-control"].startswith("private, max-age=")
    time.sleep(1.0)
    assert_error(call(app, "GET", url), 404, "not_found")


def test_pages_that_load_remote_scripts_are_off(http: httpx.Client) -> None:
    for path in ("/docs", "/redoc"):
        assert_error(http.get(path), 404, "not_found")
