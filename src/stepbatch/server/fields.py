"""The fields of requests, by route: which there are, of what type, and which are taken without effect."""

from __future__ import annotations

from typing import Any

from stepbatch.checks import MAX_PROMPT_CHARACTERS
from stepbatch.config import BatchingConfig
from stepbatch.request import (
    MAX_FPS,
    MAX_FRAMES,
    MAX_GUIDANCE,
    MAX_OUTPUTS,
    MAX_PRIORITY,
    MAX_SEED,
    MAX_STEPS,
    MAX_TIMEOUT,
)

GENERATIONS, EDITS, VIDEOS = "/v1/images/generations", "/v1/images/edits", "/v1/videos"
MAX_PAGE, PAGE = 100, 20  # videos of a list, at most and unless asked for; as OpenAI has it

OUTPUT_FORMATS = ("png", "jpeg", "webp")
RESPONSE_FORMATS = ("b64_json", "url")
BACKGROUNDS = ("auto", "opaque", "transparent")

# Every field that both routes of pictures read, as JSON Schema. The OpenAPI document shows this table; a test holds
# docs/api.md against it.
FIELDS: dict[str, dict[str, Any]] = {
    "prompt": {"type": "string", "maxLength": MAX_PROMPT_CHARACTERS, "description": "What to draw."},
    "model": {"type": "string", "description": "The served model's name, its path, or the last folder of its path."},
    "n": {"type": "integer", "minimum": 1, "maximum": MAX_OUTPUTS, "default": 1, "description": "How many pictures."},
    "size": {"type": "string", "description": "WIDTHxHEIGHT in pixels; auto is the image's, else the model's own."},
    "width": {"type": "integer", "minimum": 1, "description": "Pixels; goes with height, instead of size."},
    "height": {"type": "integer", "minimum": 1, "description": "Pixels; goes with width, instead of size."},
    "response_format": {
        "type": "string",
        "enum": list(RESPONSE_FORMATS),
        "default": "b64_json",
        "description": "The pictures in the answer itself, or addresses to fetch them from for a while.",
    },
    "output_format": {
        "type": "string",
        "enum": list(OUTPUT_FORMATS),
        "default": "png",
        "description": "The pictures' file format.",
    },
    "output_compression": {
        "type": "integer",
        "minimum": 0,
        "maximum": 100,
        "default": 100,
        "description": "Quality of jpeg and webp, 100 the best; a png is lossless and takes only 100.",
    },
    "negative_prompt": {"type": "string", "maxLength": MAX_PROMPT_CHARACTERS, "description": "What not to draw."},
    "num_inference_steps": {"type": "integer", "minimum": 1, "maximum": MAX_STEPS, "description": "Denoising steps."},
    "guidance_scale": {
        "type": "number",
        "minimum": 0,
        "maximum": MAX_GUIDANCE,
        "description": "Strength of guidance, as the model's diffusers pipeline means it.",
    },
    "true_cfg_scale": {
        "type": "number",
        "minimum": 0,
        "maximum": MAX_GUIDANCE,
        "description": "Strength of classifier-free guidance, for models that have a distilled guidance_scale besides.",
    },
    "flow_shift": {
        "type": "number",
        "exclusiveMinimum": 0,
        "maximum": MAX_GUIDANCE,
        "description": "Shift of the noise schedule.",
    },
    "max_sequence_length": {"type": "integer", "minimum": 1, "description": "The prompt's limit, tokens."},
    "seed": {
        "type": "integer",
        "minimum": 0,
        "maximum": MAX_SEED,
        "description": "Of the first picture; the i-th after it has seed + i. Drawn at random where absent.",
    },
    "timeout": {
        "type": "number",
        "exclusiveMinimum": 0,
        "maximum": MAX_TIMEOUT,
        "description": "Seconds after which the answer is of no use: what can't be begun in time is not begun.",
    },
    "priority": {
        "type": "integer",
        "minimum": -MAX_PRIORITY,
        "maximum": MAX_PRIORITY,
        "default": 0,
        "description": "The higher, the sooner, where --scheduling-policy is deadline; else without effect.",
    },
    "user": {
        "type": "string",
        "maxLength": MAX_PROMPT_CHARACTERS,
        "description": "Who asks, and so whose share of the machine it is, with --fair-shares; else without effect.",
    },
    "background": {
        "type": "string",
        "enum": ["auto", "opaque"],
        "default": "opaque",
        "description": "Pictures are opaque; transparent is refused.",
    },
    "stream": {"type": "boolean", "enum": [False], "default": False, "description": "Streaming is not served yet."},
    "partial_images": {"type": "integer", "enum": [0], "default": 0, "description": "Not served yet."},
    "generator_device": {
        "type": "string",
        "enum": ["cpu"],
        "default": "cpu",
        "description": "Noise is always drawn on the CPU; another device would draw other noise.",
    },
    "enable_upscaling": {"type": "boolean", "enum": [False], "default": False, "description": "Not served."},
    "output_quality": {
        "type": "string",
        "enum": ["default"],
        "default": "default",
        "description": "Not served; output_compression is.",
    },
}

# What an edit has besides.
EDIT_FIELDS: dict[str, dict[str, Any]] = {
    "image": {
        "type": "array",
        "items": {"type": "string", "format": "binary"},
        "minItems": 1,
        "description": "The image, or several under this name or image[]: PNG, JPEG or WebP files.",
    },
    "mask": {
        "type": "string",
        "format": "binary",
        "description": "What to paint anew: transparent, or white in a file without transparency.",
    },
    "strength": {
        "type": "number",
        "minimum": 0,
        "maximum": 1,
        "description": "How far to go from the image that denoising starts from, where the model starts from one.",
    },
}

# What is read of a request for a video: much of the above, and its length.
VIDEO_FIELDS: dict[str, dict[str, Any]] = {
    **{
        name: FIELDS[name]
        for name in (
            "prompt",
            "model",
            "size",
            "width",
            "height",
            "negative_prompt",
            "num_inference_steps",
            "guidance_scale",
            "true_cfg_scale",
            "flow_shift",
            "max_sequence_length",
            "timeout",
            "priority",
            "user",
            "generator_device",
        )
    },
    "seconds": {"type": ["string", "number"], "description": "How long; goes to the nearest number of frames."},
    "num_frames": {
        "type": "integer",
        "minimum": 1,
        "maximum": MAX_FRAMES,
        "description": "The same in frames: one more than a multiple of the model's frames_multiple.",
    },
    "fps": {"type": "integer", "minimum": 1, "maximum": MAX_FPS, "description": "Frames a second."},
    "guidance_scale_2": {
        "type": "number",
        "minimum": 0,
        "maximum": MAX_GUIDANCE,
        "description": "Strength of guidance in the last, less noisy steps, where the model has two transformers.",
    },
    "seed": {"type": "integer", "minimum": 0, "maximum": MAX_SEED, "description": "Drawn at random where absent."},
}

# What its form has besides.
VIDEO_FILES: dict[str, dict[str, Any]] = {
    "input_reference": {
        "type": "string",
        "format": "binary",
        "description": "The image that the video begins with: a PNG, JPEG or WebP file.",
    },
}

ROUTES: dict[str, dict[str, dict[str, Any]]] = {
    GENERATIONS: FIELDS,
    EDITS: FIELDS | EDIT_FIELDS,
    VIDEOS: VIDEO_FIELDS | VIDEO_FILES,
}

# Fields that are read only to refuse what can't be done: the values that ask for nothing.
HARMLESS: dict[str, tuple[bool | int | str, str]] = {
    "stream": (False, "streaming is not served yet"),
    "partial_images": (0, "partial images are not served yet"),
    "generator_device": ("cpu", "noise is drawn on the CPU; on another device the pictures would differ"),
    "enable_upscaling": (False, "upscaling is not served"),
    "output_quality": ("default", "use output_compression, from 0 to 100"),
}

# OpenAI's fields that mean nothing to a diffusion model that runs here (background too, where it isn't transparent).
# These and the next are taken by every route.
IGNORED_OPENAI = ("quality", "style", "moderation", "safety_identifier", "input_fidelity")

# Fields that users of SGLang and vLLM-Omni send and that don't say what the picture is: speed, memory, profiling, where
# that server keeps its files. Those that change the picture (lora, diffusers_kwargs, ...) are unknown, hence refused.
IGNORED_OTHERS = (
    "enable_teacache",  # SGLang
    "upscaling_model_path",  # SGLang; means something with enable_upscaling only
    "upscaling_scale",  # SGLang; likewise
    "output_path",  # SGLang
    "perf_dump_path",  # SGLang
    "profile",  # SGLang
    "num_profiled_timesteps",  # SGLang
    "profile_all_stages",  # SGLang
    "vae_use_slicing",  # vLLM-Omni
    "vae_use_tiling",  # vLLM-Omni
    "bot_task",  # vLLM-Omni; its benchmark sends it with every edit, for models that write before they draw
)


def idle_fields(limits: BatchingConfig, keyed: bool = False) -> tuple[str, ...]:
    """Fields of every route that the server's settings leave without effect.

    Args:
        limits: The scheduler's.
        keyed: Shares are those of keys, not of users.
    """
    by_deadline = limits.scheduling_policy == "deadline" and not limits.fair_shares  # which go before any policy
    effects = {"priority": by_deadline, "user": limits.fair_shares and not keyed}
    return tuple(name for name, has_effect in effects.items() if not has_effect)


USUALLY_IDLE = idle_fields(BatchingConfig())
