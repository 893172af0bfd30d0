"""Qwen-Image-Edit and Qwen-Image-Edit-Plus: Qwen-Image with references, which its text encoder looks at, too.

References ride in the sequence behind the picture. For the text encoder they are brought to a size of their own, and
their place in the prompt is filled with a token for each of the vision tower's rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from diffusers import QwenImageEditPipeline, QwenImageEditPlusPipeline
from PIL import Image
from transformers import Qwen2VLImageProcessorPil

from stepbatch.config import EngineConfig
from stepbatch.errors import CheckpointError, InvalidValue
from stepbatch.image import InputImage
from stepbatch.model_info import AutoSize, Task
from stepbatch.models.base import Prompt
from stepbatch.models.defaults import Settings
from stepbatch.models.qwen_image import QwenImage
from stepbatch.request import GenerationRequest
from stepbatch.sizes import of_area

MULTIPLE = 32  # of the sides that references are brought to, and of those chosen for the output, pixels
IMAGE = "<|image_pad|>"
PICTURE = f"Picture {{}}: <|vision_start|>{IMAGE}<|vision_end|>"
NARROWEST = 200  # how many times as long as wide a picture may be for the vision tower


class QwenImageEdit(QwenImage):
    """A loaded Qwen-Image-Edit checkpoint."""

    PIPELINE = QwenImageEditPipeline
    DEFAULTS = QwenImage.DEFAULTS | {"prompt_image_area": 1024 * 1024, "max_side": 4096}  # for long images
    TASKS: ClassVar[tuple[Task, ...]] = ("editing",)
    MAX_IMAGES: ClassVar = 1
    FOLLOWS: ClassVar[Literal["first", "last"]] = "first"  # the image that an output without a size takes after

    def __init__(self, config: EngineConfig, folder: Path) -> None:
        try:
            self.image_processor = Qwen2VLImageProcessorPil.from_pretrained(folder / "processor", local_files_only=True)
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointError(f"{folder / 'processor'} can't be loaded: {str(error).splitlines()[0]}") from error
        super().__init__(config, folder)
        self.trained_positions = config.model.image_positions == "trained"
        self.image_token: int = self.text_encoder.config.image_token_id

    def used_encoder(self, whole: Any) -> Any:
        return whole.model

    def about_images(self, values: Settings) -> dict[str, Any]:
        size = AutoSize(follows=self.FOLLOWS, area=values.reference_area, multiple=MULTIPLE)
        return {"max_images": self.MAX_IMAGES, "auto_size": size}

    def check(self, request: GenerationRequest) -> None:
        if any(max(size) > NARROWEST * min(size) for size in self._prompt_sizes(request.images)):
            raise InvalidValue(f"images must be at most {NARROWEST} times as long as wide", "images")
        for name, text in (("prompt", request.prompt), ("negative_prompt", request.negative_prompt)):
            if text is not None and IMAGE in text:
                raise InvalidValue(f"{name} must not contain {IMAGE}, which stands for an image", name)
        super().check(request)

    def prompt(self, text: str, request: GenerationRequest) -> Prompt:
        processor = self.image_processor
        sizes = self._prompt_sizes(request.images)
        counts = iter([processor.get_number_of_image_patches(h, w) // processor.merge_size**2 for w, h in sizes])
        ids: list[int] = []
        for token in self.tokenizer(self.template.format(self.before_text(len(sizes)) + text)).input_ids:
            ids += [token] * (next(counts) if token == self.image_token else 1)
        return Prompt((tuple(ids),), len(ids) - self.first, request.images)

    def prompt_tokens(self, prompt: Prompt) -> int:
        return super().prompt_tokens(prompt) - prompt.ids[0].count(self.image_token)

    def before_text(self, images: int) -> str:
        """What the user's text is preceded by; here the template has a place for the image already."""
        return ""

    def hidden(self, prompts: Sequence[Prompt], ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        encoder, is_image = self.text_encoder, ids == self.image_token
        images = [image for prompt in prompts for image in prompt.images]
        distinct = {image.digest: image for image in images}  # a negative prompt has those of its prompt
        patches, grids = zip(*(self._patches(image) for image in distinct.values()), strict=True)
        seen = encoder.get_image_features(torch.cat(patches), torch.stack(grids)).pooler_output
        seen_as, grid_of = dict(zip(distinct, seen, strict=True)), dict(zip(distinct, grids, strict=True))
        embedded = encoder.get_input_embeddings()(ids)
        embedded[is_image] = torch.cat([seen_as[image.digest] for image in images])
        positions = None  # they count on from token to token, images or not
        if self.trained_positions:
            positions, _ = encoder.get_rope_index(
                ids,
                mm_token_type_ids=is_image.int(),
                image_grid_thw=torch.stack([grid_of[image.digest] for image in images]),
                attention_mask=mask,
            )
        states: torch.Tensor = encoder.language_model(
            inputs_embeds=embedded, position_ids=positions, attention_mask=mask, use_cache=False
        ).last_hidden_state
        return states

    def image_sizes(self, request: GenerationRequest) -> list[tuple[int, int]]:
        area = self.settings.reference_area
        return [of_area(image.width, image.height, area, MULTIPLE) for image in request.images]

    def _prompt_sizes(self, images: Sequence[InputImage]) -> list[tuple[int, int]]:
        """Width and height that images are brought to for the text encoder."""
        area = self.settings.prompt_image_area
        return [of_area(image.width, image.height, area, MULTIPLE) for image in images]

    def _patches(self, image: InputImage) -> tuple[torch.Tensor, torch.Tensor]:
        """What the vision tower looks at, ``[N, C]``, and its grid ``[3]``: frames, rows, columns."""
        picture = Image.frombytes("RGB", (image.width, image.height), image.pixels)
        picture = picture.resize(self._prompt_sizes([image])[0], Image.Resampling.LANCZOS)
        made = self.image_processor(images=[picture], return_tensors="pt")
        return made["pixel_values"].to(self.device), made["image_grid_thw"][0].to(self.device)


class QwenImageEditPlus(QwenImageEdit):
    """A loaded Qwen-Image-Edit-2509 or -2511 checkpoint: several references, and small ones for the text encoder."""

    PIPELINE = QwenImageEditPlusPipeline
    DEFAULTS = QwenImageEdit.DEFAULTS | {"prompt_image_area": 384 * 384}
    NAMED: ClassVar[dict[str, dict[str, Any]]] = {
        f"qwen-image-edit-{version}": {"num_inference_steps": 40} for version in ("2509", "2511")
    }
    MAX_IMAGES = 10  # it was trained on up to three; none is too many for the architecture
    FOLLOWS = "last"

    def before_text(self, images: int) -> str:
        return "".join(PICTURE.format(i + 1) for i in range(images))
