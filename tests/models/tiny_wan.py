"""Small random checkpoints of Wan in the layouts of real ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from tests.models.tiny import randomize
from tests.models.tiny_flux import t5_tokenizer
from transformers import UMT5Config, UMT5EncoderModel


def wan(folder: Path, networks: int = 1, scheduler: Any = None, **config: Any) -> Path:
    """A ``WanPipeline`` of 0.4 M parameters, the last of two networks for the steps below two thirds of the time."""
    torch.manual_seed(0)
    parts = {"transformer": transformer(1), "transformer_2": transformer(2) if networks == 2 else None}
    text = UMT5EncoderModel(
        UMT5Config(
            vocab_size=100, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu",
            tie_word_embeddings=False, pad_token_id=0, eos_token_id=1,
        )
    )  # fmt: skip
    vae = AutoencoderKLWan(base_dim=4, z_dim=4, num_res_blocks=1, latents_mean=[0.1] * 4, latents_std=[2.0] * 4)
    randomize(text, 3)
    boundary = {"boundary_ratio": 0.66} if networks == 2 else {}
    made = WanPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=text,
        vae=vae,
        scheduler=scheduler or unipc(),
        **parts,
        **boundary | config,
    )
    made.save_pretrained(folder)
    return folder


def transformer(seed: int) -> WanTransformer3DModel:
    made = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=24,
        in_channels=4,
        out_channels=4,
        text_dim=32,
        freq_dim=32,
        ffn_dim=96,
        num_layers=2,
        rope_max_seq_len=64,
    )
    randomize(made, seed)
    return made


def unipc(**config: Any) -> UniPCMultistepScheduler:
    """As in the real ones."""
    known = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    return UniPCMultistepScheduler(**known | config)
