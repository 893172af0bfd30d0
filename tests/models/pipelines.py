"""Pipelines of small random checkpoints for the tests here, and what they draw as floats."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    IFPipeline,
    KandinskyV22Pipeline,
    LattePipeline,
    LatteTransformer3DModel,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    MarigoldDepthPipeline,
    StableDiffusionXLImg2ImgPipeline,
    UNet2DConditionModel,
    VQModel,
)
from tests.models.parity import picture
from tests.pipelines.checkpoints import (
    CLIP_WIDTH,
    VOCABULARY,
    _clip_config,
    clip_tokenizer,
    gemma_tokenizer,
    randomize,
    t5,
    t5_tokenizer,
    unet,
    vae,
    write,
)
from transformers import CLIPTextModel, CLIPTextModelWithProjection, Gemma2Config, Gemma2Model

from stepbatch.config import EngineConfig, ModelConfig
from stepbatch.errors import RequestError
from stepbatch.image import InputImage
from stepbatch.models.pipeline import Pipeline
from stepbatch.request import GenerationRequest

SHORT, LONG = (
    "a cat",
    "a very long prompt about a dog that runs in the park, in the evening, with a red ball and a friend",
)


def checkpoint(kind: str, folder: Path) -> Path:
    """One of ``tests.pipelines``, made once in a folder for all tests."""
    path = folder / kind
    return path if path.exists() else write(kind, path)


def load(path: Path, **model: Any) -> Pipeline:
    return Pipeline(EngineConfig(model=ModelConfig(model_path=str(path), backend="diffusers", **model)), path)


def ask(pipeline: Pipeline, **fields: Any) -> GenerationRequest:
    """A small resolved request."""
    usual: dict[str, Any] = {"prompt": SHORT, "width": 64, "height": 64, "num_inference_steps": 3, "seed": 0}
    if pipeline.info.makes_videos:
        usual["num_frames"] = pipeline.info.frames_multiple + 1
    return GenerationRequest(**usual | fields).resolve(pipeline.info)


def draw(
    pipeline: Pipeline, *requests: GenerationRequest, tick: Callable[[int, int], None] = lambda step, steps: None
) -> list[torch.Tensor]:
    """What a call for these draws, fp32 ``[F, H, W, 3]`` each."""
    drawn = []
    with torch.inference_mode():
        for outcome in pipeline.draw(requests, [request.seed or 0 for request in requests], tick):
            assert not isinstance(outcome, RequestError), outcome
            drawn.append(outcome)
    return drawn


def difference(ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]) -> float:
    """The largest of any value."""
    return max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))


def images(width: int = 48, height: int = 80, seed: int = 0) -> tuple[InputImage]:
    return (picture(width, height, seed),)


def saved(pipeline: DiffusionPipeline, folder: Path) -> Path:
    """Its checkpoint, with weights that are all random."""
    parts = (part for part in pipeline.components.values() if isinstance(part, torch.nn.Module))
    for seed, part in enumerate(parts):
        randomize(part, seed)
    pipeline.save_pretrained(folder)
    return folder


def latte() -> DiffusionPipeline:
    transformer = LatteTransformer3DModel(
        sample_size=8, num_layers=1, patch_size=2, attention_head_dim=16, num_attention_heads=2, caption_channels=32,
        in_channels=4, cross_attention_dim=32, out_channels=8, attention_bias=True, activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000, norm_type="ada_norm_single", norm_elementwise_affine=False,
    )  # fmt: skip
    return LattePipeline(t5_tokenizer(), t5(), vae(), transformer, DDIMScheduler())


def deep_floyd() -> DiffusionPipeline:
    network = UNet2DConditionModel(
        sample_size=32, layers_per_block=1, block_out_channels=(16, 32), norm_num_groups=4, in_channels=3,
        out_channels=6, cross_attention_dim=32, attention_head_dim=2, encoder_hid_dim=32,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    scheduler = DDPMScheduler(variance_type="learned_range", thresholding=True, beta_schedule="squaredcos_cap_v2")
    return IFPipeline(t5_tokenizer(), t5(), network, scheduler, None, None, None, requires_safety_checker=False)


def kandinsky_decoder() -> DiffusionPipeline:
    network = UNet2DConditionModel(
        in_channels=4, out_channels=8, addition_embed_type="image", block_out_channels=(32, 64), layers_per_block=1,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"), encoder_hid_dim=32,
        mid_block_type="UNetMidBlock2DSimpleCrossAttn", encoder_hid_dim_type="image_proj", cross_attention_dim=32,
        attention_head_dim=4, resnet_time_scale_shift="scale_shift",
    )  # fmt: skip
    codes = VQModel(latent_channels=4, block_out_channels=(32,), norm_num_groups=8, num_vq_embeddings=12)
    return KandinskyV22Pipeline(network, DDIMScheduler(), codes)


def marigold() -> DiffusionPipeline:
    text = CLIPTextModel(_clip_config())
    return MarigoldDepthPipeline(unet(8), vae(), DDIMScheduler(), text, clip_tokenizer(), default_denoising_steps=2)


def refiner() -> DiffusionPipeline:
    network = unet(
        cross_attention_dim=CLIP_WIDTH, addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=5 * 8 + CLIP_WIDTH, transformer_layers_per_block=(1, 2),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4), use_linear_projection=True,
    )  # fmt: skip
    text = CLIPTextModelWithProjection(_clip_config())
    return StableDiffusionXLImg2ImgPipeline(
        vae(), None, text, None, clip_tokenizer(), network, EulerDiscreteScheduler(), requires_aesthetics_score=True
    )


def lumina2() -> DiffusionPipeline:
    transformer = Lumina2Transformer2DModel(
        sample_size=4, patch_size=2, in_channels=4, hidden_size=24, num_layers=1, num_attention_heads=1,
        num_kv_heads=1, multiple_of=16, axes_dim_rope=(8, 8, 8), cap_feat_dim=16,
    )  # fmt: skip
    text = Gemma2Config(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, pad_token_id=0, eos_token_id=1, bos_token_id=3,
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler()
    pixels = AutoencoderKL(  # that halves thrice, as the pipeline takes for granted
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 16, 16), latent_channels=4, norm_num_groups=4, sample_size=64, shift_factor=0.1,
    )  # fmt: skip
    return Lumina2Pipeline(transformer, scheduler, pixels, Gemma2Model(text), gemma_tokenizer())
