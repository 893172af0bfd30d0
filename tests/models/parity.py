"""Holding our latents against diffusers' own pipelines."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
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
from stepbatch.models.native import load_model

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

    Each way of drawing them returns the largest difference of them all, and notes all of them for the table.

    Args:
        runner: Ours, loaded from the checkpoint.
        cases: At least one each of the variants.
    """

    def __init__(self, runner: TorchRunner, cases: Sequence[Case]) -> None:
        self.runner = runner
        self.cases = list(cases)
        self.expected = [case.theirs() for case in cases]

    def alone(self) -> float:
        """Each by itself."""
        ours = [run(make_engine(self.runner), [case.request])[0][0] for case in self.cases]
        return _worst("alone", self.cases, map(_greatest, ours, self.expected))

    def in_company(self, width: int = 16, reverse: bool = False) -> float:
        """All together; a narrow ``width`` makes them join and leave in mid-flight."""
        engine = make_engine(self.runner, EngineConfig(batching=BatchingConfig(dynamic_batch_max_size=width)))
        order = slice(None, None, -1 if reverse else 1)
        cases, expected = self.cases[order], self.expected[order]
        ours = [outputs[0] for outputs in run(engine, [case.request for case in cases])]
        return _worst("in company", cases, map(_greatest, ours, expected))

    def in_bfloat16(self, path: Path) -> float:
        """How far company moves a picture where kernels vary with shape."""
        model = load_model(EngineConfig(model=ModelConfig(model_path=str(path), dtype="bfloat16")))
        engine = make_engine(TorchRunner(model))
        together = [outputs[0] for outputs in run(engine, [case.request for case in self.cases])]
        alone = [run(engine, [case.request])[0][0] for case in self.cases]
        return _worst("bfloat16: company", self.cases, map(_relative, together, alone))


def _worst(column: str, cases: Sequence[Case], differences: Iterable[torch.Tensor]) -> float:
    """The largest difference, NaN if one is; each is noted for the table."""
    found = list(differences)
    for case, difference in zip(cases, found, strict=True):
        note(column, case.variant, difference.item())
    return torch.stack(found).max().item()


def _greatest(ours: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    assert ours.shape == expected.shape
    return (ours - expected).abs().max()


def _relative(ours: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """The root mean square of the difference, over that of what is expected."""
    return ((ours - expected).pow(2).mean() / expected.pow(2).mean()).sqrt()


def fields(request: GenerationRequest, *names: str) -> dict[str, Any]:
    """Some of a request's fields, those that say something, by name, as keyword arguments."""
    return {name: getattr(request, name) for name in names if getattr(request, name) is not None}
