from __future__ import annotations

import asyncio
import base64
import io
import json
import socket
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx
import msgspec
import pytest
from PIL import Image
from tests.pictures import bombs, file, frames, image

from stepbatch.image import InputImage
from stepbatch.model_info import Task
from stepbatch.request import GenerationRequest
from stepbatch.server import edits
from stepbatch.testing import FakeRunner

from .support import (
    MAX_BODY_BYTES,
    MAX_IMAGE_BYTES,
    MAX_IMAGE_PIXELS,
    MAX_UPLOAD_BYTES,
    DrawingEngine,
    RunningServer,
    assert_error,
    call,
    make_app,
    within,
)

Edit = Callable[..., httpx.Response]
ROOM = image(size=(48, 32))
CHAIR = image(size=(16, 64), seed=1)
HALF = Image.new("L", (48, 32))
HALF.paste(255, (0, 0, 24, 32))


def pixels(picture: Image.Image) -> InputImage:
    return InputImage(*picture.size, picture.tobytes())


def drawn(response: httpx.Response) -> tuple[tuple[int, int], bytes]:
    """Size and first pixel of the picture in an answer."""
    assert response.status_code == 200, response.text
    picture = Image.open(io.BytesIO(base64.b64decode(response.json()["data"][0]["b64_json"])))
    return picture.size, picture.tobytes()[:3]


def expected(*images: Image.Image, size: tuple[int, int] = (48, 32)) -> tuple[tuple[int, int], bytes]:
    """The same of the picture that the engine draws if exactly these pixels come to it."""
    return size, FakeRunner.pixels("a cat", 5, 1, 1, [pixels(picture) for picture in images])


def asked(
    *files: tuple[str, bytes], tasks: tuple[Task, ...] = ("editing", "image-to-image", "inpainting"), **texts: str
) -> tuple[httpx.Response, list[GenerationRequest]]:
    """The answer of a server whose model can do ``tasks``, and what its engine was asked for."""
    engine = DrawingEngine()
    engine.info = msgspec.structs.replace(engine.info, tasks=tasks)
    parts = [(name, ("x", data)) for name, data in files]
    response = call(make_app(engine), "POST", "/v1/images/edits", files=parts, data={"prompt": "a cat", **texts})
    return response, engine.requests


@pytest.mark.parametrize("name", ["image", "image[]"])
@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_an_image_comes_to_the_engine_as_it_is(edit: Edit, name: str, kind: str) -> None:
    data = file(ROOM, kind, **({"lossless": True} if kind == "WEBP" else {}))
    assert drawn(edit((name, data), seed="5")) == expected(ROOM)


def test_several_images_come_in_their_order(edit: Edit) -> None:
    room, chair = file(ROOM), file(CHAIR)
    assert drawn(edit(("image[]", room), ("image[]", chair), seed="5")) == expected(ROOM, CHAIR)
    assert drawn(edit(("image", chair), ("image", room), seed="5")) == expected(CHAIR, ROOM, size=(16, 64))
    assert drawn(edit(("image", room), ("image[]", chair), seed="5")) == expected(ROOM, CHAIR)


def test_a_mask_comes_to_the_engine_as_what_to_paint_anew(edit: Edit) -> None:
    alpha = ROOM.copy()
    alpha.putalpha(HALF.point(lambda value: 255 - value))
    for mask in (file(HALF), file(HALF.convert("1")), file(HALF.convert("RGB"), "JPEG"), file(alpha)):
        assert drawn(edit(("mask", mask), ("image", file(ROOM)), seed="5")) == expected(ROOM, HALF)


def test_what_a_part_says_of_itself_does_not_matter(http: httpx.Client) -> None:
    for label in (("a.jpg", "image/jpg"), ("é.gif", "application/octet-stream"), ("", "text/plain")):
        files = {"image": (label[0] or "x", file(ROOM), label[1])}
        response = http.post("/v1/images/edits", files=files, data={"prompt": "a cat", "seed": "5"})
        assert drawn(response) == expected(ROOM)


@pytest.mark.parametrize(
    ("texts", "size"),
    [
        ({}, (48, 32)),
        ({"size": "auto"}, (48, 32)),
        ({"size": ""}, (48, 32)),
        ({"size": "64x80"}, (64, 80)),
        ({"width": "16", "height": "32"}, (16, 32)),
    ],
)
def test_the_result_is_as_large_as_the_image_unless_it_is_said(
    edit: Edit, texts: dict[str, str], size: tuple[int, int]
) -> None:
    assert drawn(edit(("image", file(ROOM)), **texts))[0] == size


def test_the_answer_is_that_of_generations(edit: Edit, http: httpx.Client) -> None:
    response = edit(
        ("image", file(ROOM)), n="2", seed="7", response_format="url", output_format="jpeg", input_fidelity="high"
    )
    body = response.json()
    assert (body["seeds"], body["size"], body["output_format"]) == ([7, 8], "48x32", "jpeg")
    assert body["ignored"] == ["input_fidelity"]
    assert http.get(body["data"][1]["url"]).content[:3] == b"\xff\xd8\xff"
    assert set(body) == set(http.post("/v1/images/generations", json={"prompt": "a cat"}).json())


def test_texts_become_what_their_fields_are() -> None:
    response, (request,) = asked(
        ("image", file(ROOM)),
        n="2",
        seed="9223372036854775806",
        num_inference_steps="7",
        guidance_scale=".5e1",
        strength="0.75",
        max_sequence_length="77",
        negative_prompt="a \u00e4\r\n",
        stream="False",
        partial_images="0",
        output_compression="100",
        model="tiny",
        user="5",
    )
    assert response.json()["ignored"] == ["user"]
    assert (request.n, request.seed, request.num_inference_steps) == (2, 2**63 - 2, 7)
    assert (request.guidance_scale, request.strength, request.max_sequence_length) == (5.0, 0.75, 77)
    assert request.negative_prompt == "a \u00e4\r\n"


def test_an_empty_text_counts_as_absent_except_as_a_negative_prompt() -> None:
    names = ("n", "seed", "strength", "size", "guidance_scale", "response_format", "stream", "user", "model")
    response, (request,) = asked(("image", file(ROOM)), negative_prompt="", **dict.fromkeys(names, ""))
    assert response.json()["ignored"] == []
    assert (request.n, request.seed, request.strength, request.negative_prompt) == (1, None, None, "")


BAD_TEXTS = [
    ("n", "x"), ("n", "1.0"), ("n", " 1"), ("n", "1_0"), ("n", "\u0661"), ("n", "11"), ("n", "0x1"), ("n", "9" * 5000),
    ("seed", "-1"), ("seed", "1e3"), ("seed", "true"), ("num_inference_steps", "0"), ("num_inference_steps", "null"),
    ("guidance_scale", "nan"), ("guidance_scale", "inf"), ("guidance_scale", "1e999"), ("guidance_scale", "."),
    ("guidance_scale", "1,5"), ("guidance_scale", "-1"), ("true_cfg_scale", "3"),
    ("strength", "1.1"), ("strength", "a bit"), ("strength", "-0.1"), ("strength", "0"),
    ("stream", "true"), ("stream", "0"), ("stream", "no"), ("size", "big"), ("size", "65x64"), ("width", "64"),
    ("response_format", "file"), ("output_format", "gif"), ("output_compression", "50"), ("background", "transparent"),
    ("prompt", " "), ("prompt", ""), ("prompt", "[long]"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text"), BAD_TEXTS, ids=lambda v: ascii(v)[:24])
def test_a_bad_text_is_refused_by_name(edit: Edit, name: str, text: str) -> None:
    param = "height" if (name, text) == ("width", "64") else name
    assert_error(edit(("image", file(ROOM)), **{name: text}), 400, "invalid_value", param)


def test_what_is_needed_is_asked_for_by_name(http: httpx.Client, edit: Edit) -> None:
    assert_error(edit(("mask", file(HALF))), 400, "invalid_value", "image")
    response = http.post("/v1/images/edits", files={"image": file(ROOM)}, data={"seed": "5"})
    assert_error(response, 400, "invalid_value", "prompt")
    assert_error(edit(("image", file(ROOM)), model="dall-e-2"), 404, "model_not_found", "model")
    message = assert_error(edit(("image", file(ROOM)), mask_image="x"), 400, "unknown_parameter", "mask_image")
    assert "mask" in message


@pytest.mark.parametrize("name", ["seed", "prompt", "user", "strength"])
def test_a_field_is_given_once_and_is_no_file(edit: Edit, http: httpx.Client, name: str) -> None:
    parts: list[Any] = [("image", ("x", file(ROOM))), *[(name, (None, "1"))] * 2]
    assert_error(http.post("/v1/images/edits", files=parts), 400, "invalid_value", name)
    assert_error(edit(("image", file(ROOM)), (name, b"1"), **({name: "1"})), 400, "invalid_value", name)


@pytest.mark.parametrize("text", ["https://example.com/a.png", "data:image/png;base64,iVBORw0KGgo=", "/etc/passwd", ""])
def test_an_address_is_no_image(edit: Edit, text: str) -> None:
    message = assert_error(edit(("mask", file(HALF)), image=text), 400, "invalid_value", "image")
    assert "uploaded as a file" in message
    assert_error(edit(("image", file(ROOM)), mask=text), 400, "invalid_value", "mask")


BAD_FILES = [b"", b"GIF89a", file(ROOM)[:300], frames("PNG"), frames("WEBP"), *bombs(40_000).values()]


@pytest.mark.parametrize("data", BAD_FILES)
def test_a_file_that_can_not_be_read_is_refused_by_name(edit: Edit, data: bytes) -> None:
    began = time.monotonic()
    assert_error(edit(("image", data)), 400, "invalid_value", "image")
    assert_error(edit(("image", file(ROOM)), ("mask", data)), 400, "invalid_value", "mask")
    message = assert_error(edit(("image", file(ROOM)), ("image", data)), 400, "invalid_value", "image")
    assert message.startswith("image 2 ")
    assert time.monotonic() - began < 3


def test_images_have_as_many_pixels_as_is_allowed(edit: Edit) -> None:
    side = int(MAX_IMAGE_PIXELS**0.5)
    assert edit(("image", file(Image.new("L", (side, side))))).status_code == 200
    message = assert_error(edit(("image", file(Image.new("L", (side, side + 1))))), 400, "invalid_value", "image")
    assert str(MAX_IMAGE_PIXELS) in message


def test_images_are_as_many_as_the_model_takes(edit: Edit) -> None:
    assert edit(*[("image", file(ROOM))] * 4).status_code == 200
    assert_error(edit(*[("image", file(ROOM))] * 5), 400, "invalid_value", "image")
    assert_error(edit(*[("image", file(ROOM))] * 2, strength="0.5"), 400, "invalid_value", "image")
    assert_error(edit(("image", file(ROOM)), *[("mask", file(HALF))] * 2), 400, "invalid_value", "mask")


def test_a_mask_is_as_large_as_its_image(edit: Edit) -> None:
    message = assert_error(edit(("image", file(CHAIR)), ("mask", file(HALF))), 400, "invalid_value", "mask")
    assert "16x64" in message


@pytest.mark.parametrize(
    ("files", "texts", "param"),
    [
        ([("image", b"x" * (MAX_IMAGE_BYTES + 1))], {}, "image"),
        ([("image", b""), ("mask", b"x" * (MAX_IMAGE_BYTES + 1))], {}, "mask"),
        ([("image", b"x" * MAX_IMAGE_BYTES)] * 2, {}, None),
        ([("image", b"")], {"prompt": "x" * (MAX_BODY_BYTES + 1)}, "prompt"),
        ([("image", b"")], {"prompt": "x" * 30_000, "negative_prompt": "x" * 30_000, "user": "x" * 9000}, "user"),
    ],
)
def test_what_is_too_long_is_refused(
    edit: Edit, files: list[tuple[str, bytes]], texts: dict[str, str], param: str | None
) -> None:
    assert_error(edit(*files, **texts), 413, "payload_too_large", param)


def test_a_body_that_turns_out_too_long_is_refused(http: httpx.Client) -> None:
    files = [("image", ("x", b"x" * (MAX_UPLOAD_BYTES // 3)))] * 3
    form = httpx.Request("POST", "http://localhost/", files=files, data={"prompt": "a cat"})
    chunks = (form.read()[start : start + 4096] for start in range(0, len(form.read()), 4096))
    headers = {"content-type": form.headers["content-type"]}  # and no content-length
    assert_error(http.post("/v1/images/edits", content=chunks, headers=headers), 413, "payload_too_large")


@pytest.mark.parametrize(
    "kind", ["application/json", "application/x-www-form-urlencoded", "text/plain", "image/png", ""]
)
def test_another_kind_of_body_is_refused_with_what_is_needed(http: httpx.Client, kind: str) -> None:
    body = json.dumps({"prompt": "a cat", "image": "https://example.com/a.png"}).encode()
    response = http.post("/v1/images/edits", content=body, headers={"content-type": kind})
    assert "multipart/form-data" in assert_error(response, 400, "invalid_form")


@pytest.mark.parametrize("body", [b"", b"{}", b"--b\r\n", b"--b--", b"--b\r\nx\r\n\r\n--b--"])
def test_a_malformed_form_is_refused(http: httpx.Client, body: bytes) -> None:
    headers = {"content-type": "multipart/form-data; boundary=b"}
    response = http.post("/v1/images/edits", content=body, headers=headers)
    if body == b"--b--":  # it is well-formed, and empty
        assert_error(response, 400, "invalid_value", "prompt")
    else:
        assert_error(response, 400, "invalid_form")


@pytest.mark.parametrize("name", ["image", "mask", "strength"])
def test_images_are_no_fields_of_a_generation(http: httpx.Client, name: str) -> None:
    response = http.post("/v1/images/generations", json={"prompt": "a cat", name: "x"})
    assert "/v1/images/edits" in assert_error(response, 400, "unknown_parameter", name)


def test_a_model_that_only_edits_says_so() -> None:
    engine = DrawingEngine()
    engine.info = msgspec.structs.replace(engine.info, tasks=("editing",))
    response = call(make_app(engine), "POST", "/v1/images/generations", json={"prompt": "a cat"})
    message = assert_error(response, 400, "invalid_value", "image")
    assert "needs an image" in message
    assert "/v1/images/edits" in message


@pytest.mark.parametrize(
    ("tasks", "files", "texts", "param"),
    [
        (("text-to-image",), [], {}, "image"),
        (("text-to-image",), [], {"strength": "0.5"}, "strength"),
        (("editing",), [], {"strength": "0.5"}, "strength"),
        (("editing",), [("mask", file(HALF))], {}, "mask"),
        (("image-to-image",), [], {}, "strength"),
        (("image-to-image", "inpainting"), [("image", file(ROOM))], {"strength": "1"}, "image"),
    ],
)
def test_what_the_model_can_not_do_is_refused(
    tasks: tuple[Task, ...], files: list[tuple[str, bytes]], texts: dict[str, str], param: str
) -> None:
    response, _ = asked(("image", file(ROOM)), *files, tasks=tasks, **texts)
    assert_error(response, 400, "invalid_value", param)


def test_a_size_of_the_images_own_that_can_not_be_drawn_is_told_from_one_that_was_given() -> None:
    engine = DrawingEngine()
    engine.info = msgspec.structs.replace(engine.info, min_side=64)
    for data, reason in ({}, "the image's own size"), ({"size": "48x32"}, "must be a multiple of"):
        response = call(
            make_app(engine),
            "POST",
            "/v1/images/edits",
            files={"image": file(ROOM)},
            data={"prompt": "a cat", "strength": "1", **data},
        )
        assert reason in assert_error(response, 400, "invalid_value", "size")


def with_hole(alpha: int) -> bytes:
    picture = ROOM.copy()
    picture.putalpha(HALF.point(lambda value: alpha if value else 255))
    return file(picture)


PAINTS: tuple[Task, ...] = ("image-to-image", "inpainting")


def test_an_image_with_a_hole_is_its_own_mask_where_the_model_can_only_fill_it() -> None:
    _, (request,) = asked(("image", with_hole(0)), tasks=PAINTS)
    assert request.mask == pixels(HALF)
    on_white = ROOM.copy()
    on_white.paste((255, 255, 255), mask=HALF)
    assert request.images == (pixels(on_white),)


@pytest.mark.parametrize(
    ("files", "texts", "tasks"),
    [
        ([("image", with_hole(0))], {}, (*PAINTS, "editing")),
        ([("image", with_hole(0))], {"strength": "0.5"}, PAINTS),
        ([("image", with_hole(0))], {}, ("editing",)),
    ],
)
def test_otherwise_a_hole_is_only_white(
    files: list[tuple[str, bytes]], texts: dict[str, str], tasks: tuple[Task, ...]
) -> None:
    _, (request,) = asked(*files, tasks=tasks, **texts)
    assert request.mask is None


def test_an_image_without_a_hole_is_no_mask() -> None:
    for data in (with_hole(128), file(ROOM)):
        response, _ = asked(("image", data), tasks=PAINTS)
        assert_error(response, 400, "invalid_value", "strength")
    _, (request,) = asked(("image", with_hole(0)), ("mask", file(HALF.rotate(180))), tasks=PAINTS)
    assert request.mask == pixels(HALF.rotate(180))


@pytest.mark.parametrize(
    ("texts", "tasks", "param"),
    [
        ({"guidance_scale": "101"}, PAINTS, "guidance_scale"),
        ({"size": "9x9"}, PAINTS, "size"),
        ({"strength": "0"}, PAINTS, "strength"),
        ({"strength": "0.5"}, ("editing",), "strength"),
    ],
)
def test_what_no_picture_can_make_right_is_refused_before_any_is_decoded(
    monkeypatch: pytest.MonkeyPatch, texts: dict[str, str], tasks: tuple[Task, ...], param: str
) -> None:
    monkeypatch.setattr(edits, "read_picture", lambda *_: pytest.fail("decoded"))
    response, _ = asked(("image", file(ROOM)), tasks=tasks, **texts)
    assert_error(response, 400, "invalid_value", param)


def test_files_are_decoded_in_threads_and_not_kept_on_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[str] = []
    read = edits.read_picture

    def read_picture(*arguments: Any) -> Any:
        threads.append(threading.current_thread().name)
        return read(*arguments)

    monkeypatch.setattr(edits, "read_picture", read_picture)
    for name in ("TemporaryFile", "NamedTemporaryFile", "mkstemp"):
        monkeypatch.setattr(tempfile, name, lambda *_, **__: pytest.fail("a file on disk"))
    data = file(image(size=(800, 800)))
    assert len(data) > 1 << 20
    asked(("image", data), ("mask", file(Image.new("L", (800, 800)))))
    assert len(threads) == 2
    assert all(thread.startswith("uploads") for thread in threads)


@pytest.mark.parametrize("sent", [1.0, 0.5])
def test_hanging_up_frees_the_place(server: RunningServer, sent: float) -> None:
    form = httpx.Request(
        "POST",
        f"{server.url}/v1/images/edits",
        files={"image": file(ROOM)},
        data={"prompt": "a cat", "num_inference_steps": "1000", "n": "3"},
    )
    body = form.read()
    headers = "".join(f"{name}: {value}\r\n" for name, value in form.headers.items())
    head = f"POST /v1/images/edits HTTP/1.1\r\n{headers}\r\n".encode()
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as sock:
        sock.sendall(head + body[: int(sent * len(body))])
        if sent == 1.0:
            assert within(2.0, lambda: server.engine.stats.running == 3)
    assert within(1.0, lambda: server.engine.stats.running == server.engine.stats.waiting == 0)


def test_a_client_that_leaves_while_its_image_is_decoded_starts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    decoding, left = threading.Event(), threading.Event()

    def read_picture(*_: Any) -> Any:
        decoding.set()
        assert left.wait(5)
        raise AssertionError("nobody hears this")

    monkeypatch.setattr(edits, "read_picture", read_picture)
    engine = DrawingEngine()
    app = make_app(engine)
    form = httpx.Request("POST", "http://localhost/", files={"image": file(ROOM)}, data={"prompt": "a cat"})
    body = [{"type": "http.request", "body": form.read(), "more_body": False}]

    async def receive() -> Any:
        if body:
            return body.pop()
        await asyncio.to_thread(decoding.wait)
        asyncio.get_running_loop().call_later(0.1, left.set)
        return {"type": "http.disconnect"}

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(name.lower().encode(), value.encode()) for name, value in form.headers.items()]
    scope = {"type": "http", "method": "POST", "path": "/v1/images/edits", "headers": headers, "query_string": b""}
    asyncio.run(app(scope, receive, send))
    assert sent[0]["status"] == 499
    assert engine.requests == []
    assert 'requests_total{code="request_cancelled"} 1.0' in call(app, "GET", "/metrics").text
