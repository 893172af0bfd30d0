"""Fakes for the seams, so that most tests, and load tests of all that is around the model, need no torch."""

from __future__ import annotations

import hashlib
import math
import os
import random
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence

import msgspec

from stepbatch.config import ModelConfig
from stepbatch.engine.clock import DeviceClock
from stepbatch.engine.meter import Encoded, encoded_anew
from stepbatch.errors import DeviceLost, InvalidModelOutput, InvalidValue, RequestError
from stepbatch.image import InputImage
from stepbatch.model_info import Defaults, ModelInfo
from stepbatch.request import GenerationRequest, Job

DEATH = 17  # the exit status of a process that was asked to end


class FakeRunner:
    """A runner whose steps take a fixed time and whose pictures are one colour, made from prompt, seed and images.

    Decoding takes ``decode_seconds`` an output, and ``--fake-memory-tokens`` limits what a step has memory for.

    With ``--fake-videos`` it makes videos instead, from a prompt and perhaps an image; each frame has another colour.

    Words in a prompt make it misbehave: ``[raise-check]``, ``[raise-encode]``, ``[raise-denoise]``, ``[raise-decode]``
    raise there, ``[die-check]``, ``[die-encode]``, ``[die-denoise]`` or ``[die]``, ``[die-decode]`` end the process
    there, ``[nan]`` makes invalid output, ``[hang]`` never comes back from a step, nor does ``[spin]``, which is busy
    meanwhile, ``[lost]`` loses the device in one, and ``[long]`` is refused as over-long. ``[noise]`` draws noise,
    whose files are large.
    """

    def __init__(self, config: ModelConfig) -> None:
        self.whole_calls = False
        self.clock = DeviceClock()
        self.step_seconds = config.fake_step_ms / 1000
        self.decode_seconds = 0.0  # of an output
        self.memory_tokens = config.fake_memory_tokens or math.inf
        self.steps: deque[list[tuple[str, int]]] = deque(maxlen=1000)  # the jobs of the last steps
        self._left: dict[tuple[str, int], float] = {}  # seconds, of decodings under way
        self.info = ModelInfo(
            id=config.served_model_name or "fake",
            path=config.model_path,
            pipeline="FakePipeline",
            device="cpu",
            dtype="float32",
            size_multiple=16,
            min_side=16,
            max_side=2048,
            max_sequence_length=512,
            defaults=Defaults(width=64, height=64, num_inference_steps=4, guidance_scale=1.0),
            uses=("guidance_scale", "negative_prompt", "max_sequence_length"),
            tasks=("text-to-image", "image-to-image", "inpainting", "editing"),
            max_images=4,
        )
        if config.fake_videos:
            self.info = msgspec.structs.replace(
                self.info,
                pipeline="FakeVideoPipeline",
                defaults=msgspec.structs.replace(self.info.defaults, num_frames=9, fps=8, guidance_scale_2=1.0),
                uses=(*self.info.uses, "num_frames", "fps", "guidance_scale_2", "flow_shift"),
                tasks=("text-to-video", "image-to-video"),
                max_images=1,
                frames_multiple=4,
                max_frames=121,
            )

    @staticmethod
    def pixels(prompt: str, seed: int, width: int, height: int, images: Sequence[InputImage] = ()) -> bytes:
        """The picture of a prompt, a seed and images, a mask being the last of them, as RGB bytes."""
        source = f"{prompt} {seed}".encode() + b"".join(image.digest for image in images)
        if "[noise]" in prompt:
            return random.Random(source).randbytes(3 * width * height)
        return hashlib.sha256(source).digest()[:3] * (width * height)

    @classmethod
    def video(
        cls, prompt: str, seed: int, width: int, height: int, frames: int, images: Sequence[InputImage] = ()
    ) -> bytes:
        """The frames of a video, one after the other, each the picture of a longer prompt."""
        return b"".join(cls.pixels(f"{prompt} {frame}", seed, width, height, images) for frame in range(frames))

    def check(self, request: GenerationRequest) -> None:
        if "[long]" in request.prompt:
            raise InvalidValue("prompt is too long", "prompt")
        self._fail("check", [request])

    def lengths(self, request: GenerationRequest) -> tuple[int, ...]:
        assert request.width is not None and request.height is not None
        pixels = request.width * request.height
        if request.mask is None and request.strength is None:  # what is edited stands beside what is drawn
            pixels += sum(image.width * image.height for image in request.images)
        return (pixels // 256 * request.frames,) * (2 if request.guidance_scale else 1)

    def signature(self, request: GenerationRequest) -> Hashable | None:
        return None

    def shares(self, request: GenerationRequest) -> bool:
        return True

    def encode(self, jobs: Sequence[Job]) -> Encoded:
        self._fail("encode", [job.request for job in jobs])
        return encoded_anew(jobs)

    def denoise(self, jobs: Sequence[Job], tick: Callable[[int, int], None]) -> None:
        self._fail("denoise", [job.request for job in jobs])
        if any("[lost]" in job.request.prompt for job in jobs):
            raise DeviceLost("asked to by [lost]")
        if sum(job.tokens for job in jobs) > self.memory_tokens:
            raise MemoryError("as if there were no more")
        if any("[die]" in job.request.prompt for job in jobs):
            os._exit(DEATH)
        while any("[hang]" in job.request.prompt for job in jobs):
            time.sleep(60)
        while any("[spin]" in job.request.prompt for job in jobs):
            pass
        time.sleep(self.step_seconds)
        self.steps.append([job.id for job in jobs])

    def decode(self, jobs: Sequence[Job], seconds: float = math.inf) -> list[bytes | RequestError | None]:
        self._fail("decode", [job.request for job in jobs])
        pictures: list[bytes | RequestError | None] = []
        for job in jobs:
            left = self._left.pop(job.id, self.decode_seconds)
            spent = min(left, max(seconds, 0.0))
            time.sleep(spent)
            seconds -= spent
            if spent < left:
                self._left[job.id] = left - spent
            pictures.append(None if spent < left else self._picture(job))
        return pictures

    def decode_beside(self, jobs: Sequence[Job]) -> list[bytes | RequestError | None]:
        return self.decode(jobs)

    def forget(self, job: Job) -> None:
        self._left.pop(job.id, None)

    def peak_memory_mb(self) -> float:
        return 0.0

    def memory_budget(self) -> float:
        return math.inf

    def streamed_seconds(self) -> float:
        return 0.0

    def free_memory(self) -> None:
        pass

    def _picture(self, job: Job) -> bytes | RequestError:
        request = job.request
        if "[nan]" in request.prompt:
            return InvalidModelOutput("the model made values that are not finite")
        assert request.width is not None and request.height is not None
        images = (*request.images, request.mask) if request.mask else request.images
        if request.num_frames:
            return self.video(request.prompt, job.seed, request.width, request.height, request.num_frames, images)
        return self.pixels(request.prompt, job.seed, request.width, request.height, images)

    @staticmethod
    def _fail(where: str, requests: Sequence[GenerationRequest]) -> None:
        """Raise, or end the process, if a request asks for it here."""
        if any(f"[raise-{where}]" in request.prompt for request in requests):
            raise RuntimeError(f"asked to by [raise-{where}]")
        if any(f"[die-{where}]" in request.prompt for request in requests):
            os._exit(DEATH)


class WholeCallRunner(FakeRunner):
    """The same where all of a job's steps are one call; ``[single]`` in a prompt keeps company away."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.whole_calls = True
        self.calls: list[list[tuple[str, int]]] = []  # the jobs of each

    def signature(self, request: GenerationRequest) -> Hashable | None:
        return request.signature

    def shares(self, request: GenerationRequest) -> bool:
        return "[single]" not in request.prompt

    def denoise(self, jobs: Sequence[Job], tick: Callable[[int, int], None]) -> None:
        self.calls.append([job.id for job in jobs])
        steps = jobs[0].steps
        for step in range(1, steps + 1):
            super().denoise(jobs, tick)
            tick(step, steps)
