"""The contract of a native model, and what all of them do alike.

A family is one file (two, where the transformer fills one) that subclasses ``Model``, and a line for each of its
pipelines in ``models.native.NATIVE``. Nothing outside this folder knows it.
``docs/adding-a-model.md`` walks through one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from torch import nn

from stepbatch.config import EngineConfig
from stepbatch.errors import InvalidValue
from stepbatch.image import InputImage
from stepbatch.model_info import ModelInfo
from stepbatch.models.latents import LatentSpace, Posterior
from stepbatch.models.noise_schedule import NoiseSchedule, flow_match_sigmas
from stepbatch.request import GenerationRequest


@dataclass(frozen=True, eq=False)
class Prompt:
    """What the text encoders are given for one sequence."""

    ids: tuple[tuple[int, ...], ...]  # token ids, by encoder
    length: int  # rows that it adds to its sequence; none where the family cross-attends
    images: tuple[InputImage, ...] = ()  # that an encoder looks at

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for prompts whose embeddings are equal."""
        return self.ids, self.length, tuple(image.digest for image in self.images)


@dataclass(eq=False)
class Embedding:
    """A prompt with all done to it that no step changes."""

    rows: torch.Tensor  # [L, D]
    pooled: torch.Tensor | None = None  # [D], where the family's modulation depends on the prompt

    @property
    def nbytes(self) -> int:
        return self.rows.nbytes + (0 if self.pooled is None else self.pooled.nbytes)


@dataclass(frozen=True, eq=False)
class Reference:
    """A picture that rides in the sequence and is not denoised."""

    rows: torch.Tensor  # fp32 [M, C]
    width: int  # pixels
    height: int


@dataclass(eq=False)
class Blend:
    """What an inpainted picture is blended with after each step, outside of its mask; fp32 ``[N, C]`` each."""

    image: torch.Tensor
    noise: torch.Tensor
    mask: torch.Tensor  # 1 where the picture is painted anew


@dataclass(eq=False)
class Start:
    """Where a job begins."""

    latents: torch.Tensor  # fp32 [N, C], a row per token of the picture or video
    schedule: NoiseSchedule
    references: tuple[Reference, ...] = ()
    blend: Blend | None = None


@dataclass(frozen=True, eq=False)
class PackedSequence:
    """One row of a forward pass: a job's picture with one prompt."""

    job: int  # row of the times
    branch: int  # which of the job's prompts: 0 its own, 1 the negative one
    latents: slice  # rows of the packed latents
    request: GenerationRequest
    prompt: Embedding
    references: tuple[Reference, ...] = ()
    network: int = 0  # which of the model's transformers predicts; the same in all of a layout


class Model(ABC):
    """One loaded checkpoint. Its methods keep no state of any job."""

    FILLED_UP_TO: ClassVar = 1  # a multiple, for the tokens of a prompt and for those of a picture
    info: ModelInfo
    device: torch.device
    space: LatentSpace
    noise_scheduler: FlowMatchEulerDiscreteScheduler | UniPCMultistepScheduler
    transformer: nn.Module

    @abstractmethod
    def __init__(self, config: EngineConfig, folder: Path) -> None:
        """Load the checkpoint in ``folder``; raises ``SetupError``."""

    @abstractmethod
    def prompt(self, text: str, request: GenerationRequest) -> Prompt:
        """What the encoders get for one of the request's texts."""

    @abstractmethod
    def encode(self, prompts: Sequence[Prompt]) -> list[Embedding]:
        """Embed prompts, together; each as if it were alone."""

    @abstractmethod
    def layout(self, sequences: Sequence[PackedSequence]) -> Any:
        """Indices, rotary embeddings and segments of a batch; made anew only when its members change."""

    def denoise(self, layout: Any, latents: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        """Predict the velocity (noise minus data) of every sequence's picture or video in one forward pass.

        Args:
            layout: What ``layout`` returned.
            latents: fp32 ``[R, C]``, those of all jobs end to end.
            time: fp32 ``[J]``, of ``NoiseSchedule.times``, each job's.

        Returns:
            ``[R', C]``, the denoised rows of each sequence, in the order of the sequences.
        """
        velocity: torch.Tensor = self.transformer(latents, time, layout)
        return velocity

    def schedule(self, request: GenerationRequest) -> NoiseSchedule:
        """The noise schedule of a request before ``strength`` shortens it."""
        rows, columns = self.space.grid(*request.size)
        return NoiseSchedule.of(flow_match_sigmas(self.noise_scheduler, request, rows * columns))

    def check(self, request: GenerationRequest) -> None:
        """Raise ``InvalidValue`` for a resolved request that can't be served, an over-long prompt for one."""
        limit = request.max_sequence_length
        assert limit is not None
        for name, prompt in zip(("prompt", "negative_prompt"), self.prompts(request), strict=False):
            length = self.prompt_tokens(prompt)
            if length > limit:
                raise InvalidValue(f"{name} has {length} tokens and at most {limit} are allowed", name)
        self.schedule(request)

    def prompts(self, request: GenerationRequest) -> list[Prompt]:
        """The prompts of the request's sequences: its own, then, where it is guided, the negative one."""
        texts = [request.prompt, request.negative_prompt or ""] if request.guided(self.info) else [request.prompt]
        return [self.prompt(text, request) for text in texts]

    def prompt_tokens(self, prompt: Prompt) -> int:
        """How many tokens count against ``max_sequence_length``."""
        return len(prompt.ids[0])

    def length(self, request: GenerationRequest, prompt: Prompt) -> int:
        """How many tokens the sequence with this prompt has."""
        rows, columns = self.space.grid(*request.size)
        references = [self.space.grid(*size) for size in (self.image_sizes(request) if is_edit(request) else [])]
        own = self.space.latent_frames(request.frames) * rows * columns
        return prompt.length + own + sum(rows * columns for rows, columns in references)

    def image_sizes(self, request: GenerationRequest) -> list[tuple[int, int]]:
        """Width and height that each of the request's images is brought to for the VAE."""
        return [request.size] * len(request.images)

    def encode_image(self, image: InputImage, width: int, height: int) -> Posterior:
        """An image at this size through the VAE."""
        return self.space.encode(image, width, height)

    def start(self, request: GenerationRequest, seed: int, images: Sequence[Posterior]) -> Start:
        """A job's noise and noise schedule; and, of its images, where it starts or what it refers to."""
        generator = torch.Generator("cpu").manual_seed(seed)
        schedule = self.schedule(request).begin(request.first_step, self.device)
        if request.strength is None:
            noise = self.space.noise(*request.size, generator, request.frames).to(self.device)
            sizes = self.image_sizes(request)
            references = [Reference(self.space.rows(i.mean), *size) for i, size in zip(images, sizes, strict=True)]
            return Start(noise, schedule, tuple(references))
        image = self.space.rows(images[0].sample(generator))
        noise = self.space.noise(*request.size, generator).to(self.device)
        level = schedule.sigmas[0]
        latents = level * noise + (1 - level) * image
        blend = None if request.mask is None else Blend(image, noise, self.space.mask(request.mask, *request.size))
        return Start(latents, schedule, blend=blend)

    def guide(self, positive: torch.Tensor, negative: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """Classifier-free guidance: ``[R, C]``, ``[R, C]`` and each row's ``[R, 1]``, all fp32, to ``[R, C]``."""
        return negative + scale * (positive - negative)

    def scale(self, request: GenerationRequest, network: int = 0) -> float:
        """The strength that ``guide`` gets for this request where this transformer predicts."""
        value: float = getattr(request, self.info.guidance.field)
        return value

    def decode(self, latents: torch.Tensor, request: GenerationRequest) -> torch.Tensor:
        """One job's ``[N, C]`` latents to a picture in fp32 ``[H, W, 3]``, 0 to 1; not finite where they aren't.

        Of a video there are ``[F, H, W, 3]``.
        """
        frames = self.space.decode(latents, *request.size, request.frames)
        return frames if self.info.makes_videos else frames[0]


def is_edit(request: GenerationRequest) -> bool:
    """Whether the request's images are what its prompt speaks of, and neither start nor background of its output."""
    return bool(request.images) and request.strength is None
