"""What a request gets where it says nothing: a family's table, a checkpoint's own file, the command line's flags.

``stepbatch.json`` beside ``model_index.json`` overrides any of the family's table, and the flags go before both.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from stepbatch.config import DefaultsConfig
from stepbatch.errors import CheckpointError, InvalidValue, OptionError
from stepbatch.model_info import Defaults
from stepbatch.sizes import parse_size

OVERRIDES_FILE = "stepbatch.json"


Pixels = Annotated[int, Meta(ge=1)]
Area = Annotated[int, Meta(ge=32 * 32)]


class Settings(Defaults, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the table or the overrides file may say of a checkpoint."""

    strength: Annotated[float, Meta(gt=0, le=1)] = 0.6
    min_side: Pixels = 1
    max_side: Pixels = 2048
    max_frames: Annotated[int, Meta(ge=1)] | None = None  # without it, what the architecture reaches
    reference_area: Area = 1024 * 1024  # what an editing model's references are brought to for the VAE, pixels
    prompt_image_area: Area = 384 * 384  # likewise, for a text encoder that sees them


def settings(known: dict[str, Any], folder: Path, longest_side: int, longest_prompt: int) -> Settings:
    """The defaults and limits of a checkpoint: its family's, as far as its architecture reaches, then its overrides.

    Raises:
        CheckpointError: the overrides file is not valid.
    """
    known = known | {"max_sequence_length": min(known.get("max_sequence_length", 512), longest_prompt)}
    path = folder / OVERRIDES_FILE
    try:
        overrides = msgspec.json.decode(path.read_bytes(), type=dict[str, Any]) if path.exists() else {}
        if nulls := [name for name, value in overrides.items() if value is None and known.get(name) is not None]:
            raise msgspec.ValidationError(f"{nulls[0]} must not be null")
        values = msgspec.convert(known | overrides, Settings)
        if not 1 <= values.max_sequence_length <= longest_prompt:
            raise msgspec.ValidationError(f"max_sequence_length must be from 1 to {longest_prompt}")
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
    for name in ("guidance_scale", "true_cfg_scale"):
        value = getattr(flags, f"default_{name}")
        if value is not None:
            fields[name] = value
    if flags.default_negative_prompt is not None:
        fields["negative_prompt"] = flags.default_negative_prompt
    return Defaults(**fields)
