"""Small random checkpoints of the Qwen-Image family, and what diffusers needs to run those that edit."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from tests.models.tiny import randomize
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers
from transformers import (
    BatchFeature,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
)

SPECIAL = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"),
    *("<|image_pad|>", "<|video_pad|>"),
)
VISION = {"patch_size": 4, "temporal_patch_size": 2}
PIXELS = {"shortest_edge": 256, "longest_edge": 64 * 64}  # between these, pictures keep their size for the vision tower
REFERENCE_AREA = 96 * 64
PROMPT_AREA = {"QwenImageEditPipeline": REFERENCE_AREA, "QwenImageEditPlusPipeline": 40 * 40}


def tokenizer() -> PreTrainedTokenizerFast:
    """Words, marks and line ends: the templates' prefixes have as many tokens as the real tokenizer makes of them."""
    words = [*SPECIAL, "<unk>", "\n", *(f"w{i}" for i in range(96))]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\n|'s|\w+|[^\w\s]+"), behavior="isolated"),
            pre_tokenizers.Split(" ", behavior="removed"),
        ]
    )
    inner.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<|endoftext|>", unk_token="<unk>", model_max_length=4096
    )


def text_encoder(words: PreTrainedTokenizerFast) -> Qwen2_5_VLForConditionalGeneration:
    """Two heads of 16, in the vision tower, too, whose first block sees windows only."""
    encoder = Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config={
                "vocab_size": len(words),
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 3,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "max_position_embeddings": 4096,
                "bos_token_id": None,
                "eos_token_id": None,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
            },
            vision_config={
                "depth": 2,
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_heads": 2,
                "window_size": 16,
                "out_hidden_size": 32,
                "fullatt_block_indexes": [1],
                **VISION,
            },
            **{
                f"{kind}_token_id": words.convert_tokens_to_ids(f"<|{name}|>")
                for kind, name in (
                    ("image", "image_pad"),
                    ("video", "video_pad"),
                    ("vision_start", "vision_start"),
                    ("vision_end", "vision_end"),
                )
            },
        )
    )
    randomize(encoder, 3)
    return encoder.eval()


def vae() -> AutoencoderKLQwenImage:
    """Three levels, so that a latent pixel has sides of 8."""
    made = AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 2, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[-0.7, 0.1, 0.4, -0.2],
        latents_std=[2.8, 1.5, 0.6, 1.2],
    )
    randomize(made, 4)
    return made


def transformer(**config: Any) -> QwenImageTransformer2DModel:
    made = QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=24,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(8, 8, 8),
        **config,
    )
    randomize(made, 5)
    return made


def scheduler() -> FlowMatchEulerDiscreteScheduler:
    """The real checkpoints' settings."""
    return FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=0.9,
        base_image_seq_len=256,
        max_image_seq_len=8192,
        shift_terminal=0.02,
        time_shift_type="exponential",
    )


def qwen_image(folder: Path, pipeline: Any = QwenImagePipeline, **config: Any) -> Path:
    """A checkpoint of 0.3 M parameters of one of the family's pipelines; ``config`` is of the transformer."""
    words = tokenizer()
    parts = {
        "scheduler": scheduler(),
        "vae": vae(),
        "text_encoder": text_encoder(words),
        "tokenizer": words,
        "transformer": transformer(**config),
    }
    if pipeline in (QwenImageEditPipeline, QwenImageEditPlusPipeline):
        parts["processor"] = None
    pipeline(**parts).save_pretrained(folder)
    if "processor" in parts:
        _add_processor(folder)
    return folder


def _add_processor(folder: Path) -> None:
    """The part as it lies in real checkpoints, whose class needs torchvision; and areas that suit small models."""
    Qwen2VLImageProcessorPil(size=PIXELS, **VISION).save_pretrained(folder / "processor")
    index = json.loads((folder / "model_index.json").read_text())
    index["processor"] = ["transformers", "Qwen2VLProcessor"]
    (folder / "model_index.json").write_text(json.dumps(index))
    areas = {"reference_area": REFERENCE_AREA, "prompt_image_area": PROMPT_AREA[index["_class_name"]]}
    (folder / "stepbatch.json").write_text(json.dumps(areas))


class Processor:
    """What diffusers calls: ``Qwen2VLProcessor``, as far as it is used, of parts that need no torchvision."""

    def __init__(self, folder: Path, words: Any) -> None:
        self.words = words
        self.pictures = Qwen2VLImageProcessorPil.from_pretrained(folder / "processor")

    def __call__(self, text: list[str], images: Any, padding: bool, return_tensors: str) -> BatchFeature:
        seen = self.pictures(images=images, return_tensors=return_tensors)
        counts = iter(seen["image_grid_thw"].prod(dim=1) // self.pictures.merge_size**2)
        pad = "<|image_pad|>"
        expanded = [re.sub(re.escape(pad), lambda _: pad * int(next(counts)), each) for each in text]
        return BatchFeature({**self.words(expanded, padding=padding, return_tensors=return_tensors), **seen})


def diffusers_editor(cls: Any, folder: Path, trained: bool = False) -> Any:
    """Diffusers' pipeline of an editing checkpoint.

    It leaves out, of what the processor returns, which tokens are images (huggingface/diffusers#14194). Without that,
    transformers gives them other positions than those that the model was ``trained`` with.
    """
    pipeline = cls.from_pretrained(folder, processor=None)
    pipeline.processor = Processor(folder, pipeline.tokenizer)
    if trained:
        encoder = pipeline.text_encoder
        forward, image = encoder.forward, encoder.config.image_token_id
        encoder.forward = lambda **given: forward(mm_token_type_ids=(given["input_ids"] == image).int(), **given)
    return pipeline
