"""What a loaded model says of itself: limits, defaults, which guidance it knows. The server reads it, so no torch."""

from __future__ import annotations

import msgspec


class Defaults(msgspec.Struct, frozen=True, kw_only=True):
    """What a request gets where it says nothing."""

    width: int  # pixels
    height: int  # pixels
    num_inference_steps: int
    guidance_scale: float
    negative_prompt: str | None = None
    max_sequence_length: int = 512  # tokens of the prompt


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
