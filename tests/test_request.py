import dataclasses
import math
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepbatch.checks import MAX_PROMPT_CHARACTERS
from stepbatch.config import ModelConfig
from stepbatch.errors import GenerationFailed, InvalidValue
from stepbatch.image import InputImage
from stepbatch.model_info import Defaults, ModelInfo
from stepbatch.request import (
    ENDINGS,
    MAX_OUTPUTS,
    MAX_SEED,
    MAX_STEPS,
    GenerationRequest,
    Job,
    JobState,
)
from stepbatch.testing import FakeRunner

INFO: ModelInfo = FakeRunner(ModelConfig(backend="fake")).info
PICTURE, OTHER_PICTURE = InputImage(1, 1, bytes(3)), InputImage(2, 1, bytes(6))
MASK = InputImage(1, 1, bytes(1))
VIDEO_INFO = msgspec.structs.replace(
    INFO,
    tasks=("text-to-video", "image-to-video"),
    uses=(*INFO.uses, "num_frames", "fps"),
    frames_multiple=4,
    max_frames=81,
    defaults=Defaults(width=64, height=64, num_inference_steps=4, num_frames=17, fps=8),
)

BAD_VALUES: list[tuple[str, Any]] = [
    ("prompt", ""),
    ("prompt", " \n"),
    ("prompt", None),
    ("prompt", ["a"]),
    ("prompt", "x" * (MAX_PROMPT_CHARACTERS + 1)),
    ("prompt", "half a pair: \ud800"),
    ("negative_prompt", 3),
    ("negative_prompt", "\udfff"),
    ("width", 0),
    ("width", 64.0),
    ("height", -16),
    ("height", "64"),
    ("num_inference_steps", 0),
    ("num_inference_steps", MAX_STEPS + 1),
    ("num_inference_steps", True),
    ("max_sequence_length", 0),
    ("n", 0),
    ("n", MAX_OUTPUTS + 1),
    ("n", None),
    ("n", 1.0),
    ("seed", -1),
    ("seed", MAX_SEED + 1),
    ("seed", 0.5),
    ("guidance_scale", math.nan),
    ("guidance_scale", math.inf),
    ("guidance_scale", -0.1),
    ("guidance_scale", 10**400),
    ("guidance_scale", "7.5"),
    ("true_cfg_scale", False),
    ("flow_shift", 101),
]


@pytest.mark.parametrize(("name", "value"), BAD_VALUES)
def test_a_bad_value_is_refused_and_its_field_named(name: str, value: Any) -> None:
    fields: dict[str, Any] = {"prompt": "x", "width": 64, "height": 64} | {name: value}
    with pytest.raises(InvalidValue) as caught:
        GenerationRequest(**fields)
    assert caught.value.param == name
    assert name in caught.value.message


def test_one_side_alone_is_refused() -> None:
    with pytest.raises(InvalidValue, match="go together") as caught:
        GenerationRequest(prompt="x", width=64)
    assert caught.value.param == "height"


def test_the_last_output_of_a_request_has_a_valid_seed_too() -> None:
    assert GenerationRequest(prompt="x", seed=MAX_SEED).seed == MAX_SEED
    with pytest.raises(InvalidValue):
        GenerationRequest(prompt="x", seed=MAX_SEED, n=2)


def test_resolve_fills_in_the_models_defaults() -> None:
    resolved = GenerationRequest(prompt="x").resolve(INFO)
    assert (resolved.width, resolved.height) == (INFO.defaults.width, INFO.defaults.height)
    assert resolved.num_inference_steps == INFO.defaults.num_inference_steps
    assert resolved.guidance_scale == INFO.defaults.guidance_scale
    assert resolved.max_sequence_length == INFO.defaults.max_sequence_length
    assert resolved.seed is not None
    assert resolved.true_cfg_scale is None


def test_resolve_keeps_what_was_asked_for() -> None:
    request = GenerationRequest(
        prompt="x", width=32, height=48, num_inference_steps=7, guidance_scale=0, seed=0, max_sequence_length=9
    )
    assert request.resolve(INFO) == dataclasses.replace(request, guidance_scale=0.0)


@given(
    seed=st.none() | st.integers(0, MAX_SEED - MAX_OUTPUTS),
    steps=st.none() | st.integers(1, MAX_STEPS),
    guidance=st.none() | st.floats(0, 100),
    n=st.integers(1, MAX_OUTPUTS),
)
def test_resolving_twice_changes_nothing(seed: int | None, steps: int | None, guidance: float | None, n: int) -> None:
    request = GenerationRequest(prompt="x", seed=seed, num_inference_steps=steps, guidance_scale=guidance, n=n)
    resolved = request.resolve(INFO)
    assert resolved.resolve(INFO) == resolved


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("width", {"width": 65, "height": 64}),
        ("height", {"width": 64, "height": 4096}),
        ("true_cfg_scale", {"true_cfg_scale": 1.0}),
        ("flow_shift", {"flow_shift": 1.0}),
        ("max_sequence_length", {"max_sequence_length": 513}),
    ],
)
def test_resolve_refuses_what_the_model_cannot_do(name: str, fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidValue) as caught:
        GenerationRequest(prompt="x", **fields).resolve(INFO)
    assert caught.value.param == name


def job() -> Job:
    return Job("r", 1, GenerationRequest(prompt="x", seed=5, n=2).resolve(INFO), lengths=(32,), arrival=0.0)


def test_the_seed_of_an_output_is_the_requests_plus_its_index() -> None:
    assert job().seed == 6


def test_a_job_goes_through_its_states_in_order() -> None:
    one = job()
    for state in (JobState.ENCODING, JobState.RUNNING, JobState.DECODING, JobState.FINISHED):
        assert not one.ended
        one.to(state)
    assert one.ended


@pytest.mark.parametrize("state", [JobState.RUNNING, JobState.DECODING, JobState.FINISHED, JobState.WAITING])
def test_no_state_is_left_out(state: JobState) -> None:
    with pytest.raises(AssertionError):
        job().to(state)


@pytest.mark.parametrize("state", ENDINGS)
def test_an_ending_is_never_left(state: JobState) -> None:
    one = job()
    one.state = state
    for other in JobState:
        with pytest.raises(AssertionError):
            one.to(other)
    with pytest.raises(AssertionError):
        one.fail(GenerationFailed("late"))
    with pytest.raises(AssertionError):
        one.cancel()
    assert one.state is state
    assert one.error is None


def test_every_field_says_what_of_it_is_in_a_signature() -> None:
    unsaid = [f.name for f in dataclasses.fields(GenerationRequest) if "signature" not in f.metadata]
    assert unsaid == []


@pytest.mark.parametrize(
    ("one", "other", "shared"),
    [
        ({"prompt": "a", "seed": 1, "n": 2}, {"prompt": "b", "seed": 2}, True),
        ({"negative_prompt": "a"}, {"negative_prompt": "b"}, True),
        ({"negative_prompt": "a"}, {}, False),
        ({"images": (PICTURE,)}, {"images": (OTHER_PICTURE,)}, True),
        ({"images": (PICTURE,)}, {"images": (PICTURE, PICTURE)}, False),
        ({"images": (PICTURE,), "mask": MASK}, {"images": (PICTURE,)}, False),
        ({"images": (PICTURE,), "strength": 0.5}, {"images": (PICTURE,), "strength": 0.6}, False),
        *(
            ({name: value}, {name: value + 1}, False)
            for name, value in [
                ("num_inference_steps", 4),
                ("guidance_scale", 2.0),
                ("guidance_scale_2", 2.0),
                ("true_cfg_scale", 2.0),
                ("flow_shift", 2.0),
                ("max_sequence_length", 64),
                ("num_frames", 5),
                ("fps", 8),
            ]
        ),
        ({"width": 64, "height": 64}, {"width": 64, "height": 32}, False),
    ],
)
def test_a_signature_holds_what_a_call_has_once(one: dict[str, Any], other: dict[str, Any], shared: bool) -> None:
    requests = [GenerationRequest(**{"prompt": "x", **values}) for values in (one, other)]
    assert (requests[0].signature == requests[1].signature) is shared


def test_a_video_has_the_models_frames_or_those_asked_for() -> None:
    assert VIDEO_INFO.makes_videos
    assert not INFO.makes_videos
    resolved = GenerationRequest(prompt="x").resolve(VIDEO_INFO)
    assert (resolved.num_frames, resolved.fps, resolved.frames) == (17, 8, 17)
    assert (
        GenerationRequest(prompt="x", images=(PICTURE,), num_frames=1, width=16, height=16).resolve(VIDEO_INFO).frames
        == 1
    )
    assert GenerationRequest(prompt="x").resolve(INFO).frames == 1


@pytest.mark.parametrize(
    ("info", "values", "param", "message"),
    [
        (VIDEO_INFO, {"num_frames": 16}, "num_frames", "multiple of 4: 13 or 17, not 16"),
        (VIDEO_INFO, {"num_frames": 85}, "num_frames", "from 1 to 81"),
        (INFO, {"num_frames": 5}, "num_frames", "no effect on this model"),
        (INFO, {"fps": 5}, "fps", "no effect on this model"),
        (VIDEO_INFO, {"images": (PICTURE,), "strength": 0.5}, "strength", "no effect on this model"),
    ],
)
def test_frames_that_can_not_be_are_refused(info: ModelInfo, values: dict[str, Any], param: str, message: str) -> None:
    with pytest.raises(InvalidValue, match=message) as caught:
        GenerationRequest(prompt="x", **values).resolve(info)
    assert caught.value.param == param
