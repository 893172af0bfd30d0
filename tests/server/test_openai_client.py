"""The official client against the server, as users have it."""

from __future__ import annotations

import base64
from collections.abc import Iterator

import httpx
import openai
import pytest
from openai.types import ImagesResponse

from .support import MODEL, RunningServer


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
