"""What each test of a served checkpoint does: a burst over HTTP that shares one call, held against each alone."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from tests.pipelines.asked import FIELDS, kind_of, requests, theirs
from tests.pipelines.server import WIDTH, Serving, read_mp4

from stepbatch import GenerationRequest
from stepbatch.engine.messages import Output
from stepbatch.request import Times
from stepbatch.video_files import write_mp4

ROUNDED = 1  # how much an 8-bit value may differ
LOSSY = 1.0  # and, on average, one that has been through H.264
DIFFERENT = 10 * LOSSY  # on average: two pictures that are not meant to be the same


def load(folder: Path) -> Any:
    """Diffusers' own pipeline."""
    pipeline: Any = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def hold(kind: str, server: Serving, folder: Path) -> None:
    """All that a checkpoint is asked for: together, one at a time, and from diffusers."""
    pipeline = load(folder)
    for asked in (name for name in FIELDS if kind_of(name) == kind):
        wanted = requests(asked, WIDTH)
        calls, jobs = server.calls()
        together = server.ask_all(wanted)
        assert server.calls() == (calls + 1, jobs + WIDTH)
        alone = [server.ask(request) for request in wanted]
        assert server.calls() == (calls + 1 + WIDTH, jobs + 2 * WIDTH)
        references = [reference(asked, pipeline, request, folder) for request in wanted]
        for ours, one, expected, request in zip(together, alone, references, wanted, strict=True):
            same(ours, one, request)
            same(ours, expected, request)
        assert all(off_by(a, b).mean() > DIFFERENT for a, b in itertools.combinations(together, 2))


def reference(asked: str, pipeline: Any, request: GenerationRequest, folder: Path) -> np.ndarray:
    """What diffusers makes of a request alone, 8 bits each, as it comes out of a file."""
    pixels = (theirs(asked, pipeline, request) * 255).round().astype(np.uint8)
    if request.num_frames is None:
        return pixels
    assert request.fps is not None
    frames, height, width, _ = pixels.shape
    write_mp4(folder / "reference.mp4", Output("", 0, 0, width, height, frames, pixels.tobytes(), Times()), request.fps)
    return read_mp4((folder / "reference.mp4").read_bytes())


def same(one: np.ndarray, other: np.ndarray, request: GenerationRequest) -> None:
    """Whether two pictures or videos are the same, to rounding."""
    difference = off_by(one, other)
    if request.num_frames is None:
        assert difference.max() <= ROUNDED
    else:
        assert difference.mean() < LOSSY


def off_by(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The difference of each value."""
    assert one.shape == other.shape
    return np.abs(one.astype(np.int16) - other.astype(np.int16))
