"""Qwen-Image: the text encoder, and what requests and their pictures become.

The prompt is put into a template, and Qwen2.5-VL's hidden states of all that follows the template's first part are the
embedding. Guidance runs a second sequence with the negative prompt, and keeps the length of the first one's prediction.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline, QwenImagePipeline

from stepbatch.config import EngineConfig
from stepbatch.errors import CheckpointError
from stepbatch.model_info import Guidance, ModelInfo, Task
from stepbatch.models.base import Embedding, Model, PackedSequence, Prompt
from stepbatch.models.defaults import Settings, settings
from stepbatch.models.latents import PATCH, LatentSpace
from stepbatch.models.loading import Parts, load_parts, model_info
from stepbatch.models.noise_schedule import check_flow_match
from stepbatch.models.qwen_transformer import Layout, Transformer
from stepbatch.models.text import pad
from stepbatch.models.two_streams import Order
from stepbatch.request import GenerationRequest

LONGEST_SIDE = 8192  # pixels; the architecture has no limit of its own
ROTARY_CACHE = 64  # entries


class QwenImage(Model):
    """A loaded Qwen-Image checkpoint."""

    PIPELINE: ClassVar[type[DiffusionPipeline]] = QwenImagePipeline
    DEFAULTS: ClassVar[dict[str, Any]] = {
        "width": 1024,
        "height": 1024,
        "num_inference_steps": 50,
        "true_cfg_scale": 4.0,
        "strength": 0.6,
    }
    NAMED: ClassVar[dict[str, dict[str, Any]]] = {}
    TASKS: ClassVar[tuple[Task, ...]] = ("text-to-image", "image-to-image", "inpainting")
    transformer: Transformer

    def __init__(self, config: EngineConfig, folder: Path) -> None:
        parts = load_parts(self.PIPELINE, Transformer, folder, config)
        rest = parts.pipeline
        self.device, self.transformer = parts.device, parts.transformer
        self.noise_scheduler = check_flow_match(rest.scheduler)
        self.tokenizer, self.text_encoder = rest.tokenizer, self.used_encoder(rest.text_encoder)
        self.template: str = rest.prompt_template_encode
        self.first: int = rest.prompt_template_encode_start_idx  # token of the template that is embedded
        self.space = LatentSpace(rest.vae, rest.vae_scale_factor, channels_first=True, device=parts.device)
        if self.transformer.channels != PATCH * PATCH * self.space.channels:
            raise CheckpointError(f"{folder / 'transformer'} takes more than its VAE's latents: it has no native form")
        self.picture_rotary = lru_cache(ROTARY_CACHE)(self._picture_rotary)
        self.text_rotary = lru_cache(ROTARY_CACHE)(self._text_rotary)
        known = self.DEFAULTS | self.NAMED.get(parts.name.lower(), {}) | parts.settings
        self.settings = settings(known, folder, LONGEST_SIDE, rest.tokenizer_max_length)
        self.info = self._info(config, parts, self.settings)

    def used_encoder(self, whole: Any) -> Any:
        """The part of the text encoder that runs; the rest is not kept."""
        return whole.model.language_model

    def about_images(self, values: Settings) -> dict[str, Any]:
        """What ``info`` says of a request's images."""
        return {}

    def prompt(self, text: str, request: GenerationRequest) -> Prompt:
        ids = self.tokenizer(self.template.format(text)).input_ids
        return Prompt((tuple(ids),), len(ids) - self.first)

    def prompt_tokens(self, prompt: Prompt) -> int:
        return len(prompt.ids[0]) - self.first

    def encode(self, prompts: Sequence[Prompt]) -> list[Embedding]:
        ids, mask = pad([prompt.ids[0] for prompt in prompts], self.device)
        hidden = self.hidden(prompts, ids, mask)
        rows = [row[self.first : len(prompt.ids[0])] for row, prompt in zip(hidden, prompts, strict=True)]
        return [Embedding(self.transformer.embed_prompt(row)) for row in rows]

    def hidden(self, prompts: Sequence[Prompt], ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """What the text encoder makes of padded prompts, ``[P, L]`` to ``[P, L, D']``."""
        states: torch.Tensor = self.text_encoder(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        return states

    def layout(self, sequences: Sequence[PackedSequence]) -> Layout:
        order = Order.of(sequences, self.transformer.channels, self.device)
        job = torch.tensor([s.job for s in sequences], device=self.device)
        image_time = job[order.image_sequence]
        if self.transformer.references_finished:
            finished = (job.max() + 1).expand(len(image_time))
            image_time = finished.index_copy(0, order.pictures, image_time[order.pictures])
        text_rotary, image_rotary = [], []
        for s in sequences:
            grids = [self.space.grid(*s.request.size), *(self.space.grid(r.width, r.height) for r in s.references)]
            image_rotary += [self.picture_rotary(*grid, index) for index, grid in enumerate(grids)]
            text_rotary.append(self.text_rotary(len(s.prompt.rows), max(max(grid) // 2 for grid in grids)))
        return Layout(
            text=torch.cat([s.prompt.rows for s in sequences]),
            text_rotary=torch.cat(text_rotary),
            text_time=job[order.text_sequence],
            references=self.transformer.embed_picture(order.references),
            image_rotary=torch.cat(image_rotary),
            image_time=image_time,
            order=order,
            out_time=image_time[order.pictures],
        )

    def guide(self, positive: torch.Tensor, negative: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        combined = super().guide(positive, negative, scale)
        wanted, length = (torch.linalg.vector_norm(rows, dim=1, keepdim=True) for rows in (positive, combined))
        return combined.mul_(wanted / length)

    def _info(self, config: EngineConfig, parts: Parts[Transformer], values: Settings) -> ModelInfo:
        dynamic = self.noise_scheduler.config["use_dynamic_shifting"]
        return model_info(
            config,
            parts,
            values,
            longest_side=LONGEST_SIDE,
            longest_prompt=parts.pipeline.tokenizer_max_length,
            size_multiple=self.space.token,
            uses=("negative_prompt", "true_cfg_scale", "max_sequence_length") + (() if dynamic else ("flow_shift",)),
            tasks=self.TASKS,
            guidance=Guidance(field="true_cfg_scale", off=1.0, needs_negative=True),
            **self.about_images(values),
        )

    def _picture_rotary(self, rows: int, columns: int, index: int) -> torch.Tensor:
        """Of a sequence's picture (0) or reference (from 1): rows and columns count from its middle."""
        y, x = torch.arange(rows) - (rows - rows // 2), torch.arange(columns) - (columns - columns // 2)
        y, x = torch.meshgrid(y, x, indexing="ij")
        positions = torch.stack((torch.full_like(x, index), y, x), dim=-1).flatten(0, 1)
        return self.transformer.rotary(positions).to(self.device)

    def _text_rotary(self, length: int, start: int) -> torch.Tensor:
        """Of a prompt: it counts on, along all axes, from the edge of the largest picture."""
        return self.transformer.rotary(torch.arange(start, start + length)[:, None].expand(-1, 3)).to(self.device)
