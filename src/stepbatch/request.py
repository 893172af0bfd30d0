"""What a caller asks for, and the jobs that it becomes. No torch here: the server and the scheduler import this."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, fields, replace
from enum import StrEnum
from typing import Any

from stepbatch.errors import InvalidValue, RequestError
from stepbatch.model_info import ModelInfo

MAX_SEED = 2**63 - 1
MAX_OUTPUTS = 10  # as OpenAI has it
MAX_STEPS = 1000  # the training timesteps of the noise schedules that are served
MAX_GUIDANCE = 100.0
MAX_PROMPT_CHARACTERS = 32_000  # as OpenAI has it; the model's own limit is in tokens


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """One call for one or more pictures, validated as far as that goes without knowing the model.

    ``None`` means the model's default; ``resolve`` fills it in. Sizes are in pixels. ``guidance_scale`` is the strength
    of classifier-free guidance in the meaning that the model's diffusers pipeline gives it. The i-th of ``n`` outputs
    has the noise of ``torch.Generator("cpu").manual_seed(seed + i)``.

    Raises:
        InvalidValue: a field has the wrong type or is out of range; ``param`` names it.
    """

    prompt: str
    negative_prompt: str | None = None
    width: int | None = None
    height: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    true_cfg_scale: float | None = None
    flow_shift: float | None = None
    max_sequence_length: int | None = None
    seed: int | None = None
    n: int = 1

    def __post_init__(self) -> None:
        _check_text("prompt", self.prompt)
        if not self.prompt.strip():
            raise InvalidValue("prompt must not be empty", "prompt")
        if self.negative_prompt is not None:
            _check_text("negative_prompt", self.negative_prompt)
        if (self.width is None) != (self.height is None):
            raise InvalidValue("width and height go together", "width" if self.width is None else "height")
        _check_int("width", self.width, 1, 65536)
        _check_int("height", self.height, 1, 65536)
        _check_int("num_inference_steps", self.num_inference_steps, 1, MAX_STEPS)
        _check_int("max_sequence_length", self.max_sequence_length, 1, 65536)
        _check_int("n", self.n, 1, MAX_OUTPUTS, optional=False)
        _check_int("seed", self.seed, 0, MAX_SEED - self.n + 1)
        for name in ("guidance_scale", "true_cfg_scale", "flow_shift"):
            value = _check_float(name, getattr(self, name))
            object.__setattr__(self, name, value)
        if self.flow_shift == 0:
            raise InvalidValue("flow_shift must be more than 0", "flow_shift")

    def without_effect(self) -> list[str]:
        """Fields of a resolved request that the others leave without effect."""
        return ["negative_prompt"] if self.guidance_scale == 0 else []  # nothing is guided away from it

    def resolve(self, info: ModelInfo) -> GenerationRequest:
        """The same request with every default of the model filled in and its limits checked.

        Raises:
            InvalidValue: the model can't serve a value, or has no use for a field that was given.
        """
        for name in ("negative_prompt", "guidance_scale", "true_cfg_scale", "flow_shift", "max_sequence_length"):
            if getattr(self, name) is not None and name not in info.uses:
                known = [n for n in ("guidance_scale", "true_cfg_scale", "negative_prompt") if n in info.uses]
                hint = f"; it takes {', '.join(known)}" if known else ""
                raise InvalidValue(f"{name} has no effect on this model{hint}", name)
        defaults = info.defaults
        width, height = self.width or defaults.width, self.height or defaults.height
        for name, side in (("width", width), ("height", height)):
            if side % info.size_multiple or not info.min_side <= side <= info.max_side:
                bounds = f"from {info.min_side} to {info.max_side}"
                raise InvalidValue(f"{name} must be a multiple of {info.size_multiple} {bounds}, not {side}", name)
        _check_int("max_sequence_length", self.max_sequence_length, 1, info.max_sequence_length)

        def default(name: str) -> Any:
            value = getattr(self, name)
            return getattr(defaults, name) if value is None and name in info.uses else value

        return replace(
            self,
            width=width,
            height=height,
            num_inference_steps=self.num_inference_steps or defaults.num_inference_steps,
            guidance_scale=default("guidance_scale"),
            negative_prompt=default("negative_prompt"),
            max_sequence_length=default("max_sequence_length"),
            seed=random.SystemRandom().randint(0, 2**32 - 1) if self.seed is None else self.seed,
        )


FIELDS = tuple(f.name for f in fields(GenerationRequest))


def _check_text(name: str, value: object) -> None:
    if not isinstance(value, str):
        raise InvalidValue(f"{name} must be a string", name)
    if len(value) > MAX_PROMPT_CHARACTERS:
        raise InvalidValue(f"{name} must have at most {MAX_PROMPT_CHARACTERS} characters", name)
    if any("\ud800" <= c <= "\udfff" for c in value):
        raise InvalidValue(f"{name} must be valid Unicode", name)


def _check_int(name: str, value: object, low: int, high: int, optional: bool = True) -> None:
    if value is None and optional:
        return
    if not isinstance(value, int) or isinstance(value, bool):
        raise InvalidValue(f"{name} must be an integer", name)
    if not low <= value <= high:
        raise InvalidValue(f"{name} must be from {low} to {high}", name)  # a huge value can't even be printed


def _check_float(name: str, value: object) -> float | None:
    if value is None:
        return None
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise InvalidValue(f"{name} must be a number", name)
    if not 0 <= value <= MAX_GUIDANCE:  # NaN isn't either
        raise InvalidValue(f"{name} must be a finite number from 0 to {MAX_GUIDANCE:g}", name)
    return float(value)


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

    ``tokens`` is what a step of it costs: the lengths of its sequences added up. ``alone`` keeps company away, for jobs
    that were in a unit of work that killed the engine.
    """

    request_id: str
    index: int  # which of the request's outputs
    request: GenerationRequest
    tokens: int
    arrival: float  # seconds on the monotonic clock, when the request came in at the door
    alone: bool = False
    step: int = 0  # denoising steps taken
    state: JobState = JobState.WAITING
    error: RequestError | None = None
    times: Times = field(default_factory=lambda: Times())

    @property
    def id(self) -> tuple[str, int]:
        return self.request_id, self.index

    @property
    def seed(self) -> int:
        assert self.request.seed is not None
        return self.request.seed + self.index

    @property
    def steps(self) -> int:
        assert self.request.num_inference_steps is not None
        return self.request.num_inference_steps

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
