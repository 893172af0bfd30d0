import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepbatch.config import ModelConfig
from stepbatch.engine.messages import (
    Cancel,
    Cancelled,
    Failure,
    FromEngine,
    Output,
    Progress,
    Ready,
    Refused,
    Shutdown,
    Stats,
    Submit,
    ToEngine,
    Unit,
    decode_from_engine,
    decode_to_engine,
    encode,
)
from stepbatch.errors import InvalidValue
from stepbatch.request import MAX_SEED, GenerationRequest, Times
from stepbatch.testing import FakeRunner

text = st.text(st.characters(exclude_categories=["Cs"]))
prompts = text.filter(str.strip)
count = st.integers(0, 2**53)
seconds = st.floats(0, 1e9)
job_id = st.tuples(text, st.integers(0, 9))

requests = st.builds(
    GenerationRequest,
    prompt=prompts,
    negative_prompt=st.none() | text,
    num_inference_steps=st.none() | st.integers(1, 1000),
    guidance_scale=st.none() | st.floats(0, 100),
    seed=st.none() | st.integers(0, MAX_SEED - 9),
    n=st.integers(1, 10),
)
to_engine = st.one_of(
    st.builds(Submit, text, requests, st.lists(st.integers(0, 9)), seconds, st.booleans()),
    st.builds(Cancel, text),
    st.builds(Shutdown),
)
from_engine = st.one_of(
    st.just(Ready(FakeRunner(ModelConfig()).info)),
    st.builds(Refused, text),
    st.builds(Unit, st.sampled_from(["encode", "denoise", "decode"]), st.lists(job_id), seconds),
    st.builds(Progress, st.lists(st.tuples(text, st.integers(0, 9), count, count))),
    st.builds(
        Output, text, st.integers(0, 9), count, count, count, count, st.binary(), st.builds(Times, seconds, seconds)
    ),
    st.builds(Failure, text, st.integers(0, 9), text, text, st.none() | text),
    st.builds(Cancelled, text, st.integers(0, 9)),
    st.builds(Stats, count, count, count, count, count, seconds, seconds),
)


@given(to_engine)
def test_messages_to_the_engine_come_through_unchanged(message: ToEngine) -> None:
    assert decode_to_engine(encode(message)) == message


@given(from_engine)
def test_messages_from_the_engine_come_through_unchanged(message: FromEngine) -> None:
    assert decode_from_engine(encode(message)) == message


@given(st.binary())
def test_garbage_raises(data: bytes) -> None:
    for decode in (decode_to_engine, decode_from_engine):
        with pytest.raises(msgspec.DecodeError):
            decode(data)


def test_a_message_for_the_other_side_raises() -> None:
    with pytest.raises(msgspec.ValidationError):
        decode_to_engine(encode(Stats()))
    with pytest.raises(msgspec.ValidationError):
        decode_from_engine(encode(Shutdown()))


def test_a_request_that_comes_through_has_been_validated_again() -> None:
    request = GenerationRequest(prompt="x")
    object.__setattr__(request, "guidance_scale", math.inf)
    with pytest.raises(InvalidValue, match="guidance_scale"):
        decode_to_engine(encode(Submit("r", request, [0], 0.0)))


def test_a_message_whose_text_is_no_text_raises() -> None:
    for decode, message in ((decode_from_engine, Refused("abc")), (decode_to_engine, Cancel("abc"))):
        with pytest.raises(msgspec.DecodeError):
            decode(encode(message).replace(b"abc", b"\xff\xfe\xfd"))
