"""What each kind of pipeline is asked for, and what diffusers makes of it when it is asked for one at a time."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, StableDiffusionImg2ImgPipeline
from PIL import Image

from stepbatch import GenerationRequest
from stepbatch.image import InputImage

TOLERANCE = 1e-4  # of any value of a picture or video, which are from 0 to 1, fp32

PROMPTS = (
    "a cat",
    "an oil painting of a small red boat on a wide lake between green hills, golden light in the evening",
    "sun",
    "two black dogs run through the snow, in the style of a photograph",
)
NEGATIVES = ("dark", "", "low quality, a blurry picture of people with too many hands and no face, text", "a red tree")
STEPS = 3


def requests(kind: str, count: int = 4) -> list[GenerationRequest]:
    """Requests that may share a call: prompts, negative prompts, seeds and images differ."""
    fields = FIELDS[kind]
    return [_request(i, fields) for i in range(count)]


def _request(i: int, fields: Mapping[str, Any]) -> GenerationRequest:
    values = {"width": 64, "height": 48, "guidance_scale": 4.0, "negative_prompt": NEGATIVES[i]}
    values |= {"prompt": PROMPTS[i], "num_inference_steps": STEPS, "seed": 11 * i} | fields
    size = values["width"], values["height"]
    values |= {name: value(i, *size) for name, value in fields.items() if callable(value)}
    return GenerationRequest(**values)


def _image(i: int, width: int, height: int) -> tuple[InputImage, ...]:
    return (picture(width, height, i),)


def _image_of_any_size(i: int, width: int, height: int) -> tuple[InputImage, ...]:
    return (picture(width + 24 * i, height + 8 * i, i),)


def _mask(i: int, width: int, height: int) -> InputImage:
    """A part of the image, another each time."""
    width, height = width + 24 * i, height + 8 * i
    mask = Image.new("L", (width, height), 0)
    mask.paste(255, (i * 4, 8, width // 2 + i * 4, height - 8))
    return InputImage(width, height, mask.tobytes())


def picture(width: int, height: int, seed: int) -> InputImage:
    """A picture of soft random colours."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    image = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
    return InputImage(width, height, image.tobytes())


def pil(image: InputImage) -> Image.Image:
    """As diffusers takes it."""
    return Image.frombytes("RGB" if image.channels == 3 else "L", (image.width, image.height), image.pixels)


VIDEO = {"width": 64, "height": 32}
PAINTED = {"images": _image_of_any_size, "mask": _mask, "strength": 0.9}
FIELDS: dict[str, dict[str, Any]] = {  # by what is asked for; functions give what each request has of its own
    "stable-diffusion": {},
    "stable-diffusion, image-to-image": {"images": _image_of_any_size, "strength": 0.7},
    "stable-diffusion-xl": {},
    "stable-diffusion-3": {"max_sequence_length": 128},
    "pixart-sigma": {"max_sequence_length": 120},
    "sana": {"width": 64, "height": 32, "max_sequence_length": 100},
    "flux": {"guidance_scale": 3.5, "true_cfg_scale": 2.0, "max_sequence_length": 64},
    "inpaint": PAINTED,
    "instruct-pix2pix": {"images": _image},
    "wan": VIDEO | {"num_frames": 5, "fps": 8, "max_sequence_length": 64},
    "ltx": VIDEO | {"num_frames": 9, "fps": 24, "max_sequence_length": 64},
    "ltx-image-to-video": VIDEO | {"num_frames": 9, "fps": 24, "max_sequence_length": 64, "images": _image_of_any_size},
}


def kind_of(asked: str) -> str:
    """The checkpoint that is asked."""
    return asked.split(",")[0]


def asked_of(kind: str) -> list[str]:
    """All that a checkpoint is asked for."""
    return [asked for asked in FIELDS if kind_of(asked) == kind]


def theirs(asked: str, pipeline: DiffusionPipeline, request: GenerationRequest) -> np.ndarray:
    """What diffusers makes of a request alone, as its documentation says; values from 0 to 1, ``[F, H, W, 3]``."""
    values: dict[str, Any] = {
        name: value
        for name in ("prompt", "negative_prompt", "num_inference_steps", "guidance_scale", "width", "height",
                     "true_cfg_scale", "max_sequence_length", "strength", "num_frames")
        if (value := getattr(request, name)) is not None
    }  # fmt: skip
    if request.images:
        values["image"] = pil(request.images[0])
    if request.mask is not None:
        values["mask_image"] = pil(request.mask)
    assert request.seed is not None
    values |= {"generator": torch.Generator("cpu").manual_seed(request.seed), "output_type": "np"}
    prepare = PREPARED.get(asked)
    if prepare is not None:
        pipeline = prepare(pipeline, values, request)
    made = pipeline(**values, return_dict=False)[0][0]
    return made if made.ndim == 4 else made[None]


Prepare = Callable[[Any, dict[str, Any], GenerationRequest], Any]


def _image_to_image(pipeline: Any, values: dict[str, Any], request: GenerationRequest) -> Any:
    """It draws at the image's size."""
    values["image"] = values["image"].resize(request.size, Image.Resampling.LANCZOS)
    del values["width"], values["height"]
    return StableDiffusionImg2ImgPipeline(**pipeline.components, requires_safety_checker=False)


def _edit(pipeline: Any, values: dict[str, Any], request: GenerationRequest) -> Any:
    del values["width"], values["height"]
    return pipeline


def _exact(pipeline: Any, values: dict[str, Any], request: GenerationRequest) -> Any:
    """It would draw at another size, and then resize; and would change what the prompt says."""
    values |= {"use_resolution_binning": False, "clean_caption": False}
    return pipeline


def _frame_rate(pipeline: Any, values: dict[str, Any], request: GenerationRequest) -> Any:
    values["frame_rate"] = request.fps
    return pipeline


PREPARED: dict[str, Prepare] = {
    "stable-diffusion, image-to-image": _image_to_image,
    "instruct-pix2pix": _edit,
    "pixart-sigma": _exact,
    "sana": _exact,
    "ltx": _frame_rate,
    "ltx-image-to-video": _frame_rate,
}


def least_difference(pictures: list[np.ndarray]) -> float:
    """How much any two of them differ at least, by their greatest difference."""
    return min(float(np.abs(a - b).max()) for a, b in itertools.combinations(pictures, 2))
