"""What calls are refused, what they may give, and whose fault an error is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, LTXI2VLongMultiPromptPipeline
from diffusers.pipelines.deepfloyd_if.safety_checker import IFSafetyChecker
from tests.models.pipelines import (
    SHORT,
    ask,
    checkpoint,
    deep_floyd,
    difference,
    draw,
    images,
    kandinsky_decoder,
    latte,
    load,
    marigold,
    saved,
)
from transformers import CLIPConfig, CLIPImageProcessorPil

from stepbatch.errors import CheckpointError, ContentRejected, InvalidModelOutput, InvalidValue
from stepbatch.models.pipeline_calls import Call, _refusal

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of noise schedules
SMALL = {"width": 32, "height": 32, "num_inference_steps": 2}


def test_a_pipeline_that_sees_its_company_is_called_for_one_request(tmp_path: Path) -> None:
    pipeline = load(saved(latte(), tmp_path))
    requests = [ask(pipeline, prompt=prompt, num_frames=1, **SMALL) for prompt in ("a cat", "b cat")]
    assert [pipeline.shares(request) for request in requests] == [False, False]
    alone = [draw(pipeline, request)[0] for request in requests]
    assert difference(draw(pipeline, *requests), alone) > 0.1  # else it need not be in the table


def test_values_are_those_of_pictures_whatever_a_pipeline_gives_raw(tmp_path: Path) -> None:
    """DeepFloyd's tensors are from -1 to 1."""
    path = saved(deep_floyd(), tmp_path)
    pipeline = load(path)
    [ours] = draw(pipeline, ask(pipeline, **SMALL))
    made: Any = DiffusionPipeline.from_pretrained(path, safety_checker=None)
    made.set_progress_bar_config(disable=True)
    generator = torch.Generator("cpu").manual_seed(0)
    theirs = made(prompt=SHORT, **SMALL, generator=generator, output_type="np").images
    assert difference([ours], [torch.from_numpy(theirs)]) < 1e-4
    assert ours.min() >= 0


@pytest.mark.parametrize("head", ["p_head", "w_head"])
def test_either_of_two_heads_of_a_safety_checker_rejects(tmp_path: Path, head: str) -> None:
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 32, "patch_size": 16, "projection_dim": 8}  # fmt: skip
    checker = IFSafetyChecker(CLIPConfig(vision_config=vision, projection_dim=8))
    heads = {name: torch.nn.Linear(8, 1) for name in ("p_head", "w_head")}
    for name, part in heads.items():
        setattr(checker, name, part)
        part.weight.data.zero_()
        part.bias.data.fill_(5.0 if name == head else -5.0)
    size = {"shortest_edge": 32}
    extractor = CLIPImageProcessorPil(size=size, crop_size={"height": 32, "width": 32})
    pipeline = load(saved(deep_floyd(), tmp_path))
    pipeline._calls["text"].pipeline.register_modules(safety_checker=checker, feature_extractor=extractor)
    outcomes = pipeline.draw([ask(pipeline, **SMALL)] * 2, [0, 1], lambda *_: None)
    assert [type(outcome) for outcome in outcomes] == [ContentRejected] * 2
    heads[head].bias.data.fill_(-5.0)
    assert draw(pipeline, ask(pipeline, **SMALL))


def test_values_that_no_picture_has_are_told(tmp_path: Path) -> None:
    pipeline = load(checkpoint("stable-diffusion-3", tmp_path))
    pipeline._calls["text"].pipeline.image_processor.register_to_config(do_normalize=False)  # neither the other way
    [outcome] = pipeline.draw([ask(pipeline)], [0], lambda *_: None)
    assert isinstance(outcome, InvalidModelOutput)
    assert "where pictures have 0 to 1" in outcome.message


@pytest.mark.parametrize(("make", "expected"), [
    (kandinsky_decoder, "KandinskyV22Pipeline can't be served: it wants image_embeds"),
    (marigold, "MarigoldDepthPipeline can't be served: it has nothing to bring images to the output's size"),
])  # fmt: skip
def test_what_requests_can_not_ask_is_refused_at_start(
    tmp_path: Path, make: Callable[[], DiffusionPipeline], expected: str
) -> None:
    with pytest.raises(CheckpointError, match=expected):
        load(saved(make(), tmp_path))


def test_calls_that_make_no_pictures_by_default_are_refused() -> None:
    with pytest.raises(ValueError, match="LTXI2VLongMultiPromptPipeline can't be served: it makes something else"):
        Call(LTXI2VLongMultiPromptPipeline(None, None, None, None, None))


@pytest.mark.parametrize(("given", "answer"), [
    ({"timesteps": [5], "sigmas": [1.0]}, None),  # from no check of inputs, and names no field
    ({"width": 64, "height": 33}, "height"),
    ({"ip_adapter_image": 1, "ip_adapter_image_embeds": []}, ""),
])  # fmt: skip
def test_whose_fault_a_value_error_is(tmp_path: Path, given: dict[str, Any], answer: str | None) -> None:
    made: Any = DiffusionPipeline.from_pretrained(checkpoint("stable-diffusion", tmp_path))
    with pytest.raises(ValueError, match=r"\w") as caught:
        made(**{"prompt": SHORT} | given)
    refusal = _refusal(caught.value)
    assert (refusal is None) is (answer is None)
    if refusal is not None:
        assert isinstance(refusal, InvalidValue)
        assert (refusal.param or "") == answer


def test_an_output_that_is_not_finite_stays_so_on_its_way(tmp_path: Path) -> None:
    pipeline = load(checkpoint("ltx-image-to-video", tmp_path))
    [call] = {pipeline._calls["images"]}
    call.pipeline.transformer.proj_out.bias.data.fill_(np.nan)
    request = ask(pipeline, width=96, images=images())
    [outcome] = pipeline.draw([request], [0], lambda *_: None)
    assert isinstance(outcome, InvalidModelOutput)
    assert "not finite" in outcome.message
