"""The checkpoints are fit to prove something: what they draw depends on all that it should."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from diffusers.utils import logging
from tests.pipelines.asked import FIELDS, NEGATIVES, PROMPTS, kind_of, picture, requests, theirs
from tests.pipelines.bursts import load
from tests.pipelines.checkpoints import KINDS, clip_tokenizer, gemma_tokenizer, t5_tokenizer
from tests.pipelines.conftest import Checkpoints

# diffusers' own: some of its noise schedules hand torch's tensors to numpy
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

VISIBLE = 0.05  # far above the tolerance


@pytest.mark.parametrize("asked", FIELDS)
def test_a_picture_depends_on_all_that_it_should(asked: str, checkpoint: Checkpoints) -> None:
    logging.disable_progress_bar()
    pipeline = load(checkpoint(kind_of(asked)))
    request = requests(asked)[1]
    changes: dict[str, Any] = {"prompt": PROMPTS[3], "negative_prompt": NEGATIVES[3], "seed": 99, "guidance_scale": 1.5}
    if request.images:
        changes["images"] = (picture(request.images[0].width, request.images[0].height, seed=99),)
    drawn = theirs(asked, pipeline, request)
    changed = {name: theirs(asked, pipeline, replace(request, **{name: value})) for name, value in changes.items()}
    apart = {name: float(np.abs(other - drawn).max()) for name, other in changed.items()}
    assert min(apart.values()) > VISIBLE, apart
    values = np.stack([drawn, *changed.values()])
    assert 0.1 < values.std() < 0.35
    assert ((values > 0) & (values < 1)).mean() > 0.8  # few are cut off


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_is_small(kind: str, checkpoint: Checkpoints) -> None:
    assert sum(file.stat().st_size for file in checkpoint(kind).rglob("*")) < 3e6


def test_prompts_are_of_very_different_lengths() -> None:
    for tokenizer, most in ((clip_tokenizer(), 77), (t5_tokenizer(), 512), (gemma_tokenizer(), 8192)):
        lengths = [len(tokenizer(text).input_ids) for text in PROMPTS]
        assert max(lengths) > 5 * min(lengths)
        assert max(lengths) <= min(most, 64)
        assert tokenizer.model_max_length == most
        assert tokenizer.decode(tokenizer(PROMPTS[1]).input_ids, skip_special_tokens=True).strip() == PROMPTS[1]


def test_at_least_ten_pipelines_of_different_kinds(checkpoint: Checkpoints) -> None:
    indices = [json.loads((checkpoint(kind) / "model_index.json").read_text()) for kind in KINDS]
    assert len({index["_class_name"] for index in indices}) == len(KINDS) >= 10
