"""Small random checkpoints of pipelines of many kinds, in diffusers' layout.

Every part has random weights that matter, so that a picture depends on its prompt, its negative prompt, its seed and
the images that it is made from. A part has as few parameters as its architecture allows, and a step of a picture of
64x64 pixels takes milliseconds.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLLTXVideo,
    AutoencoderKLWan,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    LTXImageToVideoPipeline,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    PNDMScheduler,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

from stepbatch.models.stand_in import WORDS

VOCABULARY = 512  # bytes, and what is common in prompts
CLIP_WIDTH, T5_WIDTH = 32, 32
UNKNOWN = "<unknown>"  # a token that one tokenizer knows and its text encoder doesn't: a prompt with it raises there


def write(kind: str, folder: Path) -> Path:
    """The checkpoint of a kind, the same bytes every time."""
    torch.manual_seed(0)
    pipeline = KINDS[kind]()
    modules = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    for seed, part in enumerate(modules, start=1):
        randomize(part, seed)
    pipeline.save_pretrained(folder)
    return folder


def randomize(module: torch.nn.Module, seed: int) -> None:
    """Give every parameter values that matter: gains near 1, weights that keep the size of what they multiply."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim < 2 or name.endswith("gamma"):
            is_gain = name.endswith(("weight", "gamma"))
            parameter.data = 1 + 0.1 * noise if is_gain else 0.1 * noise
        else:
            parameter.data = noise * (parameter.numel() / parameter.shape[0]) ** -0.5


@cache
def _vocabulary() -> Tokenizer:
    """Bytes, and pieces of the words of prompts, as GPT-2 and CLIP have them."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "</s>", "<unk>", "<bos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(WORDS.read_text().splitlines(), trainer)
    return inner


def _tokenizer(template: str, longest: int) -> PreTrainedTokenizerFast:
    """The vocabulary with the special tokens of a template, at most ``longest`` tokens long."""
    inner = Tokenizer.from_str(_vocabulary().to_str())
    special = [(token, inner.token_to_id(token)) for token in ("<bos>", "</s>") if token in template]
    inner.post_processor = processors.TemplateProcessing(template, special_tokens=special)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, model_max_length=longest, bos_token="<bos>", eos_token="</s>", unk_token="<unk>",
        pad_token="</s>" if longest == 77 else "<pad>", clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


def clip_tokenizer() -> PreTrainedTokenizerFast:
    return _tokenizer("<bos> $A </s>", 77)


def t5_tokenizer() -> PreTrainedTokenizerFast:
    return _tokenizer("$A </s>", 512)


def gemma_tokenizer() -> PreTrainedTokenizerFast:
    return _tokenizer("<bos> $A", 8192)


def _clip_config(width: int = CLIP_WIDTH) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=VOCABULARY, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=3,
        num_attention_heads=2, max_position_embeddings=77, projection_dim=width, bos_token_id=3, eos_token_id=1,
        pad_token_id=1, hidden_act="quick_gelu",
    )  # fmt: skip


def _t5_values() -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY, "d_model": T5_WIDTH, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2,
        "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "pad_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip


def t5() -> T5EncoderModel:
    return T5EncoderModel(T5Config(**_t5_values()))


def vae(channels: int = 4, **values: Any) -> AutoencoderKL:
    """One that makes 4x4 pixels of a latent."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 16, 16), latent_channels=channels, norm_num_groups=4, layers_per_block=1, sample_size=64,
        **values,
    )  # fmt: skip


def unet(in_channels: int = 4, **values: Any) -> UNet2DConditionModel:
    usual: dict[str, Any] = {
        "sample_size": 16, "layers_per_block": 1, "block_out_channels": (16, 32), "norm_num_groups": 4,
        "cross_attention_dim": CLIP_WIDTH, "attention_head_dim": 2,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }  # fmt: skip
    return UNet2DConditionModel(in_channels=in_channels, out_channels=4, **usual | values)


NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


def stable_diffusion() -> DiffusionPipeline:
    scheduler = PNDMScheduler(**NOISE, skip_prk_steps=True, set_alpha_to_one=False)
    words = clip_tokenizer()
    words.add_tokens([UNKNOWN])
    return StableDiffusionPipeline(
        vae(), CLIPTextModel(_clip_config()), words, unet(), scheduler, None, None, requires_safety_checker=False
    )  # fmt: skip


def inpaint() -> DiffusionPipeline:
    scheduler = PNDMScheduler(**NOISE, skip_prk_steps=True, set_alpha_to_one=False)
    return StableDiffusionInpaintPipeline(
        vae(), CLIPTextModel(_clip_config()), clip_tokenizer(), unet(9), scheduler, None, None,
        requires_safety_checker=False,
    )  # fmt: skip


def instruct_pix2pix() -> DiffusionPipeline:
    return StableDiffusionInstructPix2PixPipeline(
        vae(), CLIPTextModel(_clip_config()), clip_tokenizer(), unet(8), EulerAncestralDiscreteScheduler(**NOISE), None,
        None, requires_safety_checker=False,
    )  # fmt: skip


def stable_diffusion_xl() -> DiffusionPipeline:
    both = unet(
        cross_attention_dim=2 * CLIP_WIDTH, addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + CLIP_WIDTH, transformer_layers_per_block=(1, 2),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4), use_linear_projection=True,
    )  # fmt: skip
    encoders = CLIPTextModel(_clip_config()), CLIPTextModelWithProjection(_clip_config())
    scheduler = EulerDiscreteScheduler(**NOISE, timestep_spacing="leading")
    return StableDiffusionXLPipeline(vae(), *encoders, clip_tokenizer(), clip_tokenizer(), both, scheduler)


def stable_diffusion_3() -> DiffusionPipeline:
    transformer = SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=8, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=2 * CLIP_WIDTH, caption_projection_dim=32, pooled_projection_dim=2 * CLIP_WIDTH,
        out_channels=8, pos_embed_max_size=24, dual_attention_layers=(0,), qk_norm="rms_norm",
    )  # fmt: skip
    wide = T5EncoderModel(T5Config(**_t5_values() | {"d_model": 2 * CLIP_WIDTH}))
    encoders = [CLIPTextModelWithProjection(_clip_config()) for _ in range(2)]
    parts = vae(8, shift_factor=0.06, use_quant_conv=False, use_post_quant_conv=False)
    return StableDiffusion3Pipeline(
        transformer, FlowMatchEulerDiscreteScheduler(shift=3.0), parts, encoders[0], clip_tokenizer(), encoders[1],
        clip_tokenizer(), wide, t5_tokenizer(),
    )  # fmt: skip


def pixart_sigma() -> DiffusionPipeline:
    transformer = PixArtTransformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, out_channels=8, num_layers=2, num_attention_heads=2,
        attention_head_dim=16, cross_attention_dim=32, caption_channels=T5_WIDTH, use_additional_conditions=False,
    )  # fmt: skip
    scheduler = DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02, solver_order=2)
    return PixArtSigmaPipeline(t5_tokenizer(), t5(), vae(), transformer, scheduler)


def sana() -> DiffusionPipeline:
    transformer = SanaTransformer2DModel(
        sample_size=16, patch_size=1, in_channels=4, out_channels=4, num_layers=2, num_attention_heads=2,
        attention_head_dim=16, num_cross_attention_heads=2, cross_attention_head_dim=16, cross_attention_dim=32,
        caption_channels=16,
    )  # fmt: skip
    text = Gemma2Config(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, pad_token_id=0, eos_token_id=1, bos_token_id=3, query_pre_attn_scalar=8,
    )  # fmt: skip
    autoencoder = AutoencoderDC(
        in_channels=3, latent_channels=4, attention_head_dim=4,
        encoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"), encoder_block_out_channels=(8, 8, 16),
        decoder_block_out_channels=(8, 8, 16), encoder_qkv_multiscales=((), (), (5,)),
        decoder_qkv_multiscales=((), (), (5,)), encoder_layers_per_block=(1, 1, 1), decoder_layers_per_block=(1, 1, 1),
        downsample_block_type="conv", upsample_block_type="interpolate", decoder_norm_types="rms_norm",
        decoder_act_fns="silu", scaling_factor=0.41407,
    )  # fmt: skip
    scheduler = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    return SanaPipeline(gemma_tokenizer(), Gemma2Model(text), autoencoder, transformer, scheduler)


def flux() -> DiffusionPipeline:
    transformer = FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=24, num_attention_heads=2,
        joint_attention_dim=T5_WIDTH, pooled_projection_dim=CLIP_WIDTH, guidance_embeds=True, axes_dims_rope=(8, 8, 8),
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    parts = vae(shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False)
    clip = CLIPTextModel(_clip_config())
    return FluxPipeline(scheduler, parts, clip, clip_tokenizer(), t5(), t5_tokenizer(), transformer)


def _ltx_parts() -> dict[str, Any]:
    transformer = LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, patch_size=1, patch_size_t=1, num_attention_heads=2, attention_head_dim=16,
        cross_attention_dim=32, num_layers=2, caption_channels=T5_WIDTH,
    )  # fmt: skip
    video = AutoencoderKLLTXVideo(
        in_channels=3, out_channels=3, latent_channels=8, block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8), layers_per_block=(1,) * 5, decoder_layers_per_block=(1,) * 5,
        spatio_temporal_scaling=(True, True, True, False), decoder_spatio_temporal_scaling=(True, True, True, False),
        decoder_inject_noise=(False,) * 5, upsample_residual=(False,) * 4, upsample_factor=(1,) * 4,
        timestep_conditioning=False, patch_size=4, patch_size_t=1, encoder_causal=True, decoder_causal=False,
    )  # fmt: skip
    return {
        "scheduler": FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, shift_terminal=0.1,
            base_image_seq_len=1024, max_image_seq_len=4096,
        ),
        "vae": video, "text_encoder": t5(), "tokenizer": t5_tokenizer(), "transformer": transformer,
    }  # fmt: skip


def ltx() -> DiffusionPipeline:
    return LTXPipeline(**_ltx_parts())


def ltx_image_to_video() -> DiffusionPipeline:
    return LTXImageToVideoPipeline(**_ltx_parts())


def wan() -> DiffusionPipeline:
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=8, out_channels=8,
        text_dim=T5_WIDTH, freq_dim=32, ffn_dim=32, num_layers=2, cross_attn_norm=True,
        qk_norm="rms_norm_across_heads", rope_max_seq_len=64,
    )  # fmt: skip
    video = AutoencoderKLWan(
        base_dim=4, z_dim=8, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.1 * i for i in range(8)], latents_std=[1.0 + 0.1 * i for i in range(8)],
    )  # fmt: skip
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=3.0
    )
    text = UMT5EncoderModel(UMT5Config(**_t5_values()))
    return WanPipeline(t5_tokenizer(), text, video, scheduler, transformer)


KINDS: dict[str, Callable[[], DiffusionPipeline]] = {
    "stable-diffusion": stable_diffusion,
    "stable-diffusion-xl": stable_diffusion_xl,
    "stable-diffusion-3": stable_diffusion_3,
    "pixart-sigma": pixart_sigma,
    "sana": sana,
    "flux": flux,
    "inpaint": inpaint,
    "instruct-pix2pix": instruct_pix2pix,
    "wan": wan,
    "ltx": ltx,
    "ltx-image-to-video": ltx_image_to_video,
}
