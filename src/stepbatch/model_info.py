"""What a loaded model says of itself: limits, defaults, which guidance it knows. The server reads it, so no torch."""

from __future__ import annotations

from typing import Literal

import msgspec

from stepbatch.image import InputImage
from stepbatch.sizes import nearest_shape, of_area, within

Task = Literal["text-to-image", "image-to-image", "inpainting", "editing", "text-to-video", "image-to-video"]


class Defaults(msgspec.Struct, frozen=True, kw_only=True):
    """What a request gets where it says nothing."""

    width: int  # pixels
    height: int  # pixels
    num_inference_steps: int
    num_frames: int | None = None  # of models that make videos
    fps: int | None = None  # likewise
    guidance_scale: float | None = None  # where the model uses it
    guidance_scale_2: float | None = None  # likewise
    true_cfg_scale: float | None = None  # likewise
    negative_prompt: str | None = None
    max_sequence_length: int = 512  # tokens of the prompt
    strength: float = 0.6  # of inpainting


class Guidance(msgspec.Struct, frozen=True, kw_only=True):
    """How classifier-free guidance is asked for: the field with its strength, and when there is any.

    Some pipelines guide only where there is a negative prompt. There, a request that gives the strength itself is
    guided away from the empty prompt.
    """

    field: Literal["guidance_scale", "true_cfg_scale"] = "guidance_scale"
    off: float = 0.0  # up to this strength there is none
    needs_negative: bool = False


class AutoSize(msgspec.Struct, frozen=True, kw_only=True):
    """How large the output is where a request has images and no size."""

    follows: Literal["first", "last"] = "first"  # which image's proportions
    area: int | None = None  # pixels; without it, as many as the image has
    multiple: int = 1  # of the sides, where there is an area
    shapes: tuple[tuple[int, int], ...] = ()  # if there are any, the one of the nearest proportions is taken

    def of(self, images: tuple[InputImage, ...], longest: int, multiple: int) -> tuple[int, int]:
        """Width and height for these images, where the model takes multiples of ``multiple`` up to ``longest``."""
        image = images[0 if self.follows == "first" else -1]
        if self.shapes:
            return nearest_shape(image.width, image.height, self.shapes)
        if self.area:
            return within(*of_area(image.width, image.height, self.area, self.multiple), longest, self.multiple)
        return within(image.width, image.height, longest, multiple)


class Sizing(msgspec.Struct, frozen=True, kw_only=True):
    """How many tokens the sequences of a step have, as nearly as it can be told without a tokenizer.

    The engine counts them (``Runner.lengths``); what predicts in another process goes by this.
    """

    token: int = 16  # sides of a token, pixels
    frame: int = 1  # how many frames a latent frame stands for; the first stands for one
    multiple: int = 1  # that the tokens of a prompt, and those of a picture, are filled up to
    prompt: float = 0.0  # tokens that any prompt adds to its sequence
    character: float = 0.0  # tokens that each character of it adds
    longest: bool = False  # a prompt is filled up to max_sequence_length instead
    image: int | None = None  # tokens that an image which is edited adds; without it, as many as the output has
    whole_calls: bool = False  # all steps are one call, in which a request has one sequence, of pictures alone

    def picture(self, width: int, height: int, frames: int) -> int:
        """Tokens of a picture, or of a video of so many frames."""
        area = height * width // self.token**2 if self.whole_calls else height // self.token * (width // self.token)
        return self._filled_up(max(1, area) * ((frames - 1) // self.frame + 1))

    def text(self, prompt: str, max_sequence_length: int) -> int:
        """Tokens that a prompt adds to its sequence."""
        if self.longest:
            return max_sequence_length
        return self._filled_up(round(self.prompt + self.character * len(prompt)))

    def _filled_up(self, tokens: int) -> int:
        return -(-tokens // self.multiple) * self.multiple


class ModelInfo(msgspec.Struct, frozen=True, kw_only=True):
    """The model that an engine serves."""

    id: str  # the name that clients use: --served-model-name, else the checkpoint's folder or repository name
    path: str
    pipeline: str  # class name in model_index.json
    device: str
    dtype: str
    size_multiple: int  # width and height are multiples of this, pixels
    min_side: int  # pixels
    max_side: int  # pixels
    max_sequence_length: int  # the longest prompt that can be asked for, tokens
    defaults: Defaults
    uses: tuple[str, ...] = ()  # which optional fields of a request mean something to this model
    tasks: tuple[Task, ...] = ("text-to-image",)
    max_images: int = 1  # that a request may bring, where a task takes any
    guidance: Guidance = Guidance()
    auto_size: AutoSize = AutoSize()
    frames_multiple: int = 1  # a video has one frame more than a multiple of this
    max_frames: int = 1
    sizing: Sizing = Sizing()

    @property
    def makes_videos(self) -> bool:
        """Whether outputs are videos; no model makes both them and pictures."""
        return any(task.endswith("-video") for task in self.tasks)
