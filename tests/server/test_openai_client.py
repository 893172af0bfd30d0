"""The official client against the server, as users have it."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
from openai.types import ImagesResponse
from PIL import Image
from tests.pictures import file, image

from stepbatch.image import InputImage
from stepbatch.testing import FakeRunner

from .support import MAX_IMAGE_BYTES, MODEL, RunningServer

ROOM = image(size=(48, 32))


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
