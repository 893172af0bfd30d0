"""Pipelines of small random checkpoints for the tests here, and what they draw as floats."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tests.models.parity import picture
from tests.pipelines.checkpoints import write

from stepbatch.config import EngineConfig, ModelConfig
from stepbatch.errors import RequestError
from stepbatch.image import InputImage
from stepbatch.models.pipeline import Pipeline
from stepbatch.request import GenerationRequest

SHORT, LONG = (
    "a cat",
    "a very long prompt about a dog that runs in the park, in the evening, with a red ball and a friend",
)


def checkpoint(kind: str, folder: Path) -> Path:
    """One of ``tests.pipelines``, made once in a folder for all tests."""
    path = folder / kind
    return path if path.exists() else write(kind, path)


def load(path: Path, **model: Any) -> Pipeline:
    return Pipeline(EngineConfig(model=ModelConfig(model_path=str(path), backend="diffusers", **model)), path)


def ask(pipeline: Pipeline, **fields: Any) -> GenerationRequest:
    """A small resolved request."""
    usual: dict[str, Any] = {"prompt": SHORT, "width": 64, "height": 64, "num_inference_steps": 3, "seed": 0}
    if pipeline.info.makes_videos:
        usual["num_frames"] = pipeline.info.frames_multiple + 1
    return GenerationRequest(**usual | fields).resolve(pipeline.info)


def draw(
    pipeline: Pipeline, *requests: GenerationRequest, tick: Callable[[int, int], None] = lambda step, steps: None
) -> list[torch.Tensor]:
    """What a call for these draws, fp32 ``[F, H, W, 3]`` each."""
    drawn = []
    with torch.inference_mode():
        for outcome in pipeline.draw(requests, [request.seed or 0 for request in requests], tick):
            assert not isinstance(outcome, RequestError), outcome
            drawn.append(outcome)
    return drawn


def difference(ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]) -> float:
    """The largest of any value."""
    return max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))


def images(width: int = 48, height: int = 80, seed: int = 0) -> tuple[InputImage]:
    return (picture(width, height, seed),)
