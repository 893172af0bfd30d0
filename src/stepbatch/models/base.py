"""The contract of a native model: check, encode, start, denoise (with its layout), decode.

A family is one file that subclasses ``Model`` and one line in ``models.NATIVE``. Nothing outside this folder knows it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from stepbatch.config import EngineConfig
from stepbatch.model_info import ModelInfo
from stepbatch.request import GenerationRequest


@dataclass(eq=False)
class Start:
    """Where a job begins."""

    latents: torch.Tensor  # fp32 [N, C], a row per token of the picture
    sigmas: torch.Tensor  # fp32 [steps + 1]


@dataclass(frozen=True, eq=False)
class PackedSequence:
    """One row of a forward pass: a job's picture with one prompt."""

    job: int  # row of sigma, and of the modulation table
    branch: int  # which of the job's prompts: 0 its own, 1 the negative one
    latents: slice  # rows of the packed latents
    width: int  # of the picture, pixels
    height: int
    prompt: Any  # what ``encode`` returned for this sequence's prompt


class Model(ABC):
    """One loaded checkpoint. Its methods keep no state of any job."""

    info: ModelInfo
    device: torch.device

    @abstractmethod
    def __init__(self, config: EngineConfig, folder: Path) -> None:
        """Load the checkpoint in ``folder``; raises ``SetupError``."""

    @abstractmethod
    def check(self, request: GenerationRequest) -> None:
        """Raise ``InvalidValue`` for a resolved request that can't be served, an over-long prompt for one."""

    @abstractmethod
    def prompts(self, request: GenerationRequest) -> list[str]:
        """The prompts of the request's sequences: its own, then, where it is guided, the negative one."""

    @abstractmethod
    def length(self, request: GenerationRequest, prompt: str) -> int:
        """How many tokens the sequence with this prompt has."""

    @abstractmethod
    def encode(self, prompt: str) -> Any:
        """A prompt's embedding, with all that no step changes done to it. It is cached by its text."""

    @abstractmethod
    def start(self, request: GenerationRequest, seed: int) -> Start:
        """A job's noise and noise schedule."""

    @abstractmethod
    def layout(self, sequences: Sequence[PackedSequence]) -> Any:
        """Indices, rotary embeddings and segments of a batch; made anew only when its members change."""

    @abstractmethod
    def denoise(self, layout: Any, latents: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """Predict the velocity (noise minus data) of every sequence's picture in one forward pass.

        Args:
            layout: What ``layout`` returned.
            latents: fp32 ``[R, C]``, the pictures of all jobs end to end.
            sigma: fp32 ``[J]``, each job's.

        Returns:
            ``[R', C]``, the rows of each sequence's picture, in the order of the sequences.
        """

    def guide(self, positive: torch.Tensor, negative: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """Classifier-free guidance: ``[R, C]``, ``[R, C]`` and each row's ``[R, 1]``, all fp32, to ``[R, C]``."""
        return negative + scale * (positive - negative)

    @abstractmethod
    def decode(self, latents: torch.Tensor, width: int, height: int) -> torch.Tensor:
        """One job's ``[N, C]`` latents to a picture in fp32 ``[H, W, 3]``, 0 to 1; not finite where they aren't."""

    def scale(self, request: GenerationRequest) -> float:
        """The strength that ``guide`` gets for this request."""
        assert request.guidance_scale is not None
        return request.guidance_scale
