"""A small Stable Diffusion with random weights, as a checkpoint that is served as a whole pipeline.

Run with: python benchmarks/peers/unet_checkpoint.py [FOLDER]

A UNet with cross-attention, CLIP and a VAE, as in the real one, and small: a picture of 128x128 pixels in 8 steps takes
about a quarter of a second on one thread. What it draws is noise.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from checkpoint import CLIP, written
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from stepbatch.models.dummy import randomize
from stepbatch.models.stand_in import clip_tokenizer

NAME = "stable-diffusion-small"

UNET: dict[str, Any] = {  # the real one: 320 to 1280 channels, four levels, two layers a block
    "sample_size": 16,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (32, 64, 96),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": CLIP["hidden_size"],
    "attention_head_dim": 4,
}
VAE: dict[str, Any] = {  # the real one: 128 to 512 channels, four levels, two layers a block
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (8, 16, 32, 32),
    "latent_channels": 4,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "sample_size": 128,
}
SCHEDULER: dict[str, Any] = {  # as Stable Diffusion has it
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


def checkpoint(folder: Path | None = None) -> Path:
    """The checkpoint, written where it isn't yet; see ``checkpoint.checkpoint``."""
    return written(_make, NAME, repr((UNET, VAE, CLIP, SCHEDULER)), folder)


def _make() -> StableDiffusionPipeline:
    unet, vae, clip = UNet2DConditionModel(**UNET), AutoencoderKL(**VAE), CLIPTextModel(CLIPTextConfig(**CLIP))
    for seed, part in enumerate((unet, vae, clip)):
        randomize(part, seed)
    scheduler = DDIMScheduler(**SCHEDULER)
    return StableDiffusionPipeline(
        vae, clip, clip_tokenizer(), unet, scheduler, safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip


if __name__ == "__main__":
    print(checkpoint(Path(sys.argv[1]) if len(sys.argv) > 1 else None))
