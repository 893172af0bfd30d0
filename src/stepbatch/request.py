"""What a caller asks for, and the jobs that it becomes. No torch here: the server and the scheduler import this."""

from __future__ import annotations

import random
from collections.abc import Hashable
from dataclasses import dataclass, field, fields, replace
from enum import StrEnum
from functools import cached_property
from typing import Any

from stepbatch.checks import check_float, check_int, check_text
from stepbatch.errors import InvalidValue, RequestError
from stepbatch.image import InputImage
from stepbatch.model_info import ModelInfo

MAX_SEED = 2**63 - 1
MAX_OUTPUTS = 10  # as OpenAI has it
MAX_STEPS = 1000  # the training timesteps of the noise schedules that are served
MAX_GUIDANCE = 100.0
MAX_IMAGES = 16  # as OpenAI has it; a model's own limit is lower
MAX_FRAMES = 4096  # a model's own limit is lower
MAX_FPS = 240
MAX_PRIORITY = 1000
MAX_TIMEOUT = 1e6  # seconds

# What of a field must be equal for two requests to share a whole-pipeline call: nothing, its value, whether there is
# one, or how many there are.
FREE = {"signature": lambda value: None}
EQUAL = {"signature": lambda value: value}
GIVEN = {"signature": lambda value: value is not None}
COUNT = {"signature": len}


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """One call for one or more pictures or videos, validated as far as that goes without knowing the model.

    ``None`` means the model's default; ``resolve`` fills it in. Sizes are in pixels. ``guidance_scale`` and
    ``true_cfg_scale`` mean what they mean to the model's diffusers pipeline. The i-th of ``n`` outputs has the noise of
    ``torch.Generator("cpu").manual_seed(seed + i)``.

    ``images`` alone are what an editing model's prompt speaks of. With ``strength``, from 0 to 1, an image is where
    denoising starts, and less of the steps are taken (image-to-image); with ``mask`` only what is 255 there changes
    (inpainting). A model that makes videos of ``num_frames`` pictures, ``fps`` a second, begins them with an image.
    ``guidance_scale_2`` is for the second transformer of models that have two, the one for the last, less noisy steps;
    a request that gives ``guidance_scale`` alone has that for both.

    ``timeout``, in seconds from its arrival, is when a request that hasn't begun is of no use any more; ``priority``,
    the higher the sooner, counts where the scheduling policy looks at it; ``user`` is who gets a share of the machine
    where shares are fair.

    Raises:
        InvalidValue: a field has the wrong type or is out of range; ``param`` names it.
    """

    prompt: str = field(metadata=FREE)
    negative_prompt: str | None = field(default=None, metadata=GIVEN)
    images: tuple[InputImage, ...] = field(default=(), metadata=COUNT)
    mask: InputImage | None = field(default=None, metadata=GIVEN)
    strength: float | None = field(default=None, metadata=EQUAL)
    width: int | None = field(default=None, metadata=EQUAL)
    height: int | None = field(default=None, metadata=EQUAL)
    num_frames: int | None = field(default=None, metadata=EQUAL)
    fps: int | None = field(default=None, metadata=EQUAL)
    num_inference_steps: int | None = field(default=None, metadata=EQUAL)
    guidance_scale: float | None = field(default=None, metadata=EQUAL)
    guidance_scale_2: float | None = field(default=None, metadata=EQUAL)
    true_cfg_scale: float | None = field(default=None, metadata=EQUAL)
    flow_shift: float | None = field(default=None, metadata=EQUAL)
    max_sequence_length: int | None = field(default=None, metadata=EQUAL)
    seed: int | None = field(default=None, metadata=FREE)
    n: int = field(default=1, metadata=FREE)  # each output is a job of its own
    priority: int = field(default=0, metadata=FREE)
    timeout: float | None = field(default=None, metadata=FREE)
    user: str | None = field(default=None, metadata=FREE)

    def __post_init__(self) -> None:
        check_text("prompt", self.prompt)
        if not self.prompt.strip():
            raise InvalidValue("prompt must not be empty", "prompt")
        if self.negative_prompt is not None:
            check_text("negative_prompt", self.negative_prompt)
        if (self.width is None) != (self.height is None):
            raise InvalidValue("width and height go together", "width" if self.width is None else "height")
        check_int("width", self.width, 1, 65536)
        check_int("height", self.height, 1, 65536)
        check_int("num_frames", self.num_frames, 1, MAX_FRAMES)
        check_int("fps", self.fps, 1, MAX_FPS)
        check_int("num_inference_steps", self.num_inference_steps, 1, MAX_STEPS)
        check_int("max_sequence_length", self.max_sequence_length, 1, 65536)
        check_int("n", self.n, 1, MAX_OUTPUTS, optional=False)
        check_int("seed", self.seed, 0, MAX_SEED - self.n + 1)
        check_int("priority", self.priority, -MAX_PRIORITY, MAX_PRIORITY, optional=False)
        object.__setattr__(self, "timeout", check_float("timeout", self.timeout, MAX_TIMEOUT))
        if self.timeout == 0:
            raise InvalidValue("timeout must be more than 0", "timeout")
        if self.user is not None:
            check_text("user", self.user)
        for name in ("guidance_scale", "guidance_scale_2", "true_cfg_scale", "flow_shift"):
            object.__setattr__(self, name, check_float(name, getattr(self, name), MAX_GUIDANCE))
        if self.flow_shift == 0:
            raise InvalidValue("flow_shift must be more than 0", "flow_shift")
        object.__setattr__(self, "strength", check_float("strength", self.strength, 1.0))
        if not isinstance(self.images, list | tuple):
            raise InvalidValue("images must be a list", "images")
        object.__setattr__(self, "images", tuple(self.images))
        _check_images(self)

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of a resolved request."""
        assert self.width is not None and self.height is not None
        return self.width, self.height

    @property
    def frames(self) -> int:
        """How many pictures an output of a resolved request is."""
        return self.num_frames or 1

    @cached_property
    def pixels(self) -> int:
        """How many pixels an output of a resolved request has, all its frames together."""
        width, height = self.size
        return width * height * self.frames

    @property
    def signature(self) -> tuple[Hashable, ...]:
        """What requests that share a whole-pipeline call have in common, by field."""
        return tuple(f.metadata["signature"](getattr(self, f.name)) for f in fields(self))

    @property
    def steps(self) -> int:
        """How many steps of a resolved request are taken."""
        assert self.num_inference_steps is not None
        return self.num_inference_steps - self.first_step

    @property
    def first_step(self) -> int:
        """How many of the steps of a resolved request are left out, as it starts from an image."""
        if self.strength is None:
            return 0
        assert self.num_inference_steps is not None
        kept = min(self.num_inference_steps * self.strength, self.num_inference_steps)  # as diffusers rounds
        return int(self.num_inference_steps - kept)

    def guided(self, info: ModelInfo) -> bool:
        """Whether a resolved request takes two sequences a step, the second with the negative prompt."""
        scale: float | None = getattr(self, info.guidance.field)
        if scale is None or scale <= info.guidance.off:
            return False
        return self.negative_prompt is not None or not info.guidance.needs_negative

    def without_effect(self, info: ModelInfo) -> list[str]:
        """Fields of a resolved request that the others leave without effect."""
        names = ("negative_prompt", "guidance_scale_2")
        return [] if self.guided(info) else [name for name in names if getattr(self, name) is not None]

    def resolve(self, info: ModelInfo) -> GenerationRequest:
        """The same request with every default of the model filled in and its limits checked.

        Raises:
            InvalidValue: the model can't serve a value, or has no use for a field that was given.
        """
        _check_uses(self, info)
        _check_task(self, info)
        defaults = info.defaults
        check_int("max_sequence_length", self.max_sequence_length, 1, info.max_sequence_length)
        _check_frames(self, info)
        width, height = _size(self, info)

        def default(name: str) -> Any:
            value = getattr(self, name)
            return getattr(defaults, name) if value is None and name in info.uses else value

        negative = default("negative_prompt")
        asked = getattr(self, info.guidance.field)
        if negative is None and info.guidance.needs_negative and asked is not None and asked > info.guidance.off:
            negative = ""
        resolved = replace(
            self,
            width=width,
            height=height,
            num_inference_steps=self.num_inference_steps or defaults.num_inference_steps,
            num_frames=default("num_frames"),
            fps=default("fps"),
            guidance_scale=default("guidance_scale"),
            guidance_scale_2=default("guidance_scale_2") if self.guidance_scale is None else self.guidance_scale_2,
            true_cfg_scale=default("true_cfg_scale"),
            negative_prompt=negative,
            max_sequence_length=default("max_sequence_length"),
            strength=defaults.strength if self.strength is None and self.mask else self.strength,
            seed=random.SystemRandom().randint(0, 2**32 - 1) if self.seed is None else self.seed,
        )
        if resolved.steps == 0:
            of = f"{resolved.num_inference_steps} step{'s' * (resolved.num_inference_steps != 1)}"
            raise InvalidValue(f"strength must leave a step to take: {resolved.strength:g} of {of} is none", "strength")
        return resolved


FIELDS = tuple(f.name for f in fields(GenerationRequest))
IMAGE_FIELDS = ("images", "mask")
MODEL_FIELDS = (  # that only some models have a use for
    "negative_prompt",
    "num_frames",
    "fps",
    "guidance_scale",
    "guidance_scale_2",
    "true_cfg_scale",
    "flow_shift",
    "max_sequence_length",
)


def _check_images(request: GenerationRequest) -> None:
    if len(request.images) > MAX_IMAGES:
        raise InvalidValue(f"there must be at most {MAX_IMAGES} images", "images")
    if any(not isinstance(image, InputImage) or image.channels != 3 for image in request.images):
        raise InvalidValue("images must be RGB", "images")
    for name in ("mask", "strength"):
        if getattr(request, name) is not None and not request.images:
            raise InvalidValue(f"{name} goes with an image", name)
    if request.mask is None:
        return
    if not isinstance(request.mask, InputImage) or request.mask.channels != 1:
        raise InvalidValue("mask must have one channel", "mask")
    size, wanted = (request.mask.width, request.mask.height), (request.images[0].width, request.images[0].height)
    if size != wanted:
        raise InvalidValue("mask must be {}x{} like the image, not {}x{}".format(*wanted, *size), "mask")


def _check_uses(request: GenerationRequest, info: ModelInfo) -> None:
    for name in MODEL_FIELDS:
        if getattr(request, name) is not None and name not in info.uses:
            known = [n for n in ("guidance_scale", "true_cfg_scale", "negative_prompt") if n in info.uses]
            hint = f"; it takes {', '.join(known)}" if known else ""
            raise InvalidValue(f"{name} has no effect on this model{hint}", name)


def _check_task(request: GenerationRequest, info: ModelInfo) -> None:
    """Raise ``InvalidValue``, with what the model can do, for what it can't."""
    if not request.images:
        if not {"text-to-image", "text-to-video"}.intersection(info.tasks):
            raise InvalidValue("this model needs an image: it can't work from a prompt alone", "images")
        return
    given = next((name for name in ("mask", "strength") if getattr(request, name) is not None), None)
    limit = 1 if given else info.max_images
    of_strength = "image-to-image" if request.mask is None else "inpainting"
    for name, task in (("mask", "inpainting"), ("strength", of_strength)):
        if getattr(request, name) is not None and task not in info.tasks:
            able = f"this model can do {', '.join(info.tasks)}"
            raise InvalidValue(f"{name} has no effect on this model: {able}", name)
    if request.mask is None and request.strength is None and not {"editing", "image-to-video"}.intersection(info.tasks):
        if "image-to-image" not in info.tasks:
            raise InvalidValue("this model takes no images: it works from a prompt alone", "images")
        raise InvalidValue(
            "this model can't follow an instruction about an image; give strength, for image-to-image, or mask, for "
            "inpainting",
            "strength",
        )
    if len(request.images) > limit:
        where = f"with {given}" if given else "on this model"
        raise InvalidValue(f"there must be at most {limit} image{'s' * (limit != 1)} {where}", "images")


def _check_frames(request: GenerationRequest, info: ModelInfo) -> None:
    check_int("num_frames", request.num_frames, 1, info.max_frames)
    if request.num_frames is not None and request.num_frames % info.frames_multiple != 1 % info.frames_multiple:
        less = request.num_frames - (request.num_frames - 1) % info.frames_multiple
        near = f"{less} or {less + info.frames_multiple}, not {request.num_frames}"
        raise InvalidValue(
            f"num_frames must be one more than a multiple of {info.frames_multiple}: {near}", "num_frames"
        )


def _size(request: GenerationRequest, info: ModelInfo) -> tuple[int, int]:
    width, height = request.width, request.height
    if (width is None or height is None) and request.images:
        width, height = info.auto_size.of(request.images, info.max_side, info.size_multiple)
    width, height = width or info.defaults.width, height or info.defaults.height
    for name, side in (("width", width), ("height", height)):
        if side % info.size_multiple or not info.min_side <= side <= info.max_side:
            bounds = f"from {info.min_side} to {info.max_side}"
            raise InvalidValue(f"{name} must be a multiple of {info.size_multiple} {bounds}, not {side}", name)
    return width, height


class JobState(StrEnum):
    """Where a job is; the last three are endings."""

    WAITING = "waiting"
    ENCODING = "encoding"
    RUNNING = "running"
    DECODING = "decoding"
    FINISHED = "finished"
    FAILED = "failed"
    CANCELLED = "cancelled"


_NEXT: dict[JobState, tuple[JobState, ...]] = {
    JobState.WAITING: (JobState.ENCODING,),
    JobState.ENCODING: (JobState.RUNNING,),
    JobState.RUNNING: (JobState.DECODING,),
    JobState.DECODING: (JobState.FINISHED,),
    JobState.FINISHED: (),
    JobState.FAILED: (),
    JobState.CANCELLED: (),
}
ENDINGS = (JobState.FINISHED, JobState.FAILED, JobState.CANCELLED)


@dataclass(eq=False)
class Job:
    """One output in the making.

    ``lengths`` are what a step of it costs: the tokens of each of its sequences. ``alone`` keeps company away: for jobs
    that were in a unit of work that killed the engine, and where a pipeline takes but one. A job with a ``signature``
    is denoised in one call, from the first step to the last, together with others that have the same.
    """

    request_id: str
    index: int  # which of the request's outputs
    request: GenerationRequest
    lengths: tuple[int, ...]
    arrival: float  # seconds on the monotonic clock, when the request came in at the door
    alone: bool = False
    signature: Hashable | None = None
    step: int = 0  # denoising steps taken
    state: JobState = JobState.WAITING
    error: RequestError | None = None
    times: Times = field(default_factory=lambda: Times())
    steps: int = field(init=False)  # in all
    tokens: int = field(init=False)
    squares: int = field(init=False)  # of the lengths, added up
    id: tuple[str, int] = field(init=False)

    def __post_init__(self) -> None:
        self.id = self.request_id, self.index
        self.steps = self.request.steps
        self.tokens = sum(self.lengths)
        self.squares = sum(length * length for length in self.lengths)

    @cached_property
    def pixels(self) -> int:
        """How many the output has, all its frames together."""
        return self.request.pixels

    @property
    def deadline(self) -> float | None:
        """When the job is of no use any more, on the clock of ``arrival``."""
        return None if self.request.timeout is None else self.arrival + self.request.timeout

    @property
    def seed(self) -> int:
        assert self.request.seed is not None
        return self.request.seed + self.index

    @property
    def ended(self) -> bool:
        return self.state in ENDINGS

    def to(self, state: JobState) -> None:
        """Go on to the next state of the way; an ending is reached once and never left."""
        assert state in _NEXT[self.state], f"{self.state} -> {state}"
        self.state = state

    def fail(self, error: RequestError) -> None:
        """End with ``error``."""
        assert not self.ended
        self.state, self.error = JobState.FAILED, error

    def cancel(self) -> None:
        """End without a result, as the caller wanted."""
        assert not self.ended
        self.state = JobState.CANCELLED


@dataclass
class Times:
    """Seconds that a job has spent: waiting for its first unit of work, and in each stage's units."""

    queue: float = 0.0
    encode: float = 0.0
    denoise: float = 0.0
    decode: float = 0.0
