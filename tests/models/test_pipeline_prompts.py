"""What is not the tokenizer's to say: how much of a prompt is kept, and what is put before it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from tests.models.pipelines import ask, deep_floyd, difference, draw, latte, load, lumina2, saved

from stepbatch.errors import InvalidValue
from stepbatch.models.pipeline import Pipeline

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of noise schedules


@pytest.mark.parametrize(("make", "limit"), [(deep_floyd, 77), (latte, 120), (lumina2, 256)])
def test_the_last_word_that_is_accepted_is_read(
    tmp_path: Path, make: Callable[[], DiffusionPipeline], limit: int
) -> None:
    pipeline = load(saved(make(), tmp_path))
    small: dict[str, Any] = {"width": 32, "height": 32, "num_inference_steps": 2}
    if pipeline.info.makes_videos:
        small["num_frames"] = 1

    def drawn(prompt: str) -> torch.Tensor:
        return draw(pipeline, ask(pipeline, prompt=prompt, **small))[0]

    words = next(count for count in range(1, limit) if not _accepted(pipeline, " a" * (count + 1), small))
    with pytest.raises(InvalidValue, match=f"^prompt has {limit + 1} tokens and at most {limit} are") as caught:
        pipeline.check(ask(pipeline, prompt=" a" * (words + 1), **small))
    assert caught.value.param == "prompt"
    start = " a" * (words - 1)
    assert difference([drawn(start + " a")], [drawn(start + " b")]) > 0
    assert difference([drawn(start + " a a a")], [drawn(start + " a a b")]) == 0  # else the limit is too low


def _accepted(pipeline: Pipeline, prompt: str, small: dict[str, Any]) -> bool:
    try:
        pipeline.check(ask(pipeline, prompt=prompt, **small))
    except InvalidValue:
        return False
    return True
