"""Wan 2.1 and Wan 2.2 A14B, text to video: the text encoder, and what requests and their videos become.

UMT5 embeds the prompt, and the rows behind it, up to ``max_sequence_length``, are zeros that the model does see, as in
training. A14B has two transformers: one for the first, noisy steps and one for the rest, each with a guidance of its
own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import WanPipeline
from diffusers.pipelines.wan.pipeline_wan import prompt_clean

from stepbatch.config import EngineConfig
from stepbatch.errors import NotNative
from stepbatch.model_info import Guidance, ModelInfo
from stepbatch.models.base import Embedding, Model, PackedSequence, Prompt
from stepbatch.models.defaults import Settings, settings
from stepbatch.models.latents import LatentSpace
from stepbatch.models.loading import Parts, load_parts, model_info
from stepbatch.models.noise_schedule import NoiseSchedule, check_stepwise, is_shifted, stepwise_schedule
from stepbatch.models.packed import Segments
from stepbatch.models.text import pad
from stepbatch.models.wan_transformer import Layout, Transformer
from stepbatch.models.weights import read_json
from stepbatch.request import GenerationRequest

LONGEST_PROMPT = 512  # tokens
ROTARY_CACHE = 16  # entries: those of long videos are large


class Wan(Model):
    """A loaded checkpoint of Wan that makes videos from prompts."""

    DEFAULTS: ClassVar[dict[str, Any]] = {
        "width": 832,
        "height": 480,
        "num_frames": 81,
        "max_frames": 161,
        "fps": 16,
        "num_inference_steps": 50,
        "guidance_scale": 5.0,
    }
    TWO: ClassVar = {"num_inference_steps": 40, "guidance_scale": 4.0, "guidance_scale_2": 3.0}
    SMALL: ClassVar = {"num_frames": 5}
    transformer: Transformer

    def __init__(self, config: EngineConfig, folder: Path) -> None:
        names, boundary = _networks(folder)
        parts = load_parts(WanPipeline, Transformer, folder, config, names)
        rest = parts.pipeline
        self.device, self.transformer, self.transformers = parts.device, parts.transformer, parts.transformers
        self.noise_scheduler = check_stepwise(rest.scheduler)
        self.boundary = boundary * self.noise_scheduler.config["num_train_timesteps"]
        self.tokenizer, self.text_encoder = rest.tokenizer, rest.text_encoder
        self.space = LatentSpace(
            rest.vae,
            rest.vae_scale_factor_spatial,
            channels_first=True,
            device=self.device,
            frame=rest.vae_scale_factor_temporal,
        )
        if any({t.channels, t.out_channels} != {self.space.channels} for t in self.transformers):
            raise NotNative("its transformer takes more than its VAE's latents, which has no native form")
        self.rotary = lru_cache(ROTARY_CACHE)(self._rotary)
        known = self.DEFAULTS | (self.TWO if len(names) > 1 else {})
        if config.defaults.default_guidance_scale is not None:
            known = known | {"guidance_scale_2": None}  # the flag is for both
        if parts.settings:
            known = known | parts.settings | self.SMALL
        longest_side = self.space.token * self.transformer.positions
        self.info = self._info(config, parts, settings(known, folder, longest_side, LONGEST_PROMPT), longest_side)

    def prompt(self, text: str, request: GenerationRequest) -> Prompt:
        return Prompt((tuple(self.tokenizer(prompt_clean(text)).input_ids),), 0)

    def encode(self, prompts: Sequence[Prompt]) -> list[Embedding]:
        ids, mask = pad([prompt.ids[0] for prompt in prompts], self.device)
        hidden = self.text_encoder(ids, mask).last_hidden_state
        rows = [row[: len(prompt.ids[0])] for row, prompt in zip(hidden, prompts, strict=True)]
        return [Embedding(row.clone()) for row in rows]

    def layout(self, sequences: Sequence[PackedSequence]) -> Layout:
        network = sequences[0].network
        assert all(s.network == network for s in sequences)
        text, text_rows = _text(sequences)
        turns = [
            self.rotary(self.space.latent_frames(s.request.frames), *self.space.grid(*s.request.size))
            for s in sequences
        ]
        counts = [len(turn) for turn in turns]
        jobs = torch.tensor([s.job for s in sequences])
        return Layout(
            network=network,
            rows=torch.cat([torch.arange(s.latents.start, s.latents.stop) for s in sequences]).to(self.device),
            job=jobs.repeat_interleave(torch.tensor(counts)).to(self.device),
            rotary=torch.cat(turns),
            segments=Segments.of(counts),
            text=self.transformers[network].embed_text(text),
            text_rows=torch.cat(text_rows).to(self.device),
            text_segments=Segments.of(counts, [len(rows) for rows in text_rows]),
        )

    def denoise(self, layout: Layout, latents: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        velocity: torch.Tensor = self.transformers[layout.network](latents, time, layout)
        return velocity

    def schedule(self, request: GenerationRequest) -> NoiseSchedule:
        schedule = stepwise_schedule(self.noise_scheduler, request)
        return replace(schedule, networks=tuple(int(time < self.boundary) for time in schedule.times.tolist()))

    def scale(self, request: GenerationRequest, network: int = 0) -> float:
        own = request.guidance_scale_2 if network else None
        return super().scale(request) if own is None else own

    def _info(self, config: EngineConfig, parts: Parts[Transformer], values: Settings, longest_side: int) -> ModelInfo:
        longest = self.space.frame * (self.transformer.positions - 1) + 1
        return model_info(
            config,
            parts,
            values,
            longest_side=longest_side,
            longest_prompt=LONGEST_PROMPT,
            size_multiple=self.space.token,
            frames_multiple=self.space.frame,
            max_frames=min(values.max_frames or longest, longest),
            uses=("num_frames", "fps", "guidance_scale", "negative_prompt", "max_sequence_length")
            + (("guidance_scale_2",) if len(self.transformers) > 1 else ())
            + (("flow_shift",) if is_shifted(self.noise_scheduler) else ()),
            tasks=("text-to-video",),
            guidance=Guidance(field="guidance_scale", off=1.0),
        )

    def _rotary(self, frames: int, rows: int, columns: int) -> torch.Tensor:
        """Of a video of so many tokens along each axis, ``[frames * rows * columns, 1, head_dim / 2]``."""
        axes = torch.meshgrid(torch.arange(frames), torch.arange(rows), torch.arange(columns), indexing="ij")
        return self.transformer.rotary(torch.stack(axes, dim=-1).flatten(0, 2)).to(self.device)


def _networks(folder: Path) -> tuple[tuple[str, ...], float]:
    """The folders of a checkpoint's transformers, and below which share of the timesteps the second one takes over.

    Raises:
        NotNative: they are not used as they are here.
    """
    index = read_json(folder / "model_index.json")
    if index.get("expand_timesteps"):
        raise NotNative("its tokens have timesteps of their own (expand_timesteps), which has no native form")
    present = [name for name in ("transformer", "transformer_2") if any(index.get(name) or ())]
    if index.get("boundary_ratio") is None:
        wanted, boundary = ["transformer"], 0.0  # a second one would never be asked, and is left where it is
    else:
        wanted, boundary = ["transformer", "transformer_2"], float(index["boundary_ratio"])
    if missing := [name for name in wanted if name not in present]:
        raise NotNative(f"it has no {missing[0]}, which has no native form")
    return tuple(wanted), boundary


def _text(sequences: Sequence[PackedSequence]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Each prompt's rows once, then one of zeros, ``[Tt, D']``; and which of them each sequence looks at.

    Behind a prompt are zeros up to ``max_sequence_length``. They are all one row, and sequences may share a prompt:
    so blocks work on a few rows where sequences look at many.
    """
    prompts = list({id(s.prompt): s.prompt for s in sequences}.values())
    ends = torch.tensor([len(prompt.rows) for prompt in prompts]).cumsum(0).tolist()
    end_of = {id(prompt): end for prompt, end in zip(prompts, ends, strict=True)}
    seen = []
    for s in sequences:
        assert s.request.max_sequence_length is not None
        length, end = len(s.prompt.rows), end_of[id(s.prompt)]
        padding = torch.full((s.request.max_sequence_length - length,), ends[-1])
        seen.append(torch.cat((torch.arange(end - length, end), padding)))
    rows = [prompt.rows for prompt in prompts]
    return torch.cat([*rows, rows[0].new_zeros(1, rows[0].shape[1])]), seen
