"""Small random checkpoints in the layouts of real ones."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3Model

CHAT = (
    "{% for m in messages %}<user> {{ m['content'] }} {% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of words, every unknown one the same token."""
    words = ["<pad>", "<unk>", "<user>", "<assistant>", *(f"w{i}" for i in range(96))]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>", chat_template=CHAT, model_max_length=512
    )


def randomize(module: torch.nn.Module, seed: int) -> None:
    """Give every parameter values that matter, pad tokens and biases too."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        fan = parameter.shape[-1] if parameter.ndim > 1 else 1
        is_norm = "norm" in name and parameter.ndim == 1 and name.endswith("weight")
        parameter.data = 1 + 0.1 * noise if is_norm else noise * (fan**-0.5 if parameter.ndim > 1 else 0.2)


def vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 8),
        latent_channels=4,
        norm_num_groups=4,
        layers_per_block=1,
        scaling_factor=0.5,
        shift_factor=0.1,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def z_image(folder: Path, dtype: torch.dtype = torch.float32, shift: float = 3.0, dynamic: bool = False) -> Path:
    """A ``ZImagePipeline`` of 0.3 M parameters."""
    torch.manual_seed(0)
    words = tokenizer()
    text = Qwen3Model(
        Qwen3Config(
            vocab_size=len(words),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
        )
    )
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=48,
        n_layers=2,
        n_refiner_layers=2,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=32,
        axes_dims=[8, 8, 8],
        axes_lens=[600, 64, 64],
    )
    randomize(transformer, 1)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift, use_dynamic_shifting=dynamic)
    pipeline = ZImagePipeline(scheduler, vae(), text, words, transformer)
    pipeline.to(dtype).save_pretrained(folder)
    return folder
