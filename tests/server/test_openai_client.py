"""The official client against the server, as users have it."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterator
from pathlib import Path

import av
import httpx
import openai
import pytest
from openai.types import ImagesResponse, Video
from PIL import Image
from tests.pictures import file, image

from stepbatch.image import InputImage
from stepbatch.testing import FakeRunner

from .support import MAX_IMAGE_BYTES, MODEL, RunningServer

ROOM = image(size=(48, 32))
OUTDATED = pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")  # of OpenAI's own service


def pictures(answer: ImagesResponse) -> list[tuple[tuple[int, int], bytes]]:
    """Size and first pixel of each picture in an answer."""
    opened = [Image.open(io.BytesIO(base64.b64decode(item.b64_json or ""))) for item in answer.data or []]
    return [(picture.size, picture.tobytes()[:3]) for picture in opened]


def drawn(seed: int, *images: Image.Image) -> tuple[tuple[int, int], bytes]:
    """The same of what the engine draws if exactly these pixels come to it."""
    inputs = [InputImage(*picture.size, picture.tobytes()) for picture in images]
    return ROOM.size, FakeRunner.pixels("a cat", seed, 1, 1, inputs)


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_pictures_as_base64(client: openai.OpenAI) -> None:
    answer = client.images.generate(
        prompt="a cat",
        model="tiny",
        n=2,
        size="64x64",
        quality="high",
        extra_body={"seed": 3, "num_inference_steps": 2},
    )
    ImagesResponse.model_validate(answer.model_dump())  # the client itself takes anything
    assert answer.data is not None
    assert [base64.b64decode(item.b64_json or "")[:4] for item in answer.data] == [b"\x89PNG"] * 2
    assert answer.to_dict()["seeds"] == [3, 4]
    assert answer.to_dict()["ignored"] == ["quality"]


def test_pictures_as_urls(client: openai.OpenAI) -> None:
    answer = client.images.generate(prompt="a cat", response_format="url", output_format="jpeg", output_compression=80)
    assert answer.data is not None
    assert answer.data[0].url is not None
    assert httpx.get(answer.data[0].url).content[:3] == b"\xff\xd8\xff"


def test_an_edit_of_one_image(client: openai.OpenAI) -> None:
    answer = client.images.edit(
        image=("room.png", file(ROOM)),
        prompt="a cat",
        model="tiny",
        n=2,
        size="auto",
        quality="high",
        input_fidelity="low",
        extra_body={"seed": 5, "strength": 0.5, "num_inference_steps": 2},
    )
    ImagesResponse.model_validate(answer.model_dump())
    assert pictures(answer) == [drawn(seed, ROOM) for seed in (5, 6)]
    assert answer.to_dict()["seeds"] == [5, 6]
    assert set(answer.to_dict()["ignored"]) == {"quality", "input_fidelity"}


def test_an_edit_of_several_images(client: openai.OpenAI) -> None:
    chair = image(size=(32, 32), seed=1)
    files = [io.BytesIO(file(ROOM)), ("chair.jpg", file(chair), "image/jpg")]
    answer = client.images.edit(image=files, prompt="a cat", extra_body={"seed": 5})
    assert pictures(answer) == [drawn(5, ROOM, chair)]


def test_an_edit_with_a_mask(client: openai.OpenAI, tmp_path: Path) -> None:
    cut = ROOM.copy()
    cut.putalpha(0)
    (tmp_path / "mask.png").write_bytes(file(cut))
    with open(tmp_path / "mask.png", "rb") as mask:
        answer = client.images.edit(
            image=file(ROOM), mask=mask, prompt="a cat", response_format="b64_json", extra_body={"seed": 5}
        )
    assert pictures(answer) == [drawn(5, ROOM, Image.new("L", ROOM.size, 255))]


def test_an_edit_that_is_sent_again_is_answered_again(client: openai.OpenAI) -> None:
    def edit(color: str) -> ImagesResponse:
        return client.images.edit(
            image=file(Image.new("RGB", (48, 32), color)), prompt="a cat", extra_headers={"Idempotency-Key": "an edit"}
        )

    first = edit("red").to_dict()
    assert edit("red").to_dict() == first  # though the client has made up another boundary
    with pytest.raises(openai.UnprocessableEntityError) as reused:
        edit("blue")
    assert (reused.value.param, reused.value.code) == ("Idempotency-Key", "idempotency_key_reused")


def test_errors_of_an_edit_arrive_as_exceptions(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.images.edit(image=[], prompt="a cat")
    assert refused.value.status_code == 400
    with pytest.raises(openai.BadRequestError) as unread:
        client.images.edit(image=b"GIF89a", prompt="a cat")
    assert (unread.value.param, unread.value.code) == ("image", "invalid_value")
    with pytest.raises(openai.BadRequestError) as streamed:
        client.images.edit(image=file(ROOM), prompt="a cat", stream=True)
    assert streamed.value.param == "stream"
    with pytest.raises(openai.APIStatusError) as large:
        client.images.edit(image=b"x" * (MAX_IMAGE_BYTES + 1), prompt="a cat")
    assert (large.value.status_code, large.value.code) == (413, "payload_too_large")


def test_models(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert model.id == MODEL.served_model_name
    assert client.models.retrieve("tiny").id == model.id


def test_errors_arrive_as_exceptions(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.images.generate(prompt="a cat", n=11, extra_headers={"x-request-id": "mine"})
    assert (refused.value.param, refused.value.code, refused.value.request_id) == ("n", "invalid_value", "mine")
    with pytest.raises(openai.NotFoundError) as missing:
        client.images.generate(prompt="a cat", model="dall-e-3")
    assert (missing.value.param, missing.value.code) == ("model", "model_not_found")
    with pytest.raises(openai.BadRequestError) as unknown:
        client.images.generate(prompt="a cat", extra_body={"cfg": 3})
    assert (unknown.value.param, unknown.value.code) == ("cfg", "unknown_parameter")
    with pytest.raises(openai.InternalServerError) as failed:
        client.images.generate(prompt="[raise-denoise]")
    assert (failed.value.code, failed.value.type) == ("generation_failed", "server_error")


def test_streaming_is_refused_by_name(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.images.generate(prompt="a cat", stream=True)
    assert refused.value.param == "stream"


@pytest.fixture(scope="module")
def videos(video_server: RunningServer) -> Iterator[openai.resources.Videos]:
    with openai.OpenAI(base_url=f"{video_server.url}/v1", api_key="none", max_retries=0) as client:
        yield client.videos


SOON = {"poll_interval_ms": 20}
FEW = {"num_inference_steps": 2, "seed": 3}


@OUTDATED
def test_a_video_is_created_looked_after_and_downloaded(videos: openai.resources.Videos, tmp_path: Path) -> None:
    asked = videos.create(prompt="a cat", model="tiny", seconds="4", size="64x32", extra_body=FEW)  # type: ignore[arg-type]
    Video.model_validate(asked.model_dump() | {"size": "720x1280"})  # it knows four sizes; the client itself takes any
    assert (asked.status, asked.progress, asked.to_dict()["num_frames"]) == ("queued", 0, 33)
    made = videos.poll(asked.id, **SOON)
    Video.model_validate(made.model_dump() | {"size": "720x1280"})
    assert (made.status, made.progress, made.seconds, made.size) == ("completed", 100, "4.125", "64x32")
    videos.download_content(made.id).write_to_file(tmp_path / "cat.mp4")
    with av.open(str(tmp_path / "cat.mp4")) as video:
        assert len(list(video.decode(video=0))) == 33
    for variant, start in (("thumbnail", b"RIFF"), ("spritesheet", b"\xff\xd8\xff")):
        assert videos.download_content(made.id, variant=variant).read().startswith(start)  # type: ignore[arg-type]


@OUTDATED
def test_a_video_that_is_asked_for_again_is_the_same(videos: openai.resources.Videos) -> None:
    key = {"Idempotency-Key": "a video"}
    made = [videos.create(prompt="a cat", extra_body=FEW, extra_headers=key) for _ in range(3)]
    assert made[0] == made[1] == made[2]
    assert [video.id for video in videos.list()].count(made[0].id) == 1
    assert videos.poll(made[0].id, **SOON).status == "completed"
    assert videos.create(prompt="a cat", extra_body=FEW).id != made[0].id


@OUTDATED
def test_a_video_from_an_image(videos: openai.resources.Videos) -> None:
    made = videos.create_and_poll(prompt="a cat", input_reference=("room.png", file(ROOM)), extra_body=FEW, **SOON)
    assert (made.status, made.size) == ("completed", "48x32")


@OUTDATED
def test_polling_ends_when_a_video_fails(videos: openai.resources.Videos) -> None:
    failed = videos.create_and_poll(prompt="[nan]", extra_body=FEW, **SOON)
    assert failed.status == "failed"
    assert failed.error is not None
    assert (failed.error.code, failed.error.type) == ("invalid_model_output", "server_error")
    with pytest.raises(openai.NotFoundError):
        videos.download_content(failed.id)


@OUTDATED
def test_videos_are_listed_and_deleted(videos: openai.resources.Videos) -> None:
    made = [videos.create(prompt=f"cat {i}", extra_body=FEW).id for i in range(3)]
    listed = [video.id for video in videos.list(limit=2)]  # the client follows the pages
    assert listed[:3] == made[::-1]
    assert [video.id for video in videos.list(after=made[0], order="asc")] == made[1:]
    gone = videos.delete(made[1])
    assert (gone.id, gone.deleted, gone.object) == (made[1], True, "video.deleted")
    assert made[1] not in [video.id for video in videos.list()]
    with pytest.raises(openai.NotFoundError):
        videos.retrieve(made[1])


@OUTDATED
def test_errors_of_videos_arrive_as_exceptions(videos: openai.resources.Videos, client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as long:
        videos.create(prompt="a cat", seconds="12", extra_body={"fps": 24})
    assert (long.value.param, long.value.code) == ("seconds", "invalid_value")
    with pytest.raises(openai.BadRequestError, match="can't be an address"):
        videos.create(prompt="a cat", extra_body={"input_reference": {"image_url": "https://example.com/a.png"}})
    with pytest.raises(openai.NotFoundError) as missing:
        videos.create(prompt="a cat", model="sora-2")
    assert missing.value.param == "model"
    with pytest.raises(openai.BadRequestError, match="makes pictures"):
        client.videos.create(prompt="a cat")


@OUTDATED
def test_the_client_block_of_the_manual_runs(
    video_server: RunningServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    manual = (Path(__file__).parents[2] / "docs" / "api.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", manual, re.MULTILINE | re.DOTALL)
    (block,) = (block for block in blocks if "client.videos" in block)
    exec(block.replace("http://127.0.0.1:30200", video_server.url), {})
    with av.open(str(tmp_path / "boat.mp4")) as video:
        assert len(list(video.decode(video=0))) == 9
