"""Pipelines with exceptions: what is said of them is so, and diffusers has them."""

from __future__ import annotations

import inspect
import logging
from pathlib import Path

import diffusers
import pytest
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXImageToVideoPipeline,
    CogVideoXTransformer3DModel,
    CogView4Pipeline,
    CogView4Transformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusionPipeline,
)
from tests.models.pipelines import LONG, SHORT, ask, difference, draw, images, load, refiner, saved
from tests.pipelines.checkpoints import randomize, t5, t5_tokenizer, vae
from transformers import GlmConfig, GlmModel

from stepbatch.models.pipeline_table import NAMED, QUIRKS, RELATED, siblings

TOLERANCE = 2e-4

WANT_AN_IMAGE = {  # though it has a default: what they draw without one is not what they are for
    "BriaFiboEditPipeline", "Cosmos2VideoToWorldPipeline", "CosmosVideoToWorldPipeline", "HunyuanImageRefinerPipeline",
    "I2VGenXLPipeline", "JoyImageEditPipeline", "LDMSuperResolutionPipeline", "LTX2ImageToVideoPipeline",
    "LTXImageToVideoPipeline", "LongCatImageEditPipeline", "QwenImageEditPipeline", "QwenImageEditPlusPipeline",
    "QwenImageLayeredPipeline", "StableDiffusionAdapterPipeline", "StableDiffusionControlNetPAGPipeline",
    "StableDiffusionControlNetPipeline", "StableDiffusionControlNetXSPipeline",
    "StableDiffusionInstructPix2PixPipeline", "StableDiffusionLatentUpscalePipeline", "StableDiffusionUpscalePipeline",
    "StableDiffusionXLAdapterPipeline", "StableDiffusionXLControlNetPAGPipeline",
    "StableDiffusionXLControlNetPipeline", "StableDiffusionXLControlNetXSPipeline",
    "StableDiffusionXLInstructPix2PixPipeline", "StableUnCLIPImg2ImgPipeline", "UnCLIPImageVariationPipeline",
    "IFSuperResolutionPipeline", "VisualClozeGenerationPipeline", "VisualClozePipeline",
    "ZImageControlNetInpaintPipeline",
    "DiffusionGemmaPipeline", "UniDiffuserPipeline",  # make text of it
}  # fmt: skip


def test_diffusers_has_all_of_them() -> None:
    for name in [*QUIRKS, *(name for group in RELATED for name in group)]:
        assert getattr(diffusers, name).__name__ == name
    assert all(name == name.lower() for name in NAMED)


def test_where_an_image_may_be_left_out_it_is_known_whether_it_should() -> None:
    """The signatures don't say: ``image=None`` is also where prompts are for edits alone."""
    optional = set()
    for name in dir(diffusers):
        if not name.endswith("Pipeline") or name == "DiffusionPipeline":
            continue
        taken = inspect.signature(getattr(diffusers, name).__call__).parameters
        if "image" in taken and taken["image"].default is None and "strength" not in taken:
            optional.add(name)
    also_text = {name for name, quirks in QUIRKS.items() if quirks.also_text}
    assert len(optional) > 40
    assert not also_text & WANT_AN_IMAGE
    assert optional - also_text == WANT_AN_IMAGE
    assert also_text - optional == {"LTXConditionPipeline"}  # its strength is the condition's


def test_siblings_without_a_setting_of_the_checkpoint_are_not_taken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        pipeline = load(saved(refiner(), tmp_path))
    assert pipeline.info.tasks == ("image-to-image", "inpainting")
    assert "can't be run as a StableDiffusionXLPipeline: it has no setting requires_aesthetics_score" in caplog.text


def test_siblings() -> None:
    assert siblings(StableDiffusionPipeline) == ["StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline"]
    assert siblings(diffusers.LTXImageToVideoPipeline) == ["LTXPipeline"]
    assert siblings(diffusers.StableVideoDiffusionPipeline) == []


def test_prompts_whose_pads_are_seen_share_calls_with_their_like_only(tmp_path: Path) -> None:
    transformer = CogView4Transformer2DModel(
        patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2, out_channels=4,
        text_embed_dim=32, time_embed_dim=8, condition_dim=4,
    )  # fmt: skip
    text = GlmModel(
        GlmConfig(
            hidden_size=32, intermediate_size=8, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            head_dim=8, vocab_size=512, pad_token_id=0, eos_token_id=1,
        )
    )  # fmt: skip
    parts = vae()
    for seed, part in enumerate((transformer, text, parts)):
        randomize(part, seed)
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_image_seq_len=256)
    CogView4Pipeline(t5_tokenizer(), text, parts, transformer, scheduler).save_pretrained(tmp_path)
    pipeline = load(tmp_path)
    short, like, long = (ask(pipeline, prompt=p, seed=i) for i, p in enumerate((SHORT, "b cat", LONG)))
    assert pipeline.signature(short) == pipeline.signature(like) != pipeline.signature(long)
    alone = [draw(pipeline, request)[0] for request in (short, like)]
    assert difference(draw(pipeline, short, like), alone) < TOLERANCE
    assert difference(draw(pipeline, short, long)[:1], alone[:1]) > 0.1  # else it need not be in the table


def test_videos_of_fewer_lengths_than_the_vae_says_with_an_image_each(tmp_path: Path) -> None:
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=8, out_channels=4, time_embed_dim=2,
        text_embed_dim=32, num_layers=1, sample_width=16, sample_height=8, sample_frames=9, patch_size=2,
        temporal_compression_ratio=4,
        max_text_seq_length=226, use_rotary_positional_embeddings=True,
    )  # fmt: skip
    video = AutoencoderKLCogVideoX(
        in_channels=3, out_channels=3, down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4, block_out_channels=(8,) * 4, latent_channels=4, layers_per_block=1,
        norm_num_groups=2, temporal_compression_ratio=4,
    )  # fmt: skip
    text = t5()
    for seed, part in enumerate((transformer, video, text)):
        randomize(part, seed)
    CogVideoXImageToVideoPipeline(
        t5_tokenizer(), text, video, transformer, CogVideoXDDIMScheduler()
    ).save_pretrained(tmp_path)  # fmt: skip
    pipeline = load(tmp_path)
    assert (pipeline.info.tasks, pipeline.info.frames_multiple) == (("image-to-video",), 8)
    requests = [
        ask(pipeline, prompt=prompt, seed=i, images=images(48, 80, i), width=128, num_inference_steps=2)
        for i, prompt in enumerate((SHORT, LONG))
    ]
    together = draw(pipeline, *requests)
    assert difference(together, [draw(pipeline, request)[0] for request in requests]) < TOLERANCE
    assert difference(together[:1], together[1:]) > 0.05
