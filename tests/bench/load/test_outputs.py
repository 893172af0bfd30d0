import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from tests import pictures
from tests.bench.support import (
    GENERATIONS,
    Handler,
    VideoServer,
    at,
    draw,
    image_file,
    item,
    pictures_json,
    png,
    send,
    serving,
    video,
)

from stepbatch.bench.load.outputs import Shape, check_outputs, read_video
from stepbatch.bench.results import Record
from stepbatch.bench.workload.work import WorkItem
from stepbatch.demo.burst import serving as stepbatch_serving
from stepbatch.errors import SetupError

pytestmark = pytest.mark.anyio


async def checked(
    items: Sequence[WorkItem], *routes: tuple[str, str, Handler], folder: Path | None = None
) -> list[Record]:
    """The records of a load on a server with these routes, checked."""
    seen: list[int] = []
    async with serving(*routes) as url:
        with await send(items, at(url, poll_interval=0.01)) as driven:
            answered = sum(record.outcome == "ok" for record in driven.records)
            await check_outputs(driven, folder, seen.append)
    assert sorted(seen) == list(range(1, answered + 1))
    return driven.records


async def judged(response: web.Response, **fields: Any) -> Record:
    """The record of one request that gets this answer."""

    async def handle(request: web.Request) -> web.StreamResponse:
        return response

    (record,) = await checked([item(**fields)], ("POST", GENERATIONS, handle))
    return record


def told(record: Record) -> tuple[str, str]:
    return record.outcome, record.error


async def test_pictures_are_counted_and_measured() -> None:
    items = [item(width=64, height=32), item(n=3, width=40, height=16), item(n=2)]
    records = await checked(items, ("POST", GENERATIONS, draw))
    assert [told(record) for record in records] == [("ok", "")] * 3
    assert [record.outputs for record in records] == [1, 3, 2]
    assert [record.megapixels for record in records] == pytest.approx([0.002048, 0.00192, 0.000128])


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
async def test_any_usual_kind_of_file_will_do(kind: str, tmp_path: Path) -> None:
    data = pictures.file(pictures.image(), kind)

    async def handle(request: web.Request) -> web.StreamResponse:
        return pictures_json(data)

    (record,) = await checked([item(width=12, height=8)], ("POST", GENERATIONS, handle), folder=tmp_path)
    assert told(record) == ("ok", "")
    (file,) = tmp_path.iterdir()
    assert file.name == {"PNG": "0000-0.png", "JPEG": "0000-0.jpg", "WEBP": "0000-0.webp"}[kind]
    assert file.read_bytes() == data


async def test_a_wrong_size_is_invalid() -> None:
    record = await judged(pictures_json(png(32, 64)), width=64, height=32)
    assert told(record) == ("invalid", "output 0 is 32x64, where 64x32 was asked for")
    assert record.outputs == 1


async def test_a_wrong_count_is_invalid() -> None:
    record = await judged(pictures_json(png()), n=2)
    assert told(record) == ("invalid", "the number of outputs is 1, not 2")
    record = await judged(pictures_json(png(), png()))
    assert told(record) == ("invalid", "the number of outputs is 2, not 1")


async def test_each_output_is_judged_by_itself(tmp_path: Path) -> None:
    async def handle(request: web.Request) -> web.StreamResponse:
        return pictures_json(png(), b"no picture", png()[:-30], png())

    (record,) = await checked([item(n=4)], ("POST", GENERATIONS, handle), folder=tmp_path)
    assert record.outcome == "invalid"
    assert "output 1 is not a PNG" in record.error
    assert "output 2 can't be read" in record.error
    assert record.outputs == 2
    assert sorted(file.name for file in tmp_path.iterdir()) == ["0000-0.png", "0000-3.png"]


async def test_truncated_base64_is_invalid() -> None:
    whole = base64.b64encode(png(64, 64)).decode()
    for length in (len(whole) // 2 // 4 * 4, len(whole) // 2 // 4 * 4 + 1):
        record = await judged(web.json_response({"data": [{"b64_json": whole[:length]}]}))
        assert record.outcome == "invalid"
        assert record.error.startswith("output 0 ")
        assert record.outputs == 0


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("", "no JSON"),
        ("[]", "no JSON object"),
        ("{}", "the number of outputs is 0, not 1"),
        ('{"data": []}', "the number of outputs is 0, not 1"),
        ('{"data": [{}]}', "output 0 is missing"),
        ('{"data": {"b64_json": "x"}}', "the number of outputs is 0, not 1"),
        ("event: x\ndata: {}\n\n", "no JSON"),
    ],
)
async def test_an_answer_in_another_shape_is_invalid(body: str, why: str) -> None:
    record = await judged(web.Response(text=body))
    assert record.outcome == "invalid"
    assert why in record.error


async def test_only_what_was_answered_is_looked_at() -> None:
    record = await judged(web.json_response({"error": {"message": "no"}}, status=500))
    assert told(record) == ("failed", "no")


async def test_what_the_server_tells_is_kept() -> None:
    times = {"queue": 1.0, "encode": 0.5, "denoise": 2.0, "decode": 0.25}
    record = await judged(pictures_json(png(), timings=times, peak_memory_mb=100))
    assert (record.queue_s, record.service_s, record.peak_memory_mb) == (1.0, 2.75, 100.0)
    record = await judged(pictures_json(png(), timings=times, inference_time_s=9))
    assert (record.queue_s, record.service_s) == (1.0, 9.0)  # which has the waits between stages in it
    record = await judged(pictures_json(png(), inference_time_s=9.5, usage={"peak_memory_mb": 3}))
    assert (record.queue_s, record.service_s, record.peak_memory_mb) == (None, 9.5, 3.0)
    record = await judged(pictures_json(png(), metrics={"peak_memory_mb": 4}, usage=None, timings=[1]))
    assert (record.queue_s, record.service_s, record.peak_memory_mb) == (None, None, 4.0)
    record = await judged(pictures_json(png(), inference_time_s="1", peak_memory_mb=True, timings={"queue": None}))
    assert (record.queue_s, record.service_s, record.peak_memory_mb) == (None, None, None)


async def test_urls_are_fetched_from_wherever_they_lead() -> None:
    keys: list[tuple[str, str | None]] = []

    async def file(request: web.Request) -> web.StreamResponse:
        keys.append((request.path, request.headers.get("Authorization")))
        return web.Response(body=png())

    async def gone(request: web.Request) -> web.StreamResponse:
        return web.Response(status=404, text="gone")

    async with serving(("GET", "/far.png", file)) as elsewhere:
        data_url = "data:image/png;base64," + base64.b64encode(png()).decode()
        urls = ["/near.png", "", f"{elsewhere}/far.png", data_url, "/gone.png", "file:///etc/passwd", "data:;base64,a"]
        urls.append("http://a..b/x.png")

        async def handle(request: web.Request) -> web.StreamResponse:
            number = int((await request.json())["prompt"])
            url = urls[number] or f"{request.url.origin()}/near.png"
            return web.json_response({"data": [{"url": url}]})

        routes = [("POST", GENERATIONS, handle), ("GET", "/near.png", file), ("GET", "/gone.png", gone)]
        async with serving(*routes) as url:
            items = [item(str(i), width=8, height=8) for i in range(len(urls))]
            with await send(items, at(url, api_key="secret")) as driven:
                await check_outputs(driven)
    assert [record.outcome for record in driven.records] == ["ok"] * 4 + ["invalid"] * 4
    assert driven.records[4].error == "output 0 can't be fetched: gone"
    assert driven.records[5].error == "output 0 has a url that is none of a server: file:///etc/passwd"
    assert "no base64" in driven.records[6].error
    assert "can't be fetched" in driven.records[7].error
    assert sorted(keys, key=str) == [
        ("/far.png", None),  # a key is for its own server only
        ("/near.png", "Bearer secret"),
        ("/near.png", "Bearer secret"),
    ]


async def test_a_url_that_nobody_answers_is_invalid() -> None:
    async with serving() as nobody:
        pass
    record = await judged(web.json_response({"data": [{"url": f"{nobody}/x.png"}]}))
    assert told(record) == ("invalid", "output 0 can't be fetched: Connection refused")


async def test_videos_are_decoded(tmp_path: Path) -> None:
    server = VideoServer(video(32, 16, 5), looks=1)
    server.more = {"peak_memory_mb": 7, "inference_time_s": 2}
    asked = {"task": "text-to-video", "width": 32, "height": 16}
    items = [
        item(**asked, num_frames=5),
        item(**asked, num_frames=9),
        item(**{**asked, "width": 64}),
        item(task="text-to-video"),
    ]
    records = await checked(items, *server.routes(), folder=tmp_path)
    assert [told(record) for record in records] == [
        ("ok", ""),
        ("invalid", "output 0 has 5 frames, where 9 were asked for"),
        ("invalid", "output 0 is 32x16, where 64x16 was asked for"),
        ("ok", ""),
    ]
    assert records[0].megapixels == pytest.approx(32 * 16 * 5 / 1e6)
    assert (records[0].service_s, records[0].peak_memory_mb) == (2, 7)
    assert (tmp_path / "0000-0.mp4").read_bytes() == server.content


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: data[: len(data) // 2], lambda data: png()])
async def test_a_video_that_is_none_is_invalid(damage: Any) -> None:
    server = VideoServer(damage(video()), looks=1)
    (record,) = await checked([item(task="text-to-video", num_frames=5)], *server.routes())
    assert record.outcome == "invalid"


def test_a_video_is_read_frame_by_frame() -> None:
    assert read_video(video(64, 48, 7)) == Shape(64, 48, 7)


async def test_real_pictures_and_edits(tmp_path: Path) -> None:
    with stepbatch_serving(["--backend", "fake"], tmp_path / "log") as server:
        target = at(f"http://{server.host}:{server.port}/v1/")
        items = [
            item("a", width=64, height=32, n=2, seed=1),
            item("b", task="image-to-image", images=(image_file(data=png(32, 32)),), width=48, height=48),
            item("c", task="image-to-image", images=tuple(image_file(data=png(32, 32, i)) for i in range(2))),
            item("d", width=64, height=64, extra={"response_format": "url", "output_format": "webp"}),
            item("e", width=17, height=16),
            item("f [raise-denoise]"),
        ]
        with await send(items, target, model="fake") as driven:
            await check_outputs(driven, tmp_path)
    records = driven.records
    assert [record.outcome for record in records] == ["ok", "ok", "ok", "ok", "failed", "failed"]
    assert [record.outputs for record in records] == [2, 1, 1, 1, 0, 0]
    assert "16" in records[4].error
    assert records[5].status == 500
    assert all(record.queue_s is not None and record.service_s for record in records[:4])
    assert (tmp_path / "0003-0.webp").exists()


async def test_a_folder_that_can_not_be_written_is_told_in_a_line(tmp_path: Path) -> None:
    async with serving(("POST", GENERATIONS, draw)) as url:
        with await send(9, at(url)) as driven:
            with pytest.raises(SetupError, match=r"--save-outputs: can't write .*000\d-0\.png"):
                await check_outputs(driven, tmp_path / "gone")
