"""One diffusers pipeline's call: what it takes, as its signature has it, and what it gives, as frames of pixels."""

from __future__ import annotations

import inspect
import re
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from stepbatch.errors import ContentRejected, GenerationFailed, InvalidModelOutput, InvalidValue, RequestError
from stepbatch.image import InputImage
from stepbatch.models.pipeline_table import BROUGHT, FIXED, FRAMES, QUIRKS, RATES, UNSERVED, Kind, Quirks
from stepbatch.request import FIELDS, GenerationRequest

CHECKED_IN = ("/diffusers/pipelines/", "/diffusers/schedulers/", "/diffusers/image_processor.py")
INPUT_CHECKS = ("check_inputs", "check_image")  # functions of pipelines that do nothing else
PICTURES = ("pil", "np")  # what calls make by default that make pictures
ROUNDING = 1e-3  # by how much values may lie outside 0 to 1: less than half of an 8-bit one
FIELD_OF = {"image": "images", "mask_image": "mask"} | dict.fromkeys(FRAMES, "num_frames") | dict.fromkeys(RATES, "fps")
AS_THEY_ARE = ("num_inference_steps", "guidance_scale", "guidance_scale_2", "true_cfg_scale", "max_sequence_length")

Tick = Callable[[int, int], None]
Outcome = torch.Tensor | RequestError


class Call:
    """One pipeline's ``__call__``.

    Args:
        pipeline: Diffusers'.

    Raises:
        ValueError: it wants what no request can bring, or makes no pictures.
    """

    def __init__(self, pipeline: Any) -> None:
        self.pipeline = pipeline
        self.name = type(pipeline).__name__
        self.quirks = QUIRKS.get(self.name, Quirks())
        taken = inspect.signature(pipeline.__call__).parameters.values()
        self.defaults = {p.name: p.default for p in taken if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
        transformer = pipeline.components.get("transformer")
        if self.quirks.channels and transformer.config["in_channels"] not in self.quirks.channels:
            raise ValueError(f"a {self.name} wants {self.quirks.channels} channels")
        self.frames = next((name for name in FRAMES if name in self.defaults), None)
        self.rate = next((name for name in RATES if name in self.defaults), None)
        self._check_served()
        self.draws_unasked = False  # whether it was seen to draw noise from no request's generator
        self._vae = pipeline.components.get("vae")
        self._vae_dtype = None if self._vae is None else self._vae.dtype
        pipeline.set_progress_bar_config(disable=True)

    def _check_served(self) -> None:
        """Raise ``ValueError`` for a call that requests can't make."""
        required = [name for name, default in self.defaults.items() if default is inspect.Parameter.empty]
        wanted = [name for name in required if name not in BROUGHT]
        wanted += [name for name in self.defaults if name in UNSERVED]
        names = [*self.defaults]
        if names[:1] == ["video"] or ({"video", "strength"} <= {*names} and "image" not in names):
            wanted.append("video")  # to be turned into another
        if wanted:
            raise ValueError(f"{self.name} can't be served: it wants {wanted[0]}, which no request brings")
        if self.defaults.get("output_type") not in PICTURES:
            raise ValueError(f"{self.name} can't be served: it makes something else than pictures")
        lists = self.quirks.each or self.kinds[0] in ("strength", "mask")
        resizes = "image" in self.defaults and (lists or "height" not in self.defaults)
        if resizes and self._processor(mask=False) is None:
            raise ValueError(f"{self.name} can't be served: it has nothing to bring images to the output's size")

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """What of requests it is for."""
        if "mask_image" in self.defaults:
            return ("mask",)
        if "image" not in self.defaults:
            return ("text",)
        if "strength" in self.defaults and not self.frames:
            return ("strength",)
        return ("images", "text") if self.quirks.also_text else ("images",)

    def shares(self, request: GenerationRequest) -> bool:
        """Whether requests with this signature can be in one call."""
        return (self._lists(request) or not request.images) and not (self.draws_unasked or self.quirks.alone)

    def _lists(self, request: GenerationRequest) -> bool:
        """Whether a call takes an image of each prompt."""
        return request.strength is not None or request.mask is not None or self.quirks.each

    def draw(self, requests: Sequence[GenerationRequest], seeds: Sequence[int], tick: Tick) -> list[Outcome]:
        """Draw for requests that have the same signature, each with its own seed.

        Returns:
            Of each request: fp32 ``[F, H, W, 3]``, 0 to 1, or what is wrong with it.

        Raises:
            InvalidValue: the pipeline's own checks refuse a value; of which request is not known.
        """
        self._check_company(requests)
        arguments = self.arguments(requests, seeds) | self._callback(requests[0].steps, tick)
        try:
            with self._shifted(requests[0].flow_shift), _seeded(seeds[0], self.pipeline.device) as has_drawn:
                result = self.pipeline(**arguments)
                self.draws_unasked |= has_drawn()
        except ValueError as error:
            refusal = _refusal(error)
            if refusal is None:
                raise
            raise refusal from error
        finally:
            self._tidy()
        self._check_company(requests)
        outputs = result[0] if isinstance(result, tuple) else result
        flagged = _flagged(result, len(requests)) if self.pipeline.components.get("safety_checker") else ()
        return [
            _outcome(output, request, any(flags[i] for flags in flagged))
            for i, (output, request) in enumerate(zip(outputs, requests, strict=True))
        ]

    def _check_company(self, requests: Sequence[GenerationRequest]) -> None:
        if self.draws_unasked and len(requests) > 1:
            raise GenerationFailed("the pipeline draws noise of its own, so its calls are not shared")

    def arguments(self, requests: Sequence[GenerationRequest], seeds: Sequence[int]) -> dict[str, Any]:
        """The call's, all but its callback."""
        first = requests[0]
        values: dict[str, Any] = {name: getattr(first, name) for name in AS_THEY_ARE} | {
            "prompt": [request.prompt for request in requests],
            "width": first.size[0],
            "height": first.size[1],
            "max_area": first.size[0] * first.size[1],
            "strength": first.strength,
            "batch_size": len(requests),
        }
        values |= dict.fromkeys(FRAMES, first.num_frames) | dict.fromkeys(RATES, first.fps) | FIXED
        if first.negative_prompt is not None:
            values["negative_prompt"] = [request.negative_prompt for request in requests]
        if first.images:
            values["image"] = self._images(requests)
        if first.mask is not None:
            values["mask_image"] = [self._resized(request.mask, request, mask=True) for request in requests]
        taken = {name: value for name, value in values.items() if name in self.defaults and value is not None}
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        # "np", as some give values that are not yet pictures, nor looked at by their safety checker, for "pt"
        return taken | {"generator": generators, "output_type": "np", "return_dict": False}

    def _images(self, requests: Sequence[GenerationRequest]) -> Any:
        if self._lists(requests[0]) or "height" not in self.defaults:
            return [self._resized(request.images[0], request) for request in requests]
        [request] = requests
        images = [_picture(image) for image in request.images]  # it brings them to the sizes it wants itself
        return images if self.quirks.many else images[0]

    def _resized(self, image: InputImage | None, request: GenerationRequest, mask: bool = False) -> Image.Image:
        """At the output's size, as its own preprocessing would bring it there; so those of a call are equally large."""
        assert image is not None
        processor = self._processor(mask)
        assert processor is not None
        width, height = request.size
        resized: Image.Image = processor.resize(_picture(image), height, width)
        return resized

    def _processor(self, mask: bool) -> VaeImageProcessor | None:
        """What brings images to a size."""
        names = ("mask_processor",) * mask + ("image_processor", "video_processor")
        own = [vars(self.pipeline).get(name) for name in names]
        return next((processor for processor in own if isinstance(processor, VaeImageProcessor)), None)

    def _callback(self, steps: int, tick: Tick) -> dict[str, Any]:
        """So that ``tick`` is called after each step; what it raises ends the call."""

        def new(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            total = vars(pipeline).get("_num_timesteps") or steps
            tick(min(step + 1, total), total)
            return {}

        def old(step: int, timestep: Any, latents: Any) -> None:
            tick(min(step + 1, steps), steps)

        if "callback_on_step_end" in self.defaults:
            return {"callback_on_step_end": new}
        return {"callback": old, "callback_steps": 1} if "callback" in self.defaults else {}

    @contextmanager
    def _shifted(self, flow_shift: float | None) -> Iterator[None]:
        """With a noise schedule that is shifted so for the time being."""
        own = self.pipeline.components.get("scheduler")
        if flow_shift is None:
            yield
            return
        name = shift_name(own)
        assert name is not None
        self.pipeline.scheduler = type(own).from_config(own.config, **{name: flow_shift})
        try:
            yield
        finally:
            self.pipeline.scheduler = own

    def _tidy(self) -> None:
        """Leave the pipeline as a call that ends well does: one that was broken off has not."""
        self.pipeline.maybe_free_model_hooks()
        if self._vae is not None and self._vae.dtype != self._vae_dtype:  # some decode in more precision
            self._vae.to(dtype=self._vae_dtype)


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[Callable[[], bool]]:
    """Gives a seed to what is drawn but from the generators of requests; says whether anything was.

    Such noise would make a picture depend on its company.
    """

    def states() -> list[torch.Tensor]:
        return [torch.get_rng_state(), *(torch.cuda.get_rng_state(there) for there in devices)]

    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        before = states()
        yield lambda: not all(map(torch.equal, before, states()))


def _picture(image: InputImage) -> Image.Image:
    return Image.frombytes("RGB" if image.channels == 3 else "L", (image.width, image.height), image.pixels)


def shift_name(scheduler: Any) -> str | None:
    """What this noise schedule calls ``flow_shift``, if its settings have one that matters."""
    config = scheduler.config
    if "flow_shift" in config:
        return "flow_shift" if config.get("use_flow_sigmas") else None
    return "shift" if "shift" in config and not config.get("use_dynamic_shifting") else None


def _refusal(error: ValueError) -> InvalidValue | None:
    """What the pipeline's own checks say, as an answer; nothing for a ``ValueError`` that is no request's fault."""
    [*_, last] = traceback.extract_tb(error.__traceback__)
    if not any(place in last.filename for place in CHECKED_IN):
        return None
    message = (str(error).strip().splitlines() or [type(error).__name__])[0]
    names = [FIELD_OF.get(word, word) for word in re.findall(r"\w+", message)]
    field = next((name for name in names if name in FIELDS), None)
    return InvalidValue(message, field) if field or last.name in INPUT_CHECKS else None


def _flagged(result: Sequence[Any], count: int) -> list[Any]:
    """What a safety checker says beside the pictures: for each, of one kind of content or of several."""
    return [flags for flags in result[1:] if isinstance(flags, list | np.ndarray) and len(flags) == count]


def _outcome(output: Any, request: GenerationRequest, flagged: bool) -> Outcome:
    if flagged:
        return ContentRejected("the model's safety checker rejected what was drawn", "prompt")
    frames = _frames(output)
    wanted = (request.frames, *reversed(request.size), 3)
    if tuple(frames.shape) != wanted:
        made, asked = ("x".join(map(str, shape)) for shape in (frames.shape, wanted))
        return GenerationFailed(f"the pipeline made {made} frames, rows, columns and channels, not {asked}")
    if not torch.isfinite(frames).all():
        return InvalidModelOutput("the model made values that are not finite")
    least, most = frames.min().item(), frames.max().item()
    if least < -ROUNDING or most > 1 + ROUNDING:
        return InvalidModelOutput(f"the pipeline made values from {least:g} to {most:g}, where pictures have 0 to 1")
    return frames


def _frames(output: Any) -> torch.Tensor:
    """One output as ``[F, H, W, 3]``, fp32 from 0 to 1, whatever form it came in."""
    if isinstance(output, list):
        return torch.cat([_frames(frame) for frame in output])
    if isinstance(output, Image.Image):
        output = np.asarray(output.convert("RGB"), np.float32) / 255
    channels_last = isinstance(output, np.ndarray)
    values = torch.as_tensor(output).float().cpu()
    values = values if values.ndim == 4 else values.unsqueeze(0)
    return values if channels_last else values.permute(0, 2, 3, 1)
