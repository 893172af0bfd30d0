"""What is drawn is the same alone, in company, and in diffusers' own pipeline asked for one at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from tests.pipelines.asked import FIELDS, TOLERANCE, kind_of, least_difference, requests, theirs
from tests.pipelines.conftest import Checkpoints

from stepbatch import EngineConfig, GenerationRequest, ModelConfig
from stepbatch.models.pipeline import Pipeline

# diffusers' own: some of its noise schedules hand torch's tensors to numpy
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def draw(ours: Pipeline, resolved: list[GenerationRequest]) -> list[np.ndarray]:
    """In one call."""
    seeds = [request.seed for request in resolved]
    assert None not in seeds
    with torch.inference_mode():
        outcomes = ours.draw(resolved, [seed for seed in seeds if seed is not None], lambda step, steps: None)
    assert all(isinstance(outcome, torch.Tensor) for outcome in outcomes), outcomes
    return [outcome.numpy() for outcome in outcomes if isinstance(outcome, torch.Tensor)]


@pytest.mark.parametrize("asked", FIELDS)
def test_the_same_alone_in_company_and_in_diffusers(asked: str, checkpoint: Checkpoints) -> None:
    folder = checkpoint(kind_of(asked))
    ours = Pipeline(EngineConfig(model=ModelConfig(model_path=str(folder), backend="diffusers")), folder)
    pipeline: Any = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
    pipeline.set_progress_bar_config(disable=True)
    wanted = requests(asked, 3)
    expected = [theirs(asked, pipeline, request) for request in wanted]
    assert least_difference(expected) > 1000 * TOLERANCE
    resolved = [request.resolve(ours.info) for request in wanted]
    for request in resolved:
        ours.check(request)
        assert ours.shares(request)
    assert len({ours.signature(request) for request in resolved}) == 1
    for in_company, request, one in zip(draw(ours, resolved), resolved, expected, strict=True):
        [alone] = draw(ours, [request])
        assert in_company.shape == alone.shape == one.shape == (request.frames, request.size[1], request.size[0], 3)
        np.testing.assert_allclose(alone, one, rtol=0, atol=TOLERANCE)
        np.testing.assert_allclose(in_company, one, rtol=0, atol=TOLERANCE)
    again = draw(ours, resolved[::-1])[::-1]  # a noise schedule keeps nothing from call to call
    np.testing.assert_allclose(np.stack(again), np.stack(expected), rtol=0, atol=TOLERANCE)
