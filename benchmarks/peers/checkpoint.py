"""A small FLUX.1 with random weights, as a checkpoint that stepbatch and diffusers load alike.

Run with: python benchmarks/peers/checkpoint.py [FOLDER]

It is as wide and deep as makes a step of a picture of 128 to 256 pixels take tens of milliseconds on one thread, so
that multiplications count, and a run of the benchmark takes minutes. Text encoders and VAE are small beside the
transformer, as they are in the real model. What it draws is noise.
"""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from stepbatch.models.dummy import randomize
from stepbatch.models.stand_in import clip_tokenizer, t5_tokenizer

NAME = "flux-small"
TEXT, POOLED = 128, 64  # widths of T5's and CLIP's output
LATENT_CHANNELS = 16

TRANSFORMER: dict[str, Any] = {  # the real one: 19 and 38 blocks, 24 heads of 128
    "in_channels": 4 * LATENT_CHANNELS,
    "num_layers": 2,
    "num_single_layers": 4,
    "num_attention_heads": 4,
    "attention_head_dim": 64,
    "axes_dims_rope": (16, 24, 24),
    "joint_attention_dim": TEXT,
    "pooled_projection_dim": POOLED,
    "guidance_embeds": True,
}
VAE: dict[str, Any] = {  # the real one: 128 to 512 channels, two layers a block
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (8, 16, 32, 32),
    "latent_channels": LATENT_CHANNELS,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
T5: dict[str, Any] = {  # the real one: 24 layers, 64 heads, 4096 wide
    "vocab_size": 32128,
    "d_model": TEXT,
    "d_kv": 32,
    "d_ff": 256,
    "num_layers": 2,
    "num_heads": 4,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
}
CLIP: dict[str, Any] = {  # the real one: 12 layers, 12 heads, 768 wide
    "vocab_size": 49408,
    "hidden_size": POOLED,
    "intermediate_size": 2 * POOLED,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 77,
    "bos_token_id": 49406,
    "eos_token_id": 49407,
    "pad_token_id": 49407,
}
SCHEDULER: dict[str, Any] = {"shift": 3.0, "use_dynamic_shifting": True}  # as FLUX.1-dev has it


def checkpoint(folder: Path | None = None) -> Path:
    """The checkpoint, written where it isn't yet. The same bytes on every machine.

    Args:
        folder: Where it goes; without one, a folder of temporary files, to be found again by the next run.
    """
    return written(_make, NAME, repr((TRANSFORMER, VAE, T5, CLIP, SCHEDULER)), folder)


def written(make: Callable[[], DiffusionPipeline], name: str, shape: str, folder: Path | None) -> Path:
    """What ``make`` makes, written where it isn't yet.

    Args:
        name: Of the folder of temporary files, where none is given.
        shape: All that the weights depend on.
    """
    digest = hashlib.sha256(shape.encode()).hexdigest()[:12]
    folder = folder or Path(tempfile.gettempdir()) / f"stepbatch-{os.getuid()}-{digest}" / name
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as unfinished:
            make().save_pretrained(Path(unfinished) / name)
            (Path(unfinished) / name).rename(folder)  # so that a folder is there only when it is whole
    return folder


def _make() -> FluxPipeline:
    transformer, vae = FluxTransformer2DModel(**TRANSFORMER), AutoencoderKL(**VAE)
    clip, t5 = CLIPTextModel(CLIPTextConfig(**CLIP)), T5EncoderModel(T5Config(**T5))
    for seed, part in enumerate((transformer, vae, clip, t5)):
        randomize(part, seed)
    scheduler = FlowMatchEulerDiscreteScheduler(**SCHEDULER)
    return FluxPipeline(scheduler, vae, clip, clip_tokenizer(), t5, t5_tokenizer(), transformer)


if __name__ == "__main__":
    print(checkpoint(Path(sys.argv[1]) if len(sys.argv) > 1 else None))
