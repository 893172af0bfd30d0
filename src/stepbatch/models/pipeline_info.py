"""What a pipeline says of itself: read from its call's defaults, its parts' configs and its scale factors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from stepbatch.config import EngineConfig
from stepbatch.model_info import AutoSize, Guidance, ModelInfo, Sizing, Task
from stepbatch.models.defaults import Settings, settings
from stepbatch.models.loading import Loaded, model_info
from stepbatch.models.pipeline_calls import Call, shift_name
from stepbatch.models.pipeline_prompts import FEW
from stepbatch.models.pipeline_table import CONFIGURED, NAMED, Kind
from stepbatch.request import MAX_IMAGES

PIXELS = (  # names of how many pixels wide a latent pixel is
    "vae_scale_factor",
    "vae_scale_factor_spatial",
    "vae_spatial_compression_ratio",
    "vae_spatial_scale_factor",
)
LATENT_FRAMES = (  # names of how many frames a latent frame stands for
    "vae_scale_factor_temporal",
    "vae_temporal_compression_ratio",
    "vae_temporal_scale_factor",
)
FEWEST_FRAMES = 121  # that can be asked for of any video model
LONGEST_PROMPT = 1024  # tokens that can be asked for, unless the default is more


def describe(config: EngineConfig, folder: Path, parts: Loaded, calls: Mapping[Kind, Call]) -> ModelInfo:
    """The model's limits, defaults and tasks.

    Args:
        calls: By what requests they are for; the first is the checkpoint's own.

    Raises:
        CheckpointError: the overrides file is not valid.
    """
    own = next(iter(calls.values()))
    multiple = _multiple(own)
    known = _known(calls) | _configured(own) | NAMED.get(parts.name.lower(), {}) | parts.settings
    if config.defaults.default_guidance_scale is not None:
        known |= {"guidance_scale_2": None}  # the flag is for both
    values = settings(known, folder, 65536 // multiple * multiple, _longest(own))
    sized = "height" in own.defaults or "image" in own.defaults
    video = own.frames is not None
    return model_info(
        config,
        parts,
        values if sized else _of_one_size(values),
        size_multiple=multiple,
        longest_side=65536,
        longest_prompt=_longest(own),
        uses=_uses(calls, own),
        tasks=_tasks(calls, video),
        max_images=MAX_IMAGES if any(call.quirks.many for call in calls.values()) else 1,
        guidance=_guidance(own),
        auto_size=AutoSize(area=values.width * values.height, multiple=multiple) if "images" in calls else AutoSize(),
        sizing=Sizing(frame=latent_frames(own), whole_calls=True),
        frames_multiple=own.quirks.frames_multiple or latent_frames(own),
        max_frames=max(values.max_frames or 0, values.num_frames or 1) if video else 1,
    )


def latent_frames(call: Call) -> int:
    """How many frames a latent frame stands for; the first stands for one."""
    return _first(call, LATENT_FRAMES, 1) if call.frames else 1


def _known(calls: Mapping[Kind, Call]) -> dict[str, Any]:
    """The defaults that the calls and configs have."""
    own = next(iter(calls.values()))
    given = own.defaults
    width, height = _size(own)
    known: dict[str, Any] = {
        "width": width,
        "height": height,
        "max_side": max(2048, width, height),
        "num_inference_steps": given.get("num_inference_steps") or 50,
        "max_sequence_length": given.get("max_sequence_length") or FEW,
    }
    known |= {
        name: given[name] for name in ("guidance_scale", "true_cfg_scale") if isinstance(given.get(name), int | float)
    }
    if own.frames:
        frames = given[own.frames] or own.quirks.num_frames or _config(own).get("num_frames") or 16
        rate = given[own.rate] if own.rate else own.quirks.fps
        known |= {"num_frames": frames, "fps": round(rate), "max_frames": max(FEWEST_FRAMES, 2 * frames - 1)}
    if "mask" in calls:
        known["strength"] = calls["mask"].defaults.get("strength") or 1.0
    return known


def _configured(own: Call) -> dict[str, Any]:
    """The defaults that the checkpoint's own settings call for."""
    known: dict[str, Any] = {}
    for name, values in CONFIGURED.get(own.name, {}).items():
        if own.pipeline.config.get(name):
            known |= values
    return known


def _size(call: Call) -> tuple[int, int]:
    """Width and height by default."""
    own, given, config = vars(call.pipeline), call.defaults, _config(call)
    if given.get("width"):
        return given["width"], given["height"]
    if own.get("default_width"):
        return own["default_width"], own["default_height"]
    pixel = _first(call, PIXELS, 1)
    if config.get("sample_width"):
        return config["sample_width"] * pixel, config["sample_height"] * pixel
    side = own.get("default_sample_size") or config.get("sample_size") or 1024 // pixel
    height, width = (side, side) if isinstance(side, int) else tuple(side)[-2:]
    return width * pixel, height * pixel


def _multiple(call: Call) -> int:
    """What sizes are multiples of where nothing is rounded: whole tokens, and what images are brought to."""
    own = vars(call.pipeline)
    pixel = _first(call, PIXELS, 1)
    patch = _config(call).get("patch_size") or 1
    patch = patch if isinstance(patch, int) else tuple(patch)[-1]
    processors = [
        own[name].config["vae_scale_factor"] for name in ("image_processor", "video_processor") if name in own
    ]
    return math.lcm(8, pixel * patch, *processors)  # input checks say 8 whatever the VAE is


def _uses(calls: Mapping[Kind, Call], own: Call) -> tuple[str, ...]:
    given, config = own.defaults, _config(own)
    uses: list[str] = [name for name in ("negative_prompt", "max_sequence_length", "true_cfg_scale") if name in given]
    # beside true_cfg_scale it is a number that the transformer is told, if it was trained to be
    if "guidance_scale" in given and ("true_cfg_scale" not in given or config.get("guidance_embeds")):
        uses.append("guidance_scale")
    if "guidance_scale_2" in given and own.pipeline.config.get("boundary_ratio") is not None:
        uses.append("guidance_scale_2")
    if own.frames:
        uses += ["num_frames", "fps"]
    scheduler = own.pipeline.components.get("scheduler")
    if scheduler is not None and shift_name(scheduler):
        uses.append("flow_shift")
    return tuple(name for name in uses if all(_takes(call, name) for call in calls.values()))


def _takes(call: Call, name: str) -> bool:
    return name in ("fps", "num_frames", "flow_shift") or name in call.defaults


def _tasks(calls: Mapping[Kind, Call], video: bool) -> tuple[Task, ...]:
    pictures: dict[Kind, Task] = {
        "text": "text-to-image", "images": "editing", "strength": "image-to-image", "mask": "inpainting",
    }  # fmt: skip
    videos: dict[Kind, Task] = {"text": "text-to-video", "images": "image-to-video"}
    names = videos if video else pictures
    return tuple(task for kind, task in names.items() if kind in calls)


def _guidance(own: Call) -> Guidance:
    if "true_cfg_scale" in own.defaults and "negative_prompt" in own.defaults:
        return Guidance(field="true_cfg_scale", off=1.0, needs_negative=True)
    return Guidance(off=own.quirks.guidance_off)


def _longest(own: Call) -> int:
    return max(own.defaults.get("max_sequence_length") or FEW, LONGEST_PROMPT)


def _config(call: Call) -> Mapping[str, Any]:
    """Of the network that denoises."""
    parts = call.pipeline.components
    network = next((parts[name] for name in ("transformer", "unet", "prior", "decoder") if parts.get(name)), None)
    return network.config if network is not None else {}


def _first(call: Call, names: tuple[str, ...], otherwise: int) -> int:
    own = vars(call.pipeline)
    found = [own[name] for name in names if isinstance(own.get(name), int)]
    return found[0] if found else otherwise


def _of_one_size(values: Settings) -> Settings:
    """Where no size can be asked for."""
    return msgspec.structs.replace(
        values, min_side=min(values.width, values.height), max_side=max(values.width, values.height)
    )
