"""The checkpoints are fit to prove something: what they draw depends on all that it should."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging
from tests.pipelines.asked import FIELDS, NEGATIVES, PROMPTS, kind_of, least_difference, picture, requests, theirs
from tests.pipelines.checkpoints import KINDS, clip_tokenizer, gemma_tokenizer, t5_tokenizer
from tests.pipelines.conftest import Checkpoints

# diffusers' own: some of its noise schedules hand torch's tensors to numpy
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

VISIBLE = 0.05  # far above the tolerance


@pytest.fixture(scope="module", params=list(KINDS))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def pipeline(kind: str, checkpoint: Checkpoints) -> Any:
    logging.disable_progress_bar()
    loaded = DiffusionPipeline.from_pretrained(checkpoint(kind), dtype=torch.float32, use_safetensors=True)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def test_a_picture_depends_on_all_that_it_should(kind: str, pipeline: Any) -> None:
    for asked in (name for name in FIELDS if kind_of(name) == kind):
        request = requests(asked)[1]
        changes: dict[str, Any] = {
            "prompt": PROMPTS[3],
            "negative_prompt": NEGATIVES[3],
            "seed": 99,
            "guidance_scale": 1.5,
        }
        if request.images:
            size = request.images[0].width, request.images[0].height
            changes["images"] = (picture(*size, seed=99),)
        drawn = theirs(asked, pipeline, request)
        for name, value in changes.items():
            changed = theirs(asked, pipeline, replace(request, **{name: value}))
            assert np.abs(changed - drawn).max() > VISIBLE, (asked, name)


def test_few_values_are_cut_off(kind: str, pipeline: Any) -> None:
    for asked in (name for name in FIELDS if kind_of(name) == kind):
        pictures = [theirs(asked, pipeline, request) for request in requests(asked)]
        values = np.stack(pictures)
        assert 0.1 < values.std() < 0.35
        assert ((values > 0) & (values < 1)).mean() > 0.8
        assert least_difference(pictures) > VISIBLE


def test_a_checkpoint_is_small(kind: str, checkpoint: Checkpoints) -> None:
    assert sum(file.stat().st_size for file in checkpoint(kind).rglob("*")) < 3e6


def test_prompts_are_of_very_different_lengths() -> None:
    for tokenizer, most in ((clip_tokenizer(), 77), (t5_tokenizer(), 512), (gemma_tokenizer(), 8192)):
        lengths = [len(tokenizer(text).input_ids) for text in PROMPTS]
        assert max(lengths) > 5 * min(lengths)
        assert max(lengths) <= min(most, 64)
        assert tokenizer.model_max_length == most
        assert tokenizer.decode(tokenizer(PROMPTS[1]).input_ids, skip_special_tokens=True).strip() == PROMPTS[1]


def test_at_least_ten_pipelines_of_different_kinds() -> None:
    classes = {type(make()) for make in KINDS.values()}
    assert len(classes) == len(KINDS) >= 10
