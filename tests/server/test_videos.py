"""The routes of videos, on a real server with the fake model."""

from __future__ import annotations

import io
import os
import signal
import time
from typing import Any

import av
import httpx
import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from tests.pictures import file, image

from stepbatch.errors import SetupError
from stepbatch.image import InputImage
from stepbatch.testing import FakeRunner

from .support import (
    MAX_BODY_BYTES,
    MAX_IMAGE_BYTES,
    RunningServer,
    StubEngine,
    WaitingEngine,
    assert_error,
    call,
    make_app,
    within,
)
from .test_metrics import read

ROOM = image(size=(48, 32))


@pytest.fixture
def http(video_http: httpx.Client) -> httpx.Client:
    return video_http


def create(http: httpx.Client, **fields: Any) -> dict[str, Any]:
    answer = http.post("/v1/videos", json={"prompt": "a cat", "num_inference_steps": 2, **fields})
    assert answer.status_code == 200, answer.text
    video: dict[str, Any] = answer.json()
    return video


def look(http: httpx.Client, id: str) -> dict[str, Any]:
    answer = http.get(f"/v1/videos/{id}")
    assert answer.status_code == 200, answer.text
    video: dict[str, Any] = answer.json()
    return video


def end(http: httpx.Client, id: str) -> dict[str, Any]:
    assert within(20, lambda: look(http, id)["status"] in ("completed", "failed"))
    return look(http, id)


def frames(data: bytes) -> tuple[list[NDArray[np.uint8]], float]:
    """The frames of a video, and how many there are a second."""
    with av.open(io.BytesIO(data)) as video:
        rate = video.streams.video[0].average_rate
        return [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)], float(rate or 0)


def colour(prompt: str, seed: int, frame: int, *images: Image.Image) -> NDArray[np.int64]:
    """What the fake model paints a frame in."""
    inputs = [InputImage(*picture.size, picture.tobytes()) for picture in images]
    return np.frombuffer(FakeRunner.pixels(f"{prompt} {frame}", seed, 1, 1, inputs), np.uint8).astype(int)


def test_what_is_asked_for_comes(http: httpx.Client) -> None:
    asked = create(http, seconds="2", fps=12, size="64x32", seed=7, user="me", negative_prompt="dogs", guidance_scale=0)
    assert (asked["object"], asked["status"], asked["progress"]) == ("video", "queued", 0)
    assert (asked["seconds"], asked["num_frames"], asked["fps"], asked["size"]) == ("2.083", 25, 12, "64x32")
    assert (asked["model"], asked["prompt"], asked["seed"]) == ("org/tiny-fake", "a cat", 7)
    assert asked["ignored"] == ["user", "negative_prompt"]
    made = end(http, asked["id"])
    assert (made["status"], made["progress"], made["error"]) == ("completed", 100, None)
    assert made["expires_at"] == made["completed_at"] + 86400
    assert set(made["timings"]) == {"queue", "encode", "denoise", "decode"}
    content = http.get(f"/v1/videos/{asked['id']}/content")
    assert (content.status_code, content.headers["content-type"]) == (200, "video/mp4")
    got, rate = frames(content.content)
    assert (len(got), rate, got[0].shape) == (25, 12.0, (32, 64, 3))
    for number in (0, 12, 24):
        assert np.abs(got[number].mean((0, 1)) - colour("a cat", 7, number)).max() < 8


def test_what_the_model_does_where_nothing_is_said(http: httpx.Client) -> None:
    asked = create(http)
    assert (asked["size"], asked["num_frames"], asked["fps"], asked["seconds"]) == ("64x64", 9, 8, "1.125")
    assert asked["seed"] >= 0


def test_other_files_show_it_in_one_picture(http: httpx.Client) -> None:
    id = create(http, size="64x32", num_frames=5, seed=1)["id"]
    end(http, id)
    for variant, kind, size in (("thumbnail", "WEBP", (64, 32)), ("spritesheet", "JPEG", (256, 64))):
        answer = http.get(f"/v1/videos/{id}/content", params={"variant": variant})
        picture = Image.open(io.BytesIO(answer.content))
        assert (picture.format, picture.size) == (kind, size)
        assert answer.headers["content-type"] == f"image/{kind.lower()}"
    assert_error(http.get(f"/v1/videos/{id}/content?variant=gif"), 400, "invalid_value", "variant")


def test_a_form_with_an_image(http: httpx.Client) -> None:
    texts = {"prompt": "a cat", "seed": "5", "num_inference_steps": "2", "seconds": "1"}
    answer = http.post("/v1/videos", data=texts, files={"input_reference": ("room.png", file(ROOM))})
    assert answer.status_code == 200, answer.text
    assert answer.json()["size"] == "48x32"  # follows the image
    made = end(http, answer.json()["id"])
    got, _ = frames(http.get(f"/v1/videos/{made['id']}/content").content)
    assert len(got) == made["num_frames"] == 9
    assert np.abs(got[0].mean((0, 1)) - colour("a cat", 5, 0, ROOM)).max() < 8


@pytest.mark.parametrize(
    ("texts", "files", "param", "code"),
    [
        ({}, [], "prompt", "invalid_value"),
        ({"prompt": "a", "seconds": "four"}, [], "seconds", "invalid_value"),
        ({"prompt": "a", "fps": "8.5"}, [], "fps", "invalid_value"),
        ({"prompt": "a", "second": "4"}, [], "second", "unknown_parameter"),
        ({"prompt": "a", "input_reference": "https://example.com/a.png"}, [], "input_reference", "invalid_value"),
        ({"prompt": "a", "input_reference[file_id]": "f"}, [], "input_reference", "invalid_value"),
        ({"prompt": "a"}, [("input_reference", b"GIF89a")], "input_reference", "invalid_value"),
        ({"prompt": "a"}, [("input_reference", file(ROOM)[:90])], "input_reference", "invalid_value"),
        ({"prompt": "a"}, [("input_reference", file(ROOM))] * 2, "input_reference", "invalid_value"),
        ({"prompt": "a", "seconds": "99"}, [("input_reference", b"never read")], "seconds", "invalid_value"),
        (
            {"prompt": "a", "true_cfg_scale": "2"},
            [("input_reference", b"never read")],
            "true_cfg_scale",
            "invalid_value",
        ),
        ({"prompt": "a"}, [("video", b"mp4")], "video", "unknown_parameter"),
    ],
)
def test_forms_that_are_refused(
    http: httpx.Client, texts: dict[str, str], files: list[tuple[str, bytes]], param: str, code: str
) -> None:
    uploads = [(name, ("x", data)) for name, data in files] or [("input_reference", ("x", file(ROOM)))]
    if not files and "input_reference" in "".join(texts):
        uploads = [("input_reference[]", ("x", b"x"))]
    assert_error(http.post("/v1/videos", data=texts, files=uploads), 400, code, param)


def test_the_limits_of_bodies(http: httpx.Client) -> None:
    large = {"prompt": "x" * MAX_BODY_BYTES}
    assert_error(http.post("/v1/videos", json=large), 413, "payload_too_large")
    uploads = {"input_reference": ("x", bytes(MAX_IMAGE_BYTES + 1))}
    assert_error(
        http.post("/v1/videos", data={"prompt": "a"}, files=uploads), 413, "payload_too_large", "input_reference"
    )


def test_parts_of_a_file(http: httpx.Client) -> None:
    id = create(http)["id"]
    end(http, id)
    path = f"/v1/videos/{id}/content"
    whole = http.get(path)
    size = len(whole.content)
    for value, part in (
        ("bytes=0-9", slice(0, 10)),
        (f"bytes={size - 5}-", slice(size - 5, size)),
        ("bytes=-3", slice(-3, None)),
    ):
        answer = http.get(path, headers={"range": value})
        assert (answer.status_code, answer.content) == (206, whole.content[part])
    for value in ("lines=1-2", "bytes", "bytes=9-3", "bytes=a-b"):
        answer = http.get(path, headers={"range": value})
        assert (answer.status_code, answer.content) == (200, whole.content), value
    for value in (f"bytes={size}-", f"bytes={size + 9}-{size + 99}"):
        answer = http.get(path, headers={"range": value})
        assert_error(answer, 416, "invalid_range")
        assert answer.headers["content-range"] == f"bytes */{size}"
    head = http.head(path)
    assert (head.status_code, head.headers["content-length"], head.content) == (200, str(size), b"")
    assert head.headers["accept-ranges"] == "bytes"
    assert http.get(path, headers={"if-none-match": "x", "range": "bytes=0-9", "if-range": "x"}).status_code == 200


@pytest.mark.parametrize(
    ("prompt", "code"),
    [("[long]", "invalid_value"), ("[nan]", "invalid_model_output"), ("[raise-denoise]", "generation_failed")],
)
def test_a_failure_is_told_and_has_no_content(http: httpx.Client, prompt: str, code: str) -> None:
    failed = end(http, create(http, prompt=prompt)["id"])
    assert (failed["status"], failed["completed_at"], failed["error"]["code"]) == ("failed", None, code)
    message = assert_error(http.get(f"/v1/videos/{failed['id']}/content"), 404, "not_found")
    assert failed["error"]["message"] in message


def test_an_engine_that_dies_twice_fails_it_and_only_it(http: httpx.Client) -> None:
    other = create(http, num_inference_steps=200)["id"]
    failed = end(http, create(http, prompt="[die]")["id"])
    assert failed["error"]["code"] == "engine_died"
    assert end(http, other)["status"] == "completed"


def test_an_engine_that_is_killed_costs_no_video(video_server: RunningServer, http: httpx.Client) -> None:
    id = create(http, num_inference_steps=250)["id"]
    assert within(10, lambda: look(http, id)["progress"] >= 40)
    assert video_server.engine.pid is not None
    os.kill(video_server.engine.pid, signal.SIGKILL)
    seen = [look(http, id)]
    while seen[-1]["status"] == "in_progress":
        seen.append(look(http, id))
        time.sleep(0.01)
    assert seen[-1]["status"] == "completed"
    percents = [video["progress"] for video in seen]
    assert percents == sorted(percents)
    assert percents[-1] == 100


def test_an_unfinished_video_has_no_content_and_can_be_deleted(video_server: RunningServer, http: httpx.Client) -> None:
    id = create(http, num_inference_steps=1000)["id"]
    assert within(10, lambda: look(http, id)["status"] == "in_progress")
    assert "in_progress" in assert_error(http.get(f"/v1/videos/{id}/content"), 404, "not_found")
    assert http.delete(f"/v1/videos/{id}").json() == {"id": id, "object": "video.deleted", "deleted": True}
    assert within(5, lambda: video_server.engine.stats.running == 0)
    for method, path in (("GET", ""), ("DELETE", ""), ("GET", "/content")):
        assert_error(http.request(method, f"/v1/videos/{id}{path}"), 404, "not_found")


def test_a_list_comes_in_pages(http: httpx.Client) -> None:
    made = [create(http)["id"] for _ in range(5)]
    page = http.get("/v1/videos", params={"limit": 2}).json()
    assert [video["id"] for video in page["data"]] == made[:2:-1]
    assert (page["object"], page["first_id"], page["last_id"], page["has_more"]) == ("list", made[4], made[3], True)
    page = http.get("/v1/videos", params={"limit": 100, "order": "asc", "after": made[1]}).json()
    assert [video["id"] for video in page["data"]] == made[2:]
    assert page["has_more"] is False
    page = http.get("/v1/videos", params={"after": made[4], "order": "asc"}).json()
    assert page == {"object": "list", "data": [], "first_id": None, "last_id": None, "has_more": False}


@pytest.mark.parametrize(
    ("query", "param"),
    [("limit=0", "limit"), ("limit=101", "limit"), ("limit=x", "limit"), ("limit=", "limit"), ("limit=%D9%A3", "limit"),
     ("limit=-1", "limit"), ("order=up", "order"), ("after=x", "after"), ("after=", "after")],
)  # fmt: skip
def test_a_list_that_can_not_be(http: httpx.Client, query: str, param: str) -> None:
    assert_error(http.get(f"/v1/videos?{query}"), 400, "invalid_value", param)


@pytest.mark.parametrize("id", ["x", "video_1", "..%2f..%2fvideos.sqlite3", "%00", "video_" + "0" * 32])
def test_a_video_that_never_was(http: httpx.Client, id: str) -> None:
    for method, path in (("GET", ""), ("DELETE", ""), ("GET", "/content")):
        assert_error(http.request(method, f"/v1/videos/{id}{path}"), 404, "not_found")


def test_methods_that_a_video_does_not_have(http: httpx.Client) -> None:
    for path, allow in (("/v1/videos", "GET, HEAD, POST"), ("/v1/videos/x", "DELETE, GET, HEAD")):
        answer = http.put(path)
        assert_error(answer, 405, "method_not_allowed")
        assert answer.headers["allow"] == allow


def test_videos_are_counted_when_they_end(http: httpx.Client) -> None:
    for video in http.get("/v1/videos", params={"limit": 100}).json()["data"]:
        end(http, video["id"])
    before = read(http.get("/metrics").text)
    end(http, create(http)["id"])
    end(http, create(http, prompt="[nan]")["id"])
    http.post("/v1/videos", json={})
    after = read(http.get("/metrics").text)
    for code in ("ok", "invalid_model_output", "invalid_value"):
        name = f'stepbatch:requests_total{{code="{code}"}}'
        assert after[name] - before.get(name, 0) == 1


def test_the_model_says_how_long_videos_can_be(http: httpx.Client) -> None:
    (model,) = http.get("/v1/models").json()["data"]
    assert model["tasks"] == ["text-to-video", "image-to-video"]
    limits = model["limits"]
    assert (limits["max_frames"], limits["frames_multiple"], limits["max_images"], limits["n"]) == (121, 4, 1, 1)
    assert (model["defaults"]["num_frames"], model["defaults"]["fps"]) == (9, 8)


def test_pictures_are_refused_with_the_way_to_videos(http: httpx.Client) -> None:
    answers = [
        http.post("/v1/images/generations", json={"prompt": "a cat"}),
        http.post("/v1/images/edits", data={"prompt": "a cat"}, files={"image": ("x", file(ROOM))}),
    ]
    for answer in answers:
        assert "/v1/videos" in assert_error(answer, 400, "invalid_value", "model")


def test_videos_are_refused_with_the_way_to_pictures() -> None:
    app = make_app(StubEngine())
    answer = call(app, "POST", "/v1/videos", json={"prompt": "a cat"})
    assert "/v1/images/generations" in assert_error(answer, 400, "invalid_value", "model")
    for method, path in (("GET", ""), ("GET", "/x"), ("DELETE", "/x"), ("GET", "/x/content")):
        answer = call(app, method, f"/v1/videos{path}")
        assert "/v1/images/generations" in assert_error(answer, 404, "not_found")


def test_an_engine_that_takes_no_more(tmp_path: Any) -> None:
    info = WaitingEngine().info
    app = make_app(StubEngine(info=msgspec.structs.replace(info)), video_dir=str(tmp_path))
    answer = call(app, "POST", "/v1/videos", json={"prompt": "a cat"})
    assert_error(answer, 503, "engine_unavailable")
    assert call(app, "GET", "/v1/videos").json()["data"] == []


def test_no_folder_is_made_for_pictures(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    make_app(StubEngine())
    assert list(tmp_path.iterdir()) == []
    make_app(WaitingEngine())
    assert (tmp_path / "stepbatch" / "videos" / "videos.sqlite3").exists()


@pytest.mark.parametrize("data_home", ["", "relative"])
def test_without_a_folder_it_is_in_the_home(tmp_path: Any, monkeypatch: pytest.MonkeyPatch, data_home: str) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", data_home)
    monkeypatch.setenv("HOME", str(tmp_path))
    make_app(WaitingEngine())
    assert (tmp_path / ".local" / "share" / "stepbatch" / "videos" / "files").is_dir()


def test_without_a_home_a_folder_has_to_be_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", "")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("os.getuid", lambda: 4_000_000_000)  # of nobody
    with pytest.raises(SetupError, match="--video-dir is needed"):
        make_app(WaitingEngine())
