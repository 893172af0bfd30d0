from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stepbatch.config import BatchingConfig, LimitsConfig, ModelConfig
from stepbatch.errors import InvalidJSON, InvalidValue, RequestError, UnknownParameter
from stepbatch.image import InputImage
from stepbatch.server.fields import FIELDS, IGNORED_OPENAI, IGNORED_OTHERS, idle_fields
from stepbatch.server.schema import ImageRequest, from_texts, parse, parse_json
from stepbatch.testing import FakeRunner

INFO = FakeRunner(ModelConfig(model_path="/models/tiny", served_model_name="fake")).info

everything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
likely = st.sampled_from(
    ["64x64", "auto", "url", "png", "jpeg", "cpu", "fake", "opaque", 1, 4, 64, 0, 1.0, False, True]
)


def parse_fields(**fields: Any) -> ImageRequest:
    return parse({"prompt": "a cat", **fields}, INFO)


def test_absent_fields_take_their_defaults() -> None:
    wanted = parse_fields()
    assert (wanted.response_format, wanted.output_format, wanted.output_compression) == ("b64_json", "png", 100)
    assert (wanted.generation.n, wanted.generation.width, wanted.generation.seed) == (1, None, None)
    assert wanted.ignored == ()


def test_null_counts_as_absent_for_every_optional_field() -> None:
    names = [name for name in (*FIELDS, *IGNORED_OPENAI, *IGNORED_OTHERS) if name != "prompt"]
    assert parse_fields(**dict.fromkeys(names)) == parse_fields()


@pytest.mark.parametrize("fields", [{"size": "32x48"}, {"width": 32, "height": 48}, {"size": "32x48", "width": 32}])
def test_a_size_may_come_either_way(fields: dict[str, Any]) -> None:
    request = parse_fields(**fields).generation
    assert (request.width, request.height) == (32, 48)


def test_how_soon_it_is_wanted_goes_to_the_engine() -> None:
    usual = parse_fields(timeout=30, priority=2, user="one")
    assert (usual.generation.timeout, usual.generation.priority, usual.generation.user) == (30.0, 2, None)
    assert usual.ignored == ("priority", "user")
    useful = idle_fields(BatchingConfig(scheduling_policy="deadline"))
    wanted = parse({"prompt": "a cat", "timeout": 0.5, "priority": -2}, INFO, useful)
    assert (wanted.generation.timeout, wanted.generation.priority) == (0.5, -2)
    assert wanted.ignored == ()
    shared = idle_fields(BatchingConfig(scheduling_policy="deadline", fair_shares=True))
    assert shared == ("priority",)  # shares go before any policy
    assert parse({"prompt": "a cat", "user": "one"}, INFO, shared).generation.user == "one"


def test_a_user_is_checked_only_where_it_counts() -> None:
    assert parse_fields(user=5).ignored == ("user",)
    with pytest.raises(InvalidValue, match="user must be a string"):
        parse({"prompt": "a cat", "user": 5}, INFO, idle_fields(BatchingConfig(fair_shares=True)))


def test_auto_is_no_size() -> None:
    assert parse_fields(size="auto").generation.width is None
    assert parse_fields(size="auto", width=32, height=32).generation.width == 32


@pytest.mark.parametrize("name", ["fake", "/models/tiny", "tiny"])
def test_a_model_has_three_names(name: str) -> None:
    assert parse_fields(model=name) == parse_fields()


def test_values_that_ask_for_nothing_are_neither_refused_nor_ignored() -> None:
    assert parse_fields(stream=False, partial_images=0, generator_device="cpu", enable_upscaling=False).ignored == ()


def test_ignored_fields_are_listed() -> None:
    wanted = parse_fields(quality="high", user="me", background="auto", vae_use_tiling=True, style=None)
    assert set(wanted.ignored) == {"quality", "user", "background", "vae_use_tiling"}


@pytest.mark.parametrize(("name", "hint"), [("promt", "prompt"), ("num_inference_step", "num_inference_steps")])
def test_an_unknown_field_comes_with_a_hint(name: str, hint: str) -> None:
    with pytest.raises(UnknownParameter, match=f"did you mean {hint}") as caught:
        parse_fields(**{name: 1})
    assert caught.value.param == name


def test_an_unknown_field_without_a_close_one_has_no_hint() -> None:
    with pytest.raises(UnknownParameter) as caught:
        parse_fields(zzz=1)
    assert "mean" not in caught.value.message


@pytest.mark.parametrize("name", ["width", "height"])
def test_a_side_at_fault_is_blamed_on_size_where_it_came_as_that(name: str) -> None:
    assert parse_fields(size="32x48").blame(InvalidValue("no", name)).param == "size"
    assert parse_fields(width=32, height=48).blame(InvalidValue("no", name)).param == name


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b'"x"', b"1", b"{'a': 1}", b'{"a": 1} x', b"[" * 99_999, b'{"a":' * 50_000, b'"\xff"'],
)  # fmt: skip
def test_what_is_no_json_object_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidJSON):
        parse_json(body)


def test_a_body_of_very_many_values_is_refused_unread() -> None:
    with pytest.raises(InvalidJSON, match="20000 commas"):
        parse_json(b'{"prompt": [' + b"[1]," * 10_000 + b"1}")
    assert parse_json(b'{"prompt": "' + b"a," * 9_999 + b'"}') == {"prompt": "a," * 9_999}


def test_duplicate_keys_are_fine() -> None:
    assert parse_json(b'{"a": 1, "a": 2}') == {"a": 2}


def test_a_huge_integer_is_read_and_then_refused_by_its_field() -> None:
    body = parse_json(b'{"prompt": "a cat", "seed": ' + b"9" * 10_000 + b"}")
    with pytest.raises(InvalidValue) as caught:
        parse(body, INFO)
    assert caught.value.param == "seed"


def test_a_form_s_texts_become_values_by_their_fields_types() -> None:
    texts = {"n": "+3", "seed": "0012", "guidance_scale": "1e1", "stream": "TRUE", "user": "7", "size": "9"}
    values = from_texts({**texts, "prompt": "", "negative_prompt": ""})
    assert values == {
        "n": 3, "seed": 12, "guidance_scale": 10.0, "stream": True, "user": "7", "size": "9", "negative_prompt": ""
    }  # fmt: skip
    assert [type(values[name]) for name in ("n", "guidance_scale", "stream")] == [int, float, bool]


@given(name=st.sampled_from(["n", "seed", "guidance_scale", "strength", "stream"]), text=st.text())
def test_any_text_is_a_value_of_its_type_or_refused_by_name(name: str, text: str) -> None:
    try:
        values = from_texts({name: text})
    except InvalidValue as refusal:
        assert refusal.param == name  # noqa: PT017
    else:
        assert not text or isinstance(values[name], (int, float))


@pytest.mark.parametrize("images", [(), (InputImage(1, 1, b"rgb"),)])
def test_images_go_by_the_name_of_their_field(images: tuple[InputImage, ...]) -> None:
    wanted = parse_fields()
    wanted = dataclasses.replace(wanted, generation=dataclasses.replace(wanted.generation, images=images))
    blamed = wanted.blame(InvalidValue("no", "images"))
    assert blamed.param == "image"
    assert ("/v1/images/edits" in blamed.message) == (not images)
    assert wanted.blame(InvalidValue("no", "width")).param == ("size" if images else "width")


@settings(max_examples=80, deadline=None)
@given(st.dictionaries(st.sampled_from([*FIELDS, *IGNORED_OPENAI]), likely | everything))
def test_any_value_is_taken_or_refused_by_name(fields: dict[str, Any]) -> None:
    body = parse_json(json.dumps({"prompt": "a cat", **fields}).encode())
    error = None
    try:
        parse(body, INFO).generation.resolve(INFO)
    except RequestError as refusal:
        error = refusal
    assert error is None or (error.status in (400, 404) and error.param in FIELDS)


LIMITS = LimitsConfig(max_outputs=2, max_steps=20, max_prompt_bytes=8)


@pytest.mark.parametrize(
    ("name", "most", "more"),
    [
        ("n", 2, 3),
        ("num_inference_steps", 20, 21),
        ("prompt", "\u00e4\u00e4\u00e4\u00e4", "\u00e4\u00e4\u00e4\u00e4x"),
        ("negative_prompt", "\U0001f600\U0001f600", "\U0001f600\U0001f600x"),
    ],
)
def test_a_server_may_set_lower_limits(name: str, most: Any, more: Any) -> None:
    parse({"prompt": "a cat", name: most}, INFO, limits=LIMITS)
    with pytest.raises(InvalidValue) as caught:
        parse({"prompt": "a cat", name: more}, INFO, limits=LIMITS)
    assert caught.value.param == name


def test_by_default_prompts_of_32_kib_are_taken() -> None:
    assert parse_fields(prompt=32_000 * "x")
    with pytest.raises(InvalidValue, match="at most 32768 bytes"):
        parse_fields(prompt=20_000 * "\u00e4")
