"""FLUX.1 (dev, schnell) and FLUX.1 Kontext: the text encoders, and what requests and their pictures become.

T5 embeds the prompt, padded to ``max_sequence_length`` and not masked, as the model was trained. CLIP's vector of the
first 77 tokens goes into the modulation. Kontext's reference rides in the sequence, behind the picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import torch
from diffusers import FluxPipeline

from stepbatch.config import EngineConfig
from stepbatch.errors import CheckpointError
from stepbatch.model_info import AutoSize, Guidance, ModelInfo, Task
from stepbatch.models.base import Embedding, Model, PackedSequence, Prompt
from stepbatch.models.defaults import settings
from stepbatch.models.flux_transformer import Layout, Transformer
from stepbatch.models.latents import PATCH, LatentSpace
from stepbatch.models.loading import load_parts, model_info
from stepbatch.models.noise_schedule import check_flow_match
from stepbatch.models.two_streams import Order
from stepbatch.request import GenerationRequest
from stepbatch.sizes import nearest_shape

LONGEST_PROMPT = 512  # tokens of T5
LONGEST_SIDE = 8192  # pixels; the architecture has no limit of its own
ROTARY_CACHE = 64  # entries
PREFERRED_AREA = 1024 * 1024  # pixels, about, of each of the shapes
PREFERRED_SHAPES = (  # width and height that Kontext was trained on
    *((672, 1568), (688, 1504), (720, 1456), (752, 1392), (800, 1328), (832, 1248), (880, 1184), (944, 1104)),
    (1024, 1024),
    *((1104, 944), (1184, 880), (1248, 832), (1328, 800), (1392, 752), (1456, 720), (1504, 688), (1568, 672)),
)


class Flux(Model):
    """A loaded FLUX.1 checkpoint."""

    DEFAULTS: ClassVar = {"width": 1024, "height": 1024, "strength": 0.6, "true_cfg_scale": 1.0}
    DEV: ClassVar = {"num_inference_steps": 28, "guidance_scale": 3.5}
    SCHNELL: ClassVar = {"num_inference_steps": 4}
    NAMED: ClassVar[dict[str, dict[str, Any]]] = {
        "flux.1-schnell": {"max_sequence_length": 256},
        "flux.1-kontext-dev": {"guidance_scale": 2.5},
    }
    TASKS: ClassVar[tuple[Task, ...]] = ("text-to-image", "image-to-image", "inpainting")
    transformer: Transformer

    def __init__(self, config: EngineConfig, folder: Path) -> None:
        parts = load_parts(FluxPipeline, Transformer, folder, config)
        rest = parts.pipeline
        self.device, self.transformer = parts.device, parts.transformer
        self.noise_scheduler = check_flow_match(rest.scheduler)
        self.clip_tokenizer, self.clip = rest.tokenizer, rest.text_encoder
        self.t5_tokenizer, self.t5 = rest.tokenizer_2, rest.text_encoder_2
        self.space = LatentSpace(rest.vae, rest.vae_scale_factor, channels_first=True, device=self.device)
        if self.transformer.channels != PATCH * PATCH * self.space.channels:
            raise CheckpointError(f"{folder / 'transformer'} takes more than its VAE's latents: it has no native form")
        self.rotary = lru_cache(ROTARY_CACHE)(self._rotary)
        distilled = self.transformer.is_guided
        dynamic = self.noise_scheduler.config["use_dynamic_shifting"]
        known = (
            self.DEFAULTS
            | (self.DEV if distilled else self.SCHNELL)
            | self.NAMED.get(parts.name.lower(), {})
            | parts.settings
        )
        self.settings = settings(known, folder, LONGEST_SIDE, LONGEST_PROMPT)
        self.info: ModelInfo = model_info(
            config,
            parts,
            self.settings,
            longest_side=LONGEST_SIDE,
            longest_prompt=LONGEST_PROMPT,
            size_multiple=self.space.token,
            uses=("negative_prompt", "true_cfg_scale", "max_sequence_length")
            + (("guidance_scale",) if distilled else ())
            + (() if dynamic else ("flow_shift",)),
            tasks=self.TASKS,
            guidance=Guidance(field="true_cfg_scale", off=1.0, needs_negative=True),
        )

    def prompt(self, text: str, request: GenerationRequest) -> Prompt:
        limit = self.clip_tokenizer.model_max_length
        clip = self.clip_tokenizer(text, padding="max_length", max_length=limit, truncation=True).input_ids
        t5 = self.t5_tokenizer(text).input_ids  # the first, as it is its tokens that count against the limit
        assert request.max_sequence_length is not None
        return Prompt((tuple(t5), tuple(clip)), request.max_sequence_length)

    def encode(self, prompts: Sequence[Prompt]) -> list[Embedding]:
        pooled = self.clip(torch.tensor([prompt.ids[1] for prompt in prompts], device=self.device)).pooler_output
        hidden: dict[int, torch.Tensor] = {}
        for length in {prompt.length for prompt in prompts}:
            members = [i for i, prompt in enumerate(prompts) if prompt.length == length]
            pad = self.t5_tokenizer.pad_token_id
            ids = [(*prompts[i].ids[0], *(length - len(prompts[i].ids[0])) * (pad,)) for i in members]
            hidden.update(zip(members, self.t5(torch.tensor(ids, device=self.device))[0], strict=True))
        return [Embedding(*self.transformer.embed_prompt(hidden[i], pooled[i])) for i in range(len(prompts))]

    def layout(self, sequences: Sequence[PackedSequence]) -> Layout:
        order = Order.of(sequences, self.transformer.channels, self.device)
        turns = []
        for s in sequences:
            turns.append(self.rotary(*self.space.grid(*s.request.size), 0))
            turns += [self.rotary(*self.space.grid(r.width, r.height), 1) for r in s.references]
        rotary = torch.cat(turns)
        unturned = torch.ones((len(order.text), *rotary.shape[1:]), dtype=rotary.dtype, device=self.device)
        guidance = torch.tensor([s.request.guidance_scale or 0.0 for s in sequences], device=self.device)
        pooled = torch.stack([s.prompt.pooled for s in sequences if s.prompt.pooled is not None])
        return Layout(
            job=torch.tensor([s.job for s in sequences], device=self.device),
            condition=self.transformer.condition(pooled, guidance),
            text=torch.cat([s.prompt.rows for s in sequences]),
            references=self.transformer.embed_picture(order.references),
            order=order,
            image_rotary=rotary,
            rotary=order.join(unturned, rotary),
            sequence=order.join(order.text_sequence, order.image_sequence),
            out_rows=order.image[order.pictures],
            out_sequence=order.image_sequence[order.pictures],
        )

    def _rotary(self, rows: int, columns: int, first: int) -> torch.Tensor:
        """Of a picture with so many tokens, ``[rows * columns, 1, head_dim / 2]``; ``first`` is 1 for a reference."""
        y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        positions = torch.stack((torch.full_like(x, first), y, x), dim=-1).flatten(0, 1)
        return self.transformer.rotary(positions).to(self.device)


class FluxKontext(Flux):
    """A loaded FLUX.1 Kontext checkpoint: its prompts may speak of a picture."""

    TASKS: ClassVar[tuple[Task, ...]] = ("text-to-image", "editing")

    def __init__(self, config: EngineConfig, folder: Path) -> None:
        super().__init__(config, folder)
        self.shapes = preferred_shapes(self.settings.reference_area, self.space.token)
        low, high = self.info.min_side, self.info.max_side
        fitting = tuple(shape for shape in self.shapes if low <= min(shape) and max(shape) <= high)
        self.info = msgspec.structs.replace(self.info, auto_size=AutoSize(shapes=fitting))

    def image_sizes(self, request: GenerationRequest) -> list[tuple[int, int]]:
        return [nearest_shape(image.width, image.height, self.shapes) for image in request.images]


def preferred_shapes(area: int, multiple: int) -> tuple[tuple[int, int], ...]:
    """Width and height of pictures that Kontext knows, brought to about ``area`` pixels; sides are multiples."""
    scale = (area / PREFERRED_AREA) ** 0.5
    return tuple(
        (max(multiple, round(w * scale / multiple) * multiple), max(multiple, round(h * scale / multiple) * multiple))
        for w, h in PREFERRED_SHAPES
    )
