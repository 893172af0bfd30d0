"""Holding our latents against diffusers' own pipelines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tests.models.parity_table import note
from tests.recording import make_engine, run

from stepbatch import EngineConfig, GenerationRequest
from stepbatch.config import BatchingConfig, ModelConfig
from stepbatch.engine.runner import TorchRunner
from stepbatch.image import InputImage
from stepbatch.models import load_model

TOLERANCE = 1e-4  # of any latent, fp32
BFLOAT16 = 0.1  # root mean square of a picture's latents, relative


@dataclass(frozen=True, eq=False)
class Case:
    """One request, and how diffusers draws it."""

    variant: str  # its row in the table
    request: GenerationRequest
    theirs: Callable[[], torch.Tensor]  # the final latents as rows, [N, C]


def picture(width: int, height: int, seed: int = 0) -> InputImage:
    """A picture of soft random colours."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    image = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
    return InputImage(width, height, image.tobytes())


def disc(width: int, height: int) -> InputImage:
    """A mask: the middle is painted anew."""
    y, x = np.mgrid[0:height, 0:width]
    inside = ((x / width - 0.5) ** 2 + (y / height - 0.5) ** 2) < 0.08
    return InputImage(width, height, (inside * 255).astype(np.uint8).tobytes())


def pil(image: InputImage) -> Image.Image:
    """What diffusers takes."""
    return Image.frombytes("RGB" if image.channels == 3 else "L", (image.width, image.height), image.pixels)


def generator(request: GenerationRequest) -> torch.Generator:
    """The noise of the request's first output."""
    assert request.seed is not None
    return torch.Generator("cpu").manual_seed(request.seed)


class Parity:
    """The cases of one checkpoint. What diffusers draws is computed once.

    Args:
        runner: Ours, loaded from the checkpoint.
        cases: At least one each of the variants.
    """

    def __init__(self, runner: TorchRunner, cases: Sequence[Case]) -> None:
        self.runner = runner
        self.cases = list(cases)
        self.expected = [case.theirs() for case in cases]

    def alone(self) -> None:
        """Each by itself."""
        for case, expected in zip(self.cases, self.expected, strict=True):
            ours = run(make_engine(self.runner), [case.request])[0][0]
            self._hold("alone", case, ours, expected)

    def in_company(self, width: int = 16, reverse: bool = False) -> None:
        """All together; a narrow ``width`` makes them join and leave in mid-flight."""
        engine = make_engine(self.runner, EngineConfig(batching=BatchingConfig(dynamic_batch_max_size=width)))
        pairs = list(zip(self.cases, self.expected, strict=True))
        pairs = pairs[::-1] if reverse else pairs
        for (case, expected), ours in zip(pairs, run(engine, [case.request for case, _ in pairs]), strict=True):
            self._hold("in company", case, ours[0], expected)

    def in_bfloat16(self, path: Path) -> None:
        """How far company moves a picture where kernels vary with shape: told, and bounded loosely."""
        model = load_model(EngineConfig(model=ModelConfig(model_path=str(path), dtype="bfloat16")))
        engine = make_engine(TorchRunner(model))
        together = run(engine, [case.request for case in self.cases])
        for case, (ours, *_) in zip(self.cases, together, strict=True):
            alone = run(engine, [case.request])[0][0]
            difference = ((ours - alone).pow(2).mean() / alone.pow(2).mean()).sqrt().item()
            assert difference < BFLOAT16, f"{case.variant} in bfloat16: {difference}"
            note("bfloat16: company", case.variant, difference)

    def _hold(self, column: str, case: Case, ours: torch.Tensor, expected: torch.Tensor) -> None:
        assert ours.shape == expected.shape
        difference = (ours - expected).abs().max().item()
        assert difference < TOLERANCE, f"{case.variant} {column}: {difference}"
        note(column, case.variant, difference)


def fields(request: GenerationRequest, *names: str) -> dict[str, Any]:
    """Some of a request's fields, those that say something, by name, as keyword arguments."""
    return {name: getattr(request, name) for name in names if getattr(request, name) is not None}
