"""Any pipeline of diffusers, in whole calls: text-to-image and what else its parts can do, in pictures or videos.

What a call takes is read from its signature, once; what can't be read there is in ``pipeline_table``. Requests that
have the same signature share a call. Image-to-image, inpainting and the like are classes of their own in diffusers,
made of the same parts.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Hashable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
from diffusers import DiffusionPipeline
from diffusers.utils import is_bs4_available, is_ftfy_available

from stepbatch.config import EngineConfig
from stepbatch.errors import CheckpointError, InvalidValue, OptionError
from stepbatch.image import InputImage
from stepbatch.models.loading import Loaded, load_pipeline
from stepbatch.models.pipeline_calls import Call, Outcome, Tick
from stepbatch.models.pipeline_info import describe, latent_frames
from stepbatch.models.pipeline_prompts import Prompts
from stepbatch.models.pipeline_table import Kind, siblings
from stepbatch.request import MAX_STEPS, GenerationRequest

PIXELS_PER_TOKEN = 16 * 16  # of a picture or latent frame: what it is in most models

log = logging.getLogger(__name__)


class Pipeline:
    """One checkpoint that diffusers runs.

    Args:
        config: Device, precision, what stays in the CPU's memory, defaults.
        folder: The checkpoint.

    Raises:
        SetupError: it can't be loaded, or its calls are for what requests can't ask.
    """

    def __init__(self, config: EngineConfig, folder: Path) -> None:
        loaded = load_pipeline(folder, config)
        self.device = loaded.device
        self._calls = _calls(loaded)
        own = next(iter(self._calls.values()))
        self._prompts = Prompts(own)
        self._latent_frames = latent_frames(own)
        self.info = describe(config, folder, loaded, self._calls)
        self._check_defaults()
        if "prompt" not in own.defaults:
            log.warning("%s: prompts have no effect, as its pipeline takes none", self.info.id)
        if own.defaults.get("clean_caption") and not (is_bs4_available() and is_ftfy_available()):
            log.warning("%s: prompts are cleaned as in training only with beautifulsoup4 and ftfy", self.info.id)

    def check(self, request: GenerationRequest) -> None:
        """Raise ``InvalidValue`` for a resolved request that can't be served, an over-long prompt for one."""
        if _kind(request) not in self._calls:
            raise InvalidValue("this model does not take images in this way", "images")
        self._prompts.check(request)
        self._check_steps(request)
        if request.strength is not None:
            self._check_strength(request)

    def _check_defaults(self) -> None:
        """Raise ``OptionError`` if a request that says nothing could not be served."""
        defaults, kind = self.info.defaults, next(iter(self._calls))
        given: dict[str, Any] = {
            name: getattr(defaults, name) for name in ("guidance_scale", "true_cfg_scale", "negative_prompt")
        }
        if kind != "text":
            given["images"] = (InputImage(64, 64, bytes(64 * 64 * 3)),)
        if kind == "mask":
            given["mask"] = InputImage(64, 64, bytes(64 * 64))
        if kind == "strength":
            given["strength"] = 1.0
        try:
            self.check(GenerationRequest(prompt="any", **given).resolve(self.info))
        except InvalidValue as error:
            raise OptionError(f"the default {error.message}") from error

    def _check_steps(self, request: GenerationRequest) -> None:
        """Some noise schedules begin so far in that their last steps would lie behind the end of the training's.

        Others are stretched so that the last step has a given noise, which one step alone can't be.
        """
        scheduler = self._calls[_kind(request)].pipeline.components.get("scheduler")
        config = {} if scheduler is None else scheduler.config
        most = config.get("num_train_timesteps", MAX_STEPS) - config.get("steps_offset", 0)
        least = 2 if config.get("shift_terminal") else 1
        assert request.num_inference_steps is not None
        if not least <= request.num_inference_steps <= most:
            bounds = f"from {least} to {most}"
            raise InvalidValue(f"num_inference_steps must be {bounds} on this model", "num_inference_steps")

    def _check_strength(self, request: GenerationRequest) -> None:
        """Noise schedules that are not of flow matching leave out a step that is only partly within ``strength``."""
        scheduler = self._calls[_kind(request)].pipeline.components.get("scheduler")
        assert request.num_inference_steps is not None
        assert request.strength is not None
        if "FlowMatch" not in type(scheduler).__name__ and request.num_inference_steps * request.strength < 1:
            of = f"{request.num_inference_steps} step{'s' * (request.num_inference_steps != 1)}"
            raise InvalidValue(f"strength must leave a step to take: {request.strength:g} of {of} is none", "strength")

    def signature(self, request: GenerationRequest) -> Hashable:
        """What resolved requests that share a call have in common."""
        call = self._calls[_kind(request)]
        told = request if call.rate else replace(request, fps=None)  # else it is for the file alone
        return (told.signature, self._prompts.lengths(request)) if call.quirks.pads else told.signature

    def shares(self, request: GenerationRequest) -> bool:
        """Whether a request can share its call."""
        return self._calls[_kind(request)].shares(request)

    def tokens(self, request: GenerationRequest) -> int:
        """How large a request's output is: tokens of its pictures, those of latent frames where it is a video."""
        width, height = request.size
        frames = (request.frames - 1) // self._latent_frames + 1
        return max(1, width * height // PIXELS_PER_TOKEN) * frames

    def draw(self, requests: Sequence[GenerationRequest], seeds: Sequence[int], tick: Tick) -> list[Outcome]:
        """Draw for resolved requests of one signature; see ``Call.draw``."""
        return self._calls[_kind(requests[0])].draw(requests, seeds, tick)


def _kind(request: GenerationRequest) -> Kind:
    if request.mask is not None:
        return "mask"
    if request.strength is not None:
        return "strength"
    return "images" if request.images else "text"


def _calls(loaded: Loaded) -> dict[Kind, Call]:
    """By what requests they are for: the checkpoint's own pipeline, and those that work with the same parts."""
    try:
        own = Call(loaded.pipeline)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    calls: dict[Kind, Call] = dict.fromkeys(own.kinds, own)
    if not _usual(loaded.pipeline):
        return calls
    for name in siblings(type(loaded.pipeline)):
        try:
            made = _sibling(loaded, name)
        except ValueError as error:
            log.info("%s can't be run as a %s: %s", loaded.name, name, error)
            continue
        for kind in made.kinds:
            calls.setdefault(kind, made)
    return calls


def _usual(pipeline: Any) -> bool:
    """Whether its UNet takes latents alone; one with more channels is made for one kind of request."""
    unet, vae = pipeline.components.get("unet"), pipeline.components.get("vae")
    return unet is None or vae is None or unet.config["in_channels"] == vae.config["latent_channels"]


def _sibling(loaded: Loaded, name: str) -> Call:
    """A pipeline of another class that has the same parts and settings; ``from_pipe`` would cast them all."""
    cls: type[DiffusionPipeline] = getattr(diffusers, name)
    parts, known = loaded.pipeline.components, inspect.signature(cls).parameters
    given = {name: value for name, value in {**loaded.pipeline.config, **parts}.items() if name in known}
    missing = [name for name, p in known.items() if p.default is p.empty and name not in given]
    if missing:
        raise ValueError(f"it has no {missing[0]}")
    own = inspect.signature(type(loaded.pipeline)).parameters
    lost = [
        name
        for name, value in loaded.pipeline.config.items()
        if name in own and name not in parts and name not in known and value != own[name].default
    ]
    if lost:
        raise ValueError(f"it has no setting {lost[0]}, which is {loaded.pipeline.config[lost[0]]} in the checkpoint")
    return Call(cls(**given))
