"""Small random FLUX.1 checkpoints in the layouts of real ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FluxKontextPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
)
from tests.models.tiny import randomize, vae
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast, T5Config, T5EncoderModel

REFERENCE_AREA = 96 * 96
WORDS = [f"w{i}" for i in range(96)]


def flux(folder: Path, kind: Literal["dev", "schnell", "kontext"], dtype: torch.dtype = torch.float32) -> Path:
    """A checkpoint of 0.3 M parameters."""
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=24,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=24,
        guidance_embeds=kind != "schnell",
        axes_dims_rope=(8, 8, 8),
    )
    clip, t5 = clip_model(), t5_model()
    for seed, part in enumerate((transformer, clip, t5), start=1):
        randomize(part, seed)
    static = kind == "schnell"
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0 if static else 3.0, use_dynamic_shifting=not static)
    pipeline = FluxKontextPipeline if kind == "kontext" else FluxPipeline
    made = pipeline(scheduler, vae(), clip, clip_tokenizer(), t5, t5_tokenizer(), transformer)
    made.to(dtype).save_pretrained(folder)
    (folder / "stepbatch.json").write_text(json.dumps({"reference_area": REFERENCE_AREA}))
    return folder


def clip_model() -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=100,
            hidden_size=24,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=77,
            bos_token_id=0,
            eos_token_id=2,  # as in the real one: the highest token is meant
        )
    )


def t5_model() -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=100, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu",
            tie_word_embeddings=False, pad_token_id=0, eos_token_id=1,
        )
    )  # fmt: skip


def clip_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(["<unk>", *WORDS, "<|startoftext|>", "<|endoftext|>"])}
    inner = _tokenizer(vocabulary)
    special = [(token, vocabulary[token]) for token in ("<|startoftext|>", "<|endoftext|>")]
    inner.post_processor = processors.TemplateProcessing("<|startoftext|> $A <|endoftext|>", special_tokens=special)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, model_max_length=77, unk_token="<unk>", bos_token="<|startoftext|>",
        eos_token="<|endoftext|>", pad_token="<|endoftext|>",
    )  # fmt: skip


def t5_tokenizer() -> PreTrainedTokenizerFast:
    inner = _tokenizer({word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])})
    inner.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, model_max_length=512, unk_token="<unk>", eos_token="</s>", pad_token="<pad>"
    )


def _tokenizer(vocabulary: dict[str, int]) -> Tokenizer:
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return inner
