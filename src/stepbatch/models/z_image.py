"""Z-Image: checkpoints of diffusers' ``ZImagePipeline``, with the transformer's forward pass packed.

The transformer runs on ``[picture, prompt]`` sequences. Prompt and picture are each filled up to a multiple of 32
tokens with learned pad tokens that do take part in attention; that is how the model was trained. Prompts pass their
own refiner blocks first. Those depend on no timestep, so they belong to ``encode`` here.

The architecture is that of https://github.com/Tongyi-MAI/Z-Image; parameter names are those of diffusers'
``ZImageTransformer2DModel``, whose state dict is loaded as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import ZImagePipeline
from torch import nn
from torch.nn import functional as F

from stepbatch.config import EngineConfig
from stepbatch.errors import CheckpointError
from stepbatch.model_info import ModelInfo
from stepbatch.models.base import Embedding, Model, PackedSequence, Prompt
from stepbatch.models.defaults import settings
from stepbatch.models.latents import PATCH, LatentSpace
from stepbatch.models.layers import Fusible, RMSNorm, TimestepEmbedder
from stepbatch.models.loading import load_parts, model_info
from stepbatch.models.noise_schedule import check_flow_match
from stepbatch.models.packed import Segments, attention, chunk_rows, gather, in_chunks, rotate
from stepbatch.models.text import pad
from stepbatch.request import GenerationRequest

MULTIPLE = 32  # prompt and picture are filled up to this many tokens
TIME_CHANNELS = 256
ROTARY_CACHE = 64  # entries
TURBO = {"num_inference_steps": 9, "guidance_scale": 0.0}
TURBO_SHIFT = 3.0  # of its noise schedule; the base model's is 6


def padded(length: int) -> int:
    """``length`` rounded up to what the transformer was trained on."""
    return -(-length // MULTIPLE) * MULTIPLE


@dataclass(eq=False)
class Layout:
    """What a batch's forward pass needs to know of its members, pictures being filled up with pads."""

    picture_rows: torch.Tensor  # [Tx] row of the packed latents, any for a pad
    pads: torch.Tensor  # [P] rows among Tx that are pads
    picture_job: torch.Tensor  # [Tx] row of the modulation table
    picture_rotary: torch.Tensor  # complex64 [Tx, 1, head_dim / 2]
    picture_segments: Segments
    prompts: torch.Tensor  # [Tp, D]
    order: torch.Tensor  # [T] rows of the pictures and then the prompts, by sequence
    job: torch.Tensor  # [T]
    rotary: torch.Tensor  # complex64 [T, 1, head_dim / 2]
    segments: Segments
    out_rows: torch.Tensor  # [R'] the rows among T that are pictures
    out_job: torch.Tensor  # [R']


class Attention(Fusible):
    """The projections around attention; attention itself needs the whole sequence, these are row by row."""

    FUSED: ClassVar = {"to_qkv": ("to_q", "to_k", "to_v")}

    def __init__(self, dim: int, heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(dim, dim, bias=False)
        self.to_v = nn.Linear(dim, dim, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim, bias=False)])
        self.norm_q = RMSNorm(dim // heads, 1e-5) if qk_norm else nn.Identity()
        self.norm_k = RMSNorm(dim // heads, 1e-5) if qk_norm else nn.Identity()

    def project(self, x: torch.Tensor, rotary: torch.Tensor) -> torch.Tensor:
        """``[T, D]`` to queries, keys and values, ``[T, 3, heads, head_dim]``."""
        joined = self.joined("to_qkv", x).view(len(x), 3, self.heads, -1)
        for part, norm in ((0, self.norm_q), (1, self.norm_k)):
            joined[:, part] = rotate(norm(joined[:, part]), rotary)
        return joined


class FeedForward(Fusible):
    """The gated feed-forward, row by row."""

    FUSED: ClassVar = {"w13": ("w1", "w3")}

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.hidden = hidden = int(dim / 3 * 8)
        self.w1 = nn.Linear(dim, hidden, bias=False)
        self.w2 = nn.Linear(hidden, dim, bias=False)
        self.w3 = nn.Linear(dim, hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, value = self.joined("w13", x).chunk(2, dim=-1)
        out: torch.Tensor = self.w2(F.silu(gate, inplace=True).mul_(value))
        return out


class Block(nn.Module):
    """One transformer block over packed sequences; without ``modulation`` it knows no timestep."""

    def __init__(self, dim: int, heads: int, norm_eps: float, qk_norm: bool, modulation: bool) -> None:
        super().__init__()
        self.attention = Attention(dim, heads, qk_norm)
        self.feed_forward = FeedForward(dim)
        self.attention_norm1 = RMSNorm(dim, norm_eps)
        self.ffn_norm1 = RMSNorm(dim, norm_eps)
        self.attention_norm2 = RMSNorm(dim, norm_eps)
        self.ffn_norm2 = RMSNorm(dim, norm_eps)
        if modulation:
            self.adaLN_modulation = nn.Sequential(nn.Linear(min(dim, TIME_CHANNELS), 4 * dim))

    def _table(self, time: torch.Tensor) -> torch.Tensor:
        """Modulation rows, ``[J, 256]`` to ``[J, 4 D]``: scale and gate of attention, then of feed-forward."""
        scale_attention, gate_attention, scale_ffn, gate_ffn = self.adaLN_modulation(time).chunk(4, dim=-1)
        return torch.cat((1 + scale_attention, gate_attention.tanh(), 1 + scale_ffn, gate_ffn.tanh()), dim=-1)

    def forward(
        self,
        x: torch.Tensor,  # [T, D]
        rotary: torch.Tensor,  # complex64 [T, 1, head_dim / 2]
        segments: Segments,
        time: torch.Tensor | None,  # [J, 256]
        job: torch.Tensor,  # [T] row of time
    ) -> torch.Tensor:
        size = chunk_rows(self.feed_forward.hidden, x.device)
        table = x.new_ones(1, 4 * x.shape[1]) if time is None else self._table(time)

        def before(rows: slice) -> torch.Tensor:
            scale = gather(table[:, : x.shape[1]], job[rows])
            return self.attention.project(self.attention_norm1(x[rows]) * scale, rotary[rows])

        def after(rows: slice) -> torch.Tensor:
            gate, scale_ffn, gate_ffn = gather(table[:, x.shape[1] :], job[rows]).chunk(3, dim=-1)
            update = self.attention_norm2(self.attention.to_out[0](attended[rows]))
            y = torch.addcmul(x[rows], gate, update)
            return torch.addcmul(y, gate_ffn, self.ffn_norm2(self.feed_forward(self.ffn_norm1(y) * scale_ffn)))

        query, key, value = in_chunks(before, len(x), size).unbind(1)
        attended = attention(query, key, value, segments)
        return in_chunks(after, len(x), size)


class FinalLayer(nn.Module):
    """Rows of the transformer to rows of latents."""

    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(dim, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(min(dim, TIME_CHANNELS), dim))

    def forward(self, x: torch.Tensor, time: torch.Tensor, job: torch.Tensor) -> torch.Tensor:
        scale = (1 + self.adaLN_modulation(time)).index_select(0, job)
        out: torch.Tensor = self.linear(self.norm_final(x) * scale)
        return out


class Transformer(nn.Module):
    """The denoiser over packed sequences."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        dim, heads, eps = config["dim"], config["n_heads"], config["norm_eps"]
        channels = PATCH * PATCH * config["in_channels"]

        def blocks(count: int, modulation: bool) -> nn.ModuleList:
            return nn.ModuleList([Block(dim, heads, eps, config["qk_norm"], modulation) for _ in range(count)])

        self.t_scale: float = config["t_scale"]
        self.axes_dims: list[int] = config["axes_dims"]
        self.rope_theta: float = config["rope_theta"]
        self.all_x_embedder = nn.ModuleDict({f"{PATCH}-1": nn.Linear(channels, dim)})
        self.all_final_layer = nn.ModuleDict({f"{PATCH}-1": FinalLayer(dim, channels)})
        self.noise_refiner = blocks(config["n_refiner_layers"], modulation=True)
        self.context_refiner = blocks(config["n_refiner_layers"], modulation=False)
        self.t_embedder = TimestepEmbedder(TIME_CHANNELS, 1024, min(dim, TIME_CHANNELS))
        self.cap_embedder = nn.Sequential(RMSNorm(config["cap_feat_dim"], eps), nn.Linear(config["cap_feat_dim"], dim))
        self.x_pad_token = nn.Parameter(torch.empty(1, dim))
        self.cap_pad_token = nn.Parameter(torch.empty(1, dim))
        self.layers = blocks(config["n_layers"], modulation=True)

    def rotary(self, positions: torch.Tensor) -> torch.Tensor:
        """Positions ``[T, 3]`` (prompt or frame, row, column) to complex64 ``[T, 1, head_dim / 2]``."""
        parts = []
        for axis, dim in enumerate(self.axes_dims):
            frequencies = 1.0 / self.rope_theta ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim)
            angles = torch.outer(positions[:, axis].double(), frequencies).float()
            parts.append(torch.polar(torch.ones_like(angles), angles))
        return torch.cat(parts, dim=-1).unsqueeze(1)

    def refine_prompts(self, features: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """A text encoder's ``[L, D']`` for each prompt to ``[padded(L), D]``, which no step changes."""
        lengths = [padded(len(prompt)) for prompt in features]
        parts = []
        for prompt, length in zip(features, lengths, strict=True):
            parts += [self.cap_embedder(prompt), self.cap_pad_token.expand(length - len(prompt), -1)]
        rows = torch.cat(parts)
        rotary = self.rotary(torch.cat([prompt_positions(length) for length in lengths])).to(rows.device)
        segments, first = Segments.of(lengths), torch.zeros(len(rows), dtype=torch.long, device=rows.device)
        for block in self.context_refiner:
            rows = block(rows, rotary, segments, None, first)
        return list(torch.split(rows, lengths))

    def forward(self, latents: torch.Tensor, sigma: torch.Tensor, layout: Layout) -> torch.Tensor:
        """``[R, C]`` latents and each job's ``[J]`` sigma to ``[R', C]`` velocities."""
        dtype: torch.dtype = self.x_pad_token.dtype
        # diffusers goes through the timestep, and so do these roundings
        time = self.t_embedder((1000 - sigma * 1000) / 1000 * self.t_scale, dtype)  # [J, 256]
        x = self.all_x_embedder[f"{PATCH}-1"](latents.to(dtype)).index_select(0, layout.picture_rows)
        if len(layout.pads):
            x.index_copy_(0, layout.pads, self.x_pad_token.expand(len(layout.pads), -1))
        for block in self.noise_refiner:
            x = block(x, layout.picture_rotary, layout.picture_segments, time, layout.picture_job)
        x = torch.cat((x, layout.prompts)).index_select(0, layout.order)
        for block in self.layers:
            x = block(x, layout.rotary, layout.segments, time, layout.job)
        out = self.all_final_layer[f"{PATCH}-1"](x.index_select(0, layout.out_rows), time, layout.out_job)
        return torch.neg(out)  # it predicts data minus noise


class ZImage(Model):
    """A loaded Z-Image checkpoint."""

    FILLED_UP_TO: ClassVar = MULTIPLE
    DEFAULTS: ClassVar = {
        "width": 1024,
        "height": 1024,
        "strength": 1.0,
        "num_inference_steps": 50,
        "guidance_scale": 5.0,
    }
    NAMED: ClassVar = {"z-image-turbo": TURBO, "z-image": {}}
    transformer: Transformer

    def __init__(self, config: EngineConfig, folder: Path) -> None:
        parts = load_parts(ZImagePipeline, Transformer, folder, config)
        self.device, self.transformer = parts.device, parts.transformer
        self.noise_scheduler = check_flow_match(parts.pipeline.scheduler)
        self.tokenizer, self.text_encoder = parts.pipeline.tokenizer, parts.pipeline.text_encoder
        self.space = LatentSpace(
            parts.pipeline.vae, parts.pipeline.vae_scale_factor, channels_first=False, device=self.device
        )
        self.prompt_rotary = lru_cache(ROTARY_CACHE)(self._prompt_rotary)
        self.picture_rotary = lru_cache(ROTARY_CACHE)(self._picture_rotary)
        lengths = parts.transformer_config["axes_lens"]
        dynamic = self.noise_scheduler.config["use_dynamic_shifting"]
        turbo = not dynamic and self.noise_scheduler.config["shift"] == TURBO_SHIFT
        known = self.DEFAULTS | self.NAMED.get(parts.name.lower(), TURBO if turbo else {}) | parts.settings
        longest_side = self.space.token * min(lengths[1:])
        longest_prompt = min(self.tokenizer.model_max_length, lengths[0] - MULTIPLE)
        self.info: ModelInfo = model_info(
            config,
            parts,
            settings(known, folder, longest_side, longest_prompt),
            longest_side=longest_side,
            longest_prompt=longest_prompt,
            size_multiple=self.space.token,
            uses=("guidance_scale", "negative_prompt", "max_sequence_length") + (() if dynamic else ("flow_shift",)),
            tasks=("text-to-image", "image-to-image", "inpainting"),
        )
        self._check_chat_template()

    def prompt(self, text: str, request: GenerationRequest) -> Prompt:
        ids = self._tokens(text)
        return Prompt((tuple(ids),), padded(len(ids)))

    def encode(self, prompts: Sequence[Prompt]) -> list[Embedding]:
        ids, mask = pad([prompt.ids[0] for prompt in prompts], self.device)
        encoder = self.text_encoder(input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False)
        hidden = encoder.hidden_states[-2]
        features = [row[: len(prompt.ids[0])] for row, prompt in zip(hidden, prompts, strict=True)]
        return [Embedding(rows.clone()) for rows in self.transformer.refine_prompts(features)]

    def length(self, request: GenerationRequest, prompt: Prompt) -> int:
        rows, columns = self.space.grid(*request.size)
        return padded(rows * columns) + prompt.length

    def layout(self, sequences: Sequence[PackedSequence]) -> Layout:
        grids = [self.space.grid(*s.request.size) for s in sequences]
        counts = [h * w for h, w in grids]
        lengths = [padded(n) for n in counts]
        prompt_lengths = [len(s.prompt.rows) for s in sequences]
        picture_rotary = [
            self.picture_rotary(h, w, length) for (h, w), length in zip(grids, prompt_lengths, strict=True)
        ]
        jobs = torch.tensor([s.job for s in sequences])
        rows, pads, order, rotary, out_rows = [], [], [], [], []
        at = x_at = 0
        prompt_at = sum(lengths)
        for s, n, length, prompt_length, turns in zip(
            sequences, counts, lengths, prompt_lengths, picture_rotary, strict=True
        ):
            rows += [torch.arange(s.latents.start, s.latents.stop), torch.full((length - n,), s.latents.start)]
            pads.append(torch.arange(x_at + n, x_at + length))
            order += [torch.arange(x_at, x_at + length), torch.arange(prompt_at, prompt_at + prompt_length)]
            rotary += [turns, self.prompt_rotary(prompt_length)]
            out_rows.append(torch.arange(at, at + n))
            at, x_at, prompt_at = at + length + prompt_length, x_at + length, prompt_at + prompt_length
        both = [a + b for a, b in zip(lengths, prompt_lengths, strict=True)]
        return Layout(
            picture_rows=torch.cat(rows).to(self.device),
            pads=torch.cat(pads).to(self.device),
            picture_job=jobs.repeat_interleave(torch.tensor(lengths)).to(self.device),
            picture_rotary=torch.cat(picture_rotary),
            picture_segments=Segments.of(lengths),
            prompts=torch.cat([s.prompt.rows for s in sequences]),
            order=torch.cat(order).to(self.device),
            job=jobs.repeat_interleave(torch.tensor(both)).to(self.device),
            rotary=torch.cat(rotary),
            segments=Segments.of(both),
            out_rows=torch.cat(out_rows).to(self.device),
            out_job=jobs.repeat_interleave(torch.tensor(counts)).to(self.device),
        )

    def guide(self, positive: torch.Tensor, negative: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return positive + scale * (positive - negative)  # not the usual form: 0 is no guidance, as in diffusers

    def _tokens(self, prompt: str) -> list[int]:
        text = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True, enable_thinking=True
        )
        tokens: list[int] = self.tokenizer(text).input_ids
        return tokens

    def _check_chat_template(self) -> None:
        try:
            self._tokens("")
        except (ValueError, TypeError) as error:
            raise CheckpointError("its tokenizer has no chat template") from error

    def _prompt_rotary(self, length: int) -> torch.Tensor:
        return self.transformer.rotary(prompt_positions(length)).to(self.device)

    def _picture_rotary(self, height: int, width: int, prompt_length: int) -> torch.Tensor:
        return self.transformer.rotary(picture_positions(height, width, prompt_length)).to(self.device)


def prompt_positions(length: int) -> torch.Tensor:
    """``[L, 3]``: a prompt's tokens count up from 1 along the first axis."""
    return F.pad(torch.arange(1, length + 1)[:, None], (0, 2))


def picture_positions(height: int, width: int, prompt_length: int) -> torch.Tensor:
    """``[padded(H * W), 3]``: a picture comes after its prompt; its pads lie at the origin."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    picture = torch.stack((torch.full_like(x, prompt_length + 1), y, x), dim=-1).flatten(0, 1)
    return F.pad(picture, (0, 0, 0, padded(len(picture)) - len(picture)))
