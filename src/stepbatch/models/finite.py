"""Infinite values become NaN where they are made: whatever clamps them later would make them black or white pixels."""

from __future__ import annotations

import math
from typing import Any

import torch
from diffusers import ModelMixin, UNet2DConditionModel
from torch import nn


def mark_infinite(part: nn.Module) -> None:
    """Have the decoder of a VAE give NaN wherever it makes something that isn't finite; other parts stay as they are.

    So does a UNet, as there are pipelines whose UNet makes pixels. It costs one more pass over what they make, on the
    device, in place.
    """
    maker = part if isinstance(part, UNet2DConditionModel) else dict(part.named_children()).get("decoder")
    if isinstance(part, ModelMixin) and maker is not None:
        maker.register_forward_hook(_mark)


def _mark(maker: nn.Module, inputs: Any, output: Any) -> None:
    values = output if isinstance(output, torch.Tensor) else output[0]  # some give a cache besides
    values.nan_to_num_(nan=math.nan, posinf=math.nan, neginf=math.nan)
