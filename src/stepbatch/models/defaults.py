"""The one table of defaults: what a request gets where it says nothing, by model.

A checkpoint's class doesn't tell a distilled model from its base, so known models are told by name, and renamed copies
of them by a setting that differs. ``stepbatch.json`` beside ``model_index.json`` overrides any of it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from stepbatch.config import DefaultsConfig
from stepbatch.errors import CheckpointError, InvalidValue, OptionError
from stepbatch.model_info import Defaults
from stepbatch.sizes import parse_size

TURBO = {"num_inference_steps": 9, "guidance_scale": 0.0}

BY_NAME: dict[str, dict[str, Any]] = {
    "z-image-turbo": TURBO,
    "z-image": {"num_inference_steps": 50, "guidance_scale": 5.0},
}
BY_PIPELINE: dict[str, dict[str, Any]] = {
    "ZImagePipeline": {"width": 1024, "height": 1024, "num_inference_steps": 50, "guidance_scale": 5.0},
}
BY_NOISE_SCHEDULE: dict[tuple[str, float], dict[str, Any]] = {
    ("ZImagePipeline", 3.0): TURBO,  # the base model's shift is 6
}

OVERRIDES_FILE = "stepbatch.json"


class Settings(Defaults, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the table or the overrides file may say of a checkpoint."""

    min_side: int = 1  # pixels
    max_side: int = 2048  # pixels


def settings(name: str, folder: Path, pipeline: str, shift: float, longest_side: int, longest_prompt: int) -> Settings:
    """The defaults and limits of a checkpoint: the table's, as far as its architecture reaches, then its overrides.

    Raises:
        CheckpointError: the overrides file is not valid.
    """
    table = BY_NAME.get(name.lower(), BY_NOISE_SCHEDULE.get((pipeline, shift), {}))
    known = BY_PIPELINE[pipeline] | table | {"max_sequence_length": min(512, longest_prompt)}
    path = folder / OVERRIDES_FILE
    try:
        overrides = msgspec.json.decode(path.read_bytes(), type=dict[str, Any]) if path.exists() else {}
        values = msgspec.convert(known | overrides, Settings)
    except (msgspec.MsgspecError, OSError) as error:
        raise CheckpointError(f"{path} can't be used: {error}") from error
    longest = min(values.max_side, longest_side)
    sides = {side: min(known[side], longest) for side in ("width", "height") if side not in overrides}
    return msgspec.structs.replace(values, **sides)


def make_defaults(values: Settings, flags: DefaultsConfig) -> Defaults:
    """Defaults from a checkpoint's settings and, over them, the command line's.

    Raises:
        OptionError: ``--default-size`` is not WIDTHxHEIGHT.
    """
    fields = {name: getattr(values, name) for name in Defaults.__struct_fields__}
    if flags.default_size:
        try:
            fields["width"], fields["height"] = parse_size(flags.default_size.lower())
        except InvalidValue as error:
            raise OptionError(f"--default-size must be WIDTHxHEIGHT, not {flags.default_size}") from error
    if flags.default_num_inference_steps:
        fields["num_inference_steps"] = flags.default_num_inference_steps
    if flags.default_guidance_scale is not None:
        fields["guidance_scale"] = flags.default_guidance_scale
    if flags.default_negative_prompt is not None:
        fields["negative_prompt"] = flags.default_negative_prompt
    return Defaults(**fields)
