import json
import sys
from typing import Any

import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st
from tests.bench.support import EDITS, VideoServer, at, image_file, item, pictures_json, png, send, serving, video

from stepbatch.bench.load.api import APIS, BadOutput, Expected, Found, Prepared, prepare
from stepbatch.bench.workload.work import WorkItem
from stepbatch.errors import OptionError, SetupError

pytestmark = pytest.mark.anyio

WHOLE = item(
    "a cat", width=64, height=32, num_inference_steps=4, guidance_scale=1.5, n=2, seed=7, extra={"negative_prompt": "x"}
)


def only(wanted: WorkItem, api: str = "auto") -> Prepared:
    (request,) = prepare([wanted], api, "m")
    return request


def fields(wanted: WorkItem, api: str = "auto") -> dict[str, Any]:
    request = only(wanted, api)
    assert request.content_type == "application/json"
    sent: dict[str, Any] = json.loads(b"".join(request.body))
    return sent


def test_a_generation_is_json_of_what_is_given() -> None:
    assert fields(WHOLE) == {
        "model": "m",
        "prompt": "a cat",
        "size": "64x32",
        "n": 2,
        "response_format": "b64_json",
        "seed": 7,
        "num_inference_steps": 4,
        "guidance_scale": 1.5,
        "negative_prompt": "x",
    }
    assert fields(item("ä")) == {"model": "m", "prompt": "ä", "n": 1, "response_format": "b64_json"}
    assert only(WHOLE).asked == WHOLE.asked()


def test_extra_fields_are_laid_over_and_null_takes_one_away() -> None:
    sent = fields(item(width=64, height=64, extra={"size": None, "width": 32, "height": 16, "n": 3, "lora": {"a": 1}}))
    assert sent == {
        "model": "m",
        "prompt": "x",
        "n": 3,
        "response_format": "b64_json",
        "width": 32,
        "height": 16,
        "lora": {"a": 1},
    }


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (item(), Expected(1)),
        (item(n=3, width=64, height=32), Expected(3, 64, 32)),
        (item(width=64, height=32, extra={"size": None}), Expected(1)),
        (item(width=64, height=32, extra={"size": "auto", "n": "2"}), Expected(2)),
        (item(width=64, height=32, extra={"size": None, "width": 8, "height": 16}), Expected(1, 8, 16)),
        (item(task="text-to-video", width=64, height=32, num_frames=9, fps=8), Expected(1, 64, 32, 9)),
    ],
)
def test_outputs_are_held_against_what_is_sent(wanted: WorkItem, expected: Expected) -> None:
    assert only(wanted).expected == expected


def test_each_task_has_its_route() -> None:
    image = (image_file(),)
    items = [
        item(),
        item(task="image-to-image", images=image),
        item(task="text-to-video"),
        item(task="image-to-video", images=image),
    ]
    assert [request.api.path for request in prepare(items, "auto", "m")] == [
        "/v1/images/generations",
        "/v1/images/edits",
        "/v1/videos",
        "/v1/videos",
    ]
    assert only(item(images=image), "edits").api is APIS["edits"]
    assert only(item(), "videos").api is APIS["videos"]


@pytest.mark.parametrize(
    ("wanted", "api", "named"),
    [
        (item(), "edits", "--api edits"),
        (item(images=(image_file(),)), "images", "--api images"),
        (item(n=2), "videos", "--n"),
        (item(images=(image_file(), image_file())), "videos", "one image"),
        (item(width=64), "auto", "--width"),
    ],
)
def test_what_a_route_can_not_send_is_refused(wanted: WorkItem, api: str, named: str) -> None:
    with pytest.raises(OptionError, match=named):
        only(wanted, api)


def test_videos_that_could_not_be_checked_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)  # as if it were not installed
    assert only(item()).api is APIS["images"]
    with pytest.raises(SetupError, match="PyAV"):
        only(item(task="text-to-video"))


def part(value: str | web.FileField) -> object:
    return (value.filename, value.content_type, value.file.read()) if isinstance(value, web.FileField) else value


async def test_an_edit_is_a_form_with_its_images() -> None:
    seen: list[list[tuple[str, object]]] = []

    async def handle(request: web.Request) -> web.StreamResponse:
        assert request.content_length is not None
        form = await request.post()
        seen.append([(name, part(value)) for name, value in form.items()])
        return pictures_json(png())

    large = png() + bytes(3_000_000)  # sent in pieces
    one = item(
        "line\r\n--two", task="image-to-image", images=(image_file('a "b".png', large),), seed=3, extra={"o": [1]}
    )
    two = item(task="image-to-image", images=(image_file("ä.png"), image_file("x", b"\xff\xd8\xff...")))
    async with serving(("POST", EDITS, handle)) as url:
        with await send([one, two], at(url), max_concurrency=1) as driven:
            assert [record.outcome for record in driven.records] == ["ok", "ok"]
    assert seen[0] == [
        ("model", "m"),
        ("prompt", "line\r\n--two"),
        ("n", "1"),
        ("response_format", "b64_json"),
        ("seed", "3"),
        ("o", "[1]"),
        ("image", ("a %22b%22.png", "image/png", large)),
    ]
    assert seen[1][-2:] == [
        ("image[]", ("ä.png", "image/png", png())),
        ("image[]", ("x", "image/jpeg", b"\xff\xd8\xff...")),
    ]


def test_a_file_that_many_requests_have_is_in_memory_once() -> None:
    image = image_file()
    requests = prepare([item(task="image-to-image", images=(image,), seed=i) for i in range(3)], "auto", "m")
    assert all(any(piece is image.data for piece in request.body) for request in requests)
    assert [b"".join(r.body) for r in requests] == [
        b"".join(r.body)
        for r in prepare([item(task="image-to-image", images=(image,), seed=i) for i in range(3)], "auto", "m")
    ]


async def test_a_video_from_an_image_is_a_form() -> None:
    server = VideoServer(video(), looks=1)
    wanted = item("go", task="image-to-video", images=(image_file(),), fps=8, num_frames=5)
    async with serving(*server.routes()) as url:
        with await send([wanted], at(url, poll_interval=0.01)) as driven:
            assert driven.records[0].outcome == "ok"
    assert server.asked == [{"model": "m", "prompt": "go", "fps": "8", "num_frames": "5"}]
    assert server.files == [("input_reference", png())]


async def test_routes_mix_in_one_run() -> None:
    server = VideoServer(video(), looks=1)

    async def handle(request: web.Request) -> web.StreamResponse:
        return pictures_json(png())

    items = [item(), item(task="image-to-image", images=(image_file(),)), item(task="text-to-video")] * 2
    routes = [("POST", f"/v1/images/{name}", handle) for name in ("generations", "edits")]
    async with serving(*routes, *server.routes()) as url:
        with await send(items, at(url, poll_interval=0.01)) as driven:
            assert [record.outcome for record in driven.records] == ["ok"] * 6


def test_what_an_answer_holds() -> None:
    body = json.dumps({"data": [{"b64_json": "eHk="}, {"url": "/v1/files/1"}], "timings": {"queue": 1}}).encode()
    assert APIS["images"].read(body, b"") == Found((b"xy", "/v1/files/1"), {"timings": {"queue": 1}})
    assert APIS["videos"].read(b"mp4", b'{"id": "1"}') == Found((b"mp4",), {"id": "1"})


@pytest.mark.parametrize(
    ("element", "why"),
    [
        ({}, "is missing"),
        (None, "is missing"),
        ({"b64_json": 3}, "no base64"),
        ({"b64_json": "ä"}, "no base64"),
        ({"b64_json": "a"}, "no base64"),
        ({"url": 3}, "is missing"),
    ],
)
def test_an_output_that_is_none_is_told(element: object, why: str) -> None:
    (output,) = APIS["images"].read(json.dumps({"data": [element]}).encode(), b"").outputs
    assert isinstance(output, BadOutput)
    assert why in str(output)


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text() | st.sampled_from(["eHk=", "data:,x"]),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["data", "b64_json", "url", "timings"]), inner),
    max_leaves=20,
)


@given(st.binary() | JSON.map(lambda value: json.dumps(value).encode()), st.sampled_from(list(APIS)))
def test_any_answer_is_read_or_refused(body: bytes, api: str) -> None:
    try:
        found = APIS[api].read(body, body)
    except BadOutput as error:
        why = str(error)
        assert why
    else:
        assert all(isinstance(output, bytes | str | BadOutput) for output in found.outputs)
