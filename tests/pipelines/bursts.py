"""How far apart are pictures and videos that came over HTTP, from each other and from what diffusers makes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from tests.pipelines.asked import theirs
from tests.pipelines.server import read_mp4

from stepbatch import GenerationRequest
from stepbatch.engine.messages import Output
from stepbatch.request import Times
from stepbatch.video_files import write_mp4

ROUNDED = 1.0  # of 255: a picture's greatest difference, and a video's mean one, for it has been through H.264
DIFFERENT = 10.0  # of 255, on average: two that are not meant to be the same


def load(folder: Path) -> Any:
    """Diffusers' own pipeline."""
    pipeline: Any = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def reference(asked: str, pipeline: Any, request: GenerationRequest, folder: Path) -> np.ndarray:
    """What diffusers makes of a request alone, 8 bits each, as it comes out of a file."""
    pixels = (theirs(asked, pipeline, request) * 255).round().astype(np.uint8)
    if request.num_frames is None:
        return pixels
    assert request.fps is not None
    frames, height, width, _ = pixels.shape
    write_mp4(folder / "reference.mp4", Output("", 0, 0, width, height, frames, pixels.tobytes(), Times()), request.fps)
    return read_mp4((folder / "reference.mp4").read_bytes())


def apart(one: np.ndarray, other: np.ndarray) -> float:
    """How far two pictures are apart where they differ most, or two videos on average."""
    difference = _difference(one, other)
    return float(difference.mean() if len(one) > 1 else difference.max())


def least_apart(drawn: Sequence[np.ndarray]) -> float:
    """How far apart, on average, are the two that are most alike."""
    return min(float(_difference(a, b).mean()) for a, b in itertools.combinations(drawn, 2))


def _difference(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    assert one.shape == other.shape
    return np.abs(one.astype(np.int16) - other.astype(np.int16))
