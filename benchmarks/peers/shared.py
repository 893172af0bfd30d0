"""What the three servers do alike: a request's body, calls of the pipeline, the answer.

Each is the best simple set-up that we know of, so that what is compared is how requests are brought together:

- diffusers' own pipeline, in fp32 like ours on a CPU, with ``torch.inference_mode`` and as many threads as ours;
- requests of equal size, steps and guidance share a call, each with a generator of its own: its picture is the one it
  would get alone; prompts and negative prompts may differ;
- the VAE decodes a call's pictures at once: one by one was slower, or no faster, for what comes together here;
- one call before the server says that it is up;
- PNGs are compressed as ours are, and outside of the lock, in a thread, where the framework has a place for that;
- no ``torch.compile``: each size and each number of pictures would be compiled anew, for minutes.
"""

from __future__ import annotations

import argparse
import base64
import inspect
import io
import json
import random
import time
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from pydantic import BaseModel, Field

MAX_PICTURES = 8  # of a call, as many as jobs share a step of ours
BATCH_WAIT = 0.01  # seconds that a batch is waited for: a tenth of what a short request takes
ROUTE = "/v1/images/generations"


class Body(BaseModel):
    """A request, in OpenAI's shape and with what users of diffusion models send besides."""

    prompt: str = Field(min_length=1)
    negative_prompt: str | None = None
    n: int = Field(1, ge=1, le=10)
    size: str = Field("256x256", pattern="^[1-9][0-9]{1,3}x[1-9][0-9]{1,3}$")
    num_inference_steps: int = Field(20, ge=1, le=1000)
    guidance_scale: float = Field(3.5, ge=0, le=100)
    max_sequence_length: int = Field(512, ge=1, le=512)
    seed: int = Field(default_factory=lambda: random.getrandbits(32), ge=0, lt=2**63 - 10)

    @property
    def signature(self) -> tuple[str, int, float, int]:
        """What must be equal for requests to share a call."""
        return self.size, self.num_inference_steps, self.guidance_scale, self.max_sequence_length


def arguments(description: str | None, *required: str) -> argparse.Namespace:
    """The flags that every server has, and those that one needs besides."""
    parser = argparse.ArgumentParser(description=description)
    for flag in required:
        parser.add_argument(flag, required=True)
    parser.add_argument("--model-path", required=True, help="a checkpoint's folder in diffusers' layout")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--num-threads", type=int, default=1, help="that the model computes with")
    parser.add_argument("--batch-wait", type=float, default=BATCH_WAIT, help="seconds that a batch is waited for")
    return parser.parse_args()


def load(model_path: str, threads: int) -> Any:
    """A pipeline that has drawn once."""
    from diffusers import DiffusionPipeline  # here, for processes that load no model import this file too
    from diffusers.utils import logging

    torch.set_num_threads(threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    pipeline = DiffusionPipeline.from_pretrained(model_path, dtype=torch.float32, use_safetensors=True)
    pipeline.set_progress_bar_config(disable=True)
    draw(pipeline, [Body(prompt="a star", num_inference_steps=2)])
    return pipeline


def groups(bodies: Sequence[Body]) -> list[list[int]]:
    """The requests, by index, that share a call: in the order in which each group's first came."""
    found: dict[tuple[str, int, float, int], list[int]] = {}
    for index, body in enumerate(bodies):
        found.setdefault(body.signature, []).append(index)
    return list(found.values())


def draw_all(pipeline: Any, bodies: Sequence[Body]) -> list[list[Image.Image] | ValueError | RuntimeError]:
    """The pictures of each request, or why there are none, which is the fault of its own group only."""
    results: dict[int, list[Image.Image] | ValueError | RuntimeError] = {}
    for group in groups(bodies):
        try:
            drawn: Sequence[Any] = draw(pipeline, [bodies[index] for index in group])
        except (ValueError, RuntimeError) as error:
            drawn = [error] * len(group)
        results.update(zip(group, drawn, strict=True))
    return [results[index] for index in range(len(bodies))]


def draw(pipeline: Any, bodies: Sequence[Body]) -> list[list[Image.Image]]:
    """The pictures of each of some requests with one signature.

    Raises:
        ValueError: the pipeline can't draw this size.
    """
    first = bodies[0]
    width, height = map(int, first.size.split("x"))
    if width % (multiple := 2 * pipeline.vae_scale_factor) or height % multiple:
        raise ValueError(f"width and height must be multiples of {multiple}, not {first.size}")
    pictures = [(body, body.seed + i) for body in bodies for i in range(body.n)]
    taken = inspect.signature(pipeline.__call__).parameters
    limit = {"max_sequence_length": first.max_sequence_length} if "max_sequence_length" in taken else {}
    drawn: list[Image.Image] = []
    for at in range(0, len(pictures), MAX_PICTURES):
        part = pictures[at : at + MAX_PICTURES]
        with torch.inference_mode():
            drawn += pipeline(
                prompt=[body.prompt for body, _ in part],
                negative_prompt=[body.negative_prompt or "" for body, _ in part],
                width=width,
                height=height,
                num_inference_steps=first.num_inference_steps,
                guidance_scale=first.guidance_scale,
                **limit,
                generator=[torch.Generator("cpu").manual_seed(seed) for _, seed in part],
            ).images
    rest = iter(drawn)
    return [[next(rest) for _ in range(body.n)] for body in bodies]


def answer(pictures: Sequence[Image.Image]) -> bytes:
    """The response's body, JSON."""
    data = [{"b64_json": base64.b64encode(_png(picture)).decode()} for picture in pictures]
    return json.dumps({"created": int(time.time()), "data": data}).encode()


def _png(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG", compress_level=1)
    return file.getvalue()
