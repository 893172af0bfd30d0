"""The one table of defaults: what a request gets where it says nothing, by model.

A checkpoint's class doesn't tell a distilled model from its base, so known models are told by name, and renamed copies
of them by a setting that differs. ``stepbatch.json`` beside ``model_index.json`` overrides any of it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stepbatch.config import DefaultsConfig
from stepbatch.errors import CheckpointError, OptionError
from stepbatch.model_info import Defaults

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
LIMITS = {"min_side": 1, "max_side": 2048}  # pixels


def settings(name: str, folder: Path, pipeline: str, shift: float) -> dict[str, Any]:
    """The defaults and limits of a checkpoint as one dict: the table's, then its overrides file's.

    Raises:
        CheckpointError: the overrides file is not valid.
    """
    table = BY_NAME.get(name.lower(), BY_NOISE_SCHEDULE.get((pipeline, shift), {}))
    return LIMITS | BY_PIPELINE[pipeline] | table | _overrides(folder / OVERRIDES_FILE)


def _overrides(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        values = json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    known = {*LIMITS, *Defaults.__struct_fields__}
    if not isinstance(values, dict) or not known >= values.keys():
        raise CheckpointError(f"{path} may set only {', '.join(sorted(known))}")
    return values


def make_defaults(values: Mapping[str, Any], flags: DefaultsConfig) -> Defaults:
    """Defaults from a checkpoint's settings and, over them, the command line's.

    Raises:
        OptionError: ``--default-size`` is not WIDTHxHEIGHT.
    """
    fields = {k: v for k, v in values.items() if k in Defaults.__struct_fields__}
    if flags.default_size:
        sides = flags.default_size.lower().split("x")
        if len(sides) != 2 or not all(s.isascii() and s.isdigit() for s in sides):
            raise OptionError(f"--default-size must be WIDTHxHEIGHT, not {flags.default_size}")
        fields["width"], fields["height"] = map(int, sides)
    if flags.default_num_inference_steps:
        fields["num_inference_steps"] = flags.default_num_inference_steps
    if flags.default_guidance_scale is not None:
        fields["guidance_scale"] = flags.default_guidance_scale
    if flags.default_negative_prompt is not None:
        fields["negative_prompt"] = flags.default_negative_prompt
    return Defaults(**fields)
