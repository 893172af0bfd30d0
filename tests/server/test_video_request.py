from __future__ import annotations

import dataclasses
import json
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stepbatch.config import LimitsConfig
from stepbatch.errors import InvalidValue, ModelNotFound, RequestError, UnknownParameter
from stepbatch.image import InputImage
from stepbatch.server.fields import GENERATIONS, IGNORED_OPENAI, IGNORED_OTHERS, ROUTES, VIDEO_FIELDS, VIDEOS
from stepbatch.server.schema import from_texts, parse_json
from stepbatch.server.video_request import VideoRequest, check_before_decoding, parse_video
from stepbatch.testing import FakeRunner

from .support import MODEL, VIDEO_MODEL

INFO = FakeRunner(VIDEO_MODEL).info


def parse(**fields: Any) -> VideoRequest:
    return parse_video({"prompt": "a cat", **fields}, INFO)


def refusal(**fields: Any) -> RequestError:
    """Why fields are refused, by themselves or by the model."""
    try:
        wanted = parse(**fields)
    except InvalidValue as refused:
        return refused
    with pytest.raises(InvalidValue) as unserved:
        wanted.generation.resolve(INFO)
    return wanted.blame(unserved.value)


def test_null_counts_as_absent_for_every_field() -> None:
    names = [name for name in (*ROUTES[VIDEOS], *IGNORED_OPENAI, *IGNORED_OTHERS) if name != "prompt"]
    assert parse(**dict.fromkeys(names)) == parse()


def test_every_field_reaches_the_request() -> None:
    given = {
        "num_frames": 13,
        "fps": 12,
        "negative_prompt": "dogs",
        "num_inference_steps": 7,
        "guidance_scale": 2.0,
        "guidance_scale_2": 3.0,
        "true_cfg_scale": 4.0,
        "flow_shift": 5.0,
        "max_sequence_length": 99,
        "timeout": 60.0,
        "priority": 3,
        "seed": 6,
    }
    generation = parse(**given, size="32x48", model="tiny", generator_device="cpu").generation
    assert {name: getattr(generation, name) for name in given} == given
    assert (generation.prompt, generation.width, generation.height, generation.n) == ("a cat", 32, 48, 1)
    untold = {"prompt", "model", "size", "width", "height", "seconds", "user", "generator_device"}
    assert set(given) | untold == set(VIDEO_FIELDS)


@pytest.mark.parametrize(
    ("fields", "frames"),
    [
        ({"seconds": "4"}, 33),
        ({"seconds": 4}, 33),
        ({"seconds": 1.5, "fps": 16}, 25),
        ({"seconds": "1", "num_frames": 9}, 9),
        ({"num_frames": 5}, 5),
        ({}, None),
    ],
)
def test_seconds_become_frames(fields: dict[str, Any], frames: int | None) -> None:
    assert parse(**fields).generation.num_frames == frames


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"seconds": "x"}, "seconds", "must be a number"),
        ({"seconds": 0}, "seconds", "must be a number"),
        ({"seconds": [4]}, "seconds", "must be a number"),
        ({"seconds": "16"}, "seconds", "at most 15.125 at 8 frames a second"),
        ({"seconds": 4, "fps": 240}, "seconds", "at most 0.504 at 240 frames a second"),
        ({"seconds": 2, "num_frames": 9}, "seconds", "2 seconds at 8 frames a second are 17 frames"),
        ({"seconds": 2, "fps": "8"}, "fps", "must be an integer"),
        ({"fps": 0}, "fps", "from 1 to 240"),
        ({"num_frames": 10}, "num_frames", "9 or 13, not 10"),
        ({"num_frames": 125}, "num_frames", "from 1 to 121"),
        ({"size": "33x32"}, "size", "width must be a multiple of 16"),
        ({"size": "big"}, "size", "WIDTHxHEIGHT"),
        ({"size": "32x32", "width": 48}, "size", "disagrees with width"),
        ({"width": 33, "height": 32}, "width", "multiple of 16"),
        ({"prompt": ""}, "prompt", "must not be empty"),
        ({"prompt": None}, "prompt", "is required"),
        ({"true_cfg_scale": 2}, "true_cfg_scale", "has no effect on this model"),
        ({"generator_device": "cuda"}, "generator_device", "noise is drawn on the CPU"),
        ({"input_reference": {"file_id": "file-1"}}, "input_reference", "upload it as a file"),
        ({"input_reference": "https://example.com/a.png"}, "input_reference", "upload it as a file"),
    ],
)
def test_what_can_not_be_is_refused_by_name(fields: dict[str, Any], param: str, message: str) -> None:
    error = refusal(**fields)
    assert (error.param, error.status) == (param, 400)
    assert message in error.message


@pytest.mark.parametrize(
    ("name", "message"),
    [("second", "did you mean seconds?"), ("n", f"n is a field of {GENERATIONS}"), ("image", "/v1/images/edits")],
)
def test_a_field_that_there_is_not(name: str, message: str) -> None:
    with pytest.raises(UnknownParameter, match=message.replace("?", r"\?")) as refused:
        parse(**{name: 1})
    assert refused.value.param == name


def test_ignored_fields_are_listed() -> None:
    assert parse(user="me", quality="high", enable_teacache=True).ignored == ("user", "quality", "enable_teacache")


def test_another_model() -> None:
    with pytest.raises(ModelNotFound):
        parse(model="sora-2")
    with pytest.raises(InvalidValue, match="makes pictures; ask for them at /v1/images/generations") as refused:
        parse_video({"prompt": "a cat"}, FakeRunner(MODEL).info)
    assert refused.value.param == "model"


def test_a_model_of_videos_from_prompts_alone_takes_no_image() -> None:
    info = msgspec.structs.replace(INFO, tasks=("text-to-video",))
    with pytest.raises(InvalidValue, match="takes no images") as refused:
        check_before_decoding(parse_video({"prompt": "a cat"}, info), info)
    assert refused.value.param == "input_reference"


def test_a_model_that_needs_an_image_says_how() -> None:
    info = msgspec.structs.replace(INFO, tasks=("image-to-video",))
    wanted = parse()
    with pytest.raises(InvalidValue) as refused:
        wanted.generation.resolve(info)
    error = wanted.blame(refused.value)
    assert (error.param, "upload it as input_reference" in error.message) == ("input_reference", True)


@pytest.mark.parametrize(
    ("given", "param"), [({"size": "32x32"}, "size"), ({}, "size"), ({"width": 32, "height": 32}, "width")]
)
def test_errors_name_what_was_given(given: dict[str, Any], param: str) -> None:
    wanted = parse(**given)
    image = InputImage(1, 1, b"rgb")
    wanted = dataclasses.replace(wanted, generation=dataclasses.replace(wanted.generation, images=(image,)))
    assert wanted.blame(InvalidValue("no", "width")).param == param
    assert wanted.blame(InvalidValue("no", "num_frames")).param == "num_frames"
    assert parse(seconds=1).blame(InvalidValue("no", "num_frames")).param == "seconds"


def test_a_form_s_texts_become_values() -> None:
    texts = {"seconds": "4", "num_frames": "33", "fps": "8", "flow_shift": "3.5", "seed": "1", "size": "", "user": "1"}
    assert from_texts(texts, VIDEOS) == {
        "seconds": "4", "num_frames": 33, "fps": 8, "flow_shift": 3.5, "seed": 1, "user": "1"
    }  # fmt: skip


def test_a_name_has_one_type_on_every_route() -> None:
    for name, field in VIDEO_FIELDS.items():
        assert ROUTES[GENERATIONS].get(name, field)["type"] == field["type"]


everything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
likely = st.sampled_from(["64x64", "auto", "4", "0.5", "cpu", 1, 5, 9, 64, 0, 1.0, 0.25, False, True])


@settings(max_examples=80, deadline=None)
@given(st.dictionaries(st.sampled_from([*ROUTES[VIDEOS], *IGNORED_OPENAI]), likely | everything))
def test_any_value_is_taken_or_refused_by_name(fields: dict[str, Any]) -> None:
    body = parse_json(json.dumps({"prompt": "a cat", **fields}).encode())
    error = None
    try:
        parse_video(body, INFO).generation.resolve(INFO)
    except RequestError as refusal:
        error = refusal
    assert error is None or (error.status in (400, 404) and error.param in ROUTES[VIDEOS])


def test_a_server_may_set_lower_limits() -> None:
    limits = LimitsConfig(max_steps=20, max_prompt_bytes=8)
    for name, value in (("num_inference_steps", 21), ("prompt", 9 * "x"), ("negative_prompt", 9 * "x")):
        with pytest.raises(InvalidValue) as caught:
            parse_video({"prompt": "a cat", name: value}, INFO, limits=limits)
        assert caught.value.param == name
