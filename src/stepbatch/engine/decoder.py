"""Latents to pixels: in one go; in slices between the steps of others, one output at a time; or beside their steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from stepbatch.engine.clock import DeviceClock
from stepbatch.engine.side_stream import Beside, SideStream
from stepbatch.engine.sliced import Sliced
from stepbatch.errors import InvalidModelOutput, RequestError
from stepbatch.models.base import Model
from stepbatch.request import Job

JobId = tuple[str, int]


@dataclass(eq=False)
class _Paused:
    """What goes on at the next call."""

    job: JobId
    work: Sliced[bytes | RequestError]


class Decoder:
    """Decodes jobs; at most one is paused, and any number are decoded beside steps.

    Args:
        model: Whose VAE it is.
        clock: Of its device.
    """

    def __init__(self, model: Model, clock: DeviceClock) -> None:
        self.model = model
        self.clock = clock
        self._side = SideStream(model.device)
        self._beside: dict[JobId, Beside] = {}
        self._paused: _Paused | None = None
        self._crowded: JobId | None = None  # what isn't to be paused: there was no room for a step beside it

    def decode(self, job: Job, latents: torch.Tensor, seconds: float) -> bytes | RequestError | None:
        """Begin with a job, or go on with it.

        Args:
            job: Another that is paused is given up, and begins anew when its turn comes.
            latents: Its own, fp32 ``[N, C]``.
            seconds: When they are over, it pauses before the VAE's next layer.

        Returns:
            RGB pixels, 8 bits each, or what is wrong with them; ``None`` where it isn't done.
        """
        if job.id in self._beside:
            return _picture(self._beside.pop(job.id).wait())
        if self._paused is None or self._paused.job != job.id:
            self._abandon()
            work = partial(self._decode, job, latents)
            if seconds == math.inf or job.id == self._crowded:
                return work()
            self._paused = _Paused(job.id, Sliced(self.model.space.vae, work, self.clock))
        paused, self._paused = self._paused, None  # nothing is, if this raises
        if paused.work.go_on(seconds):
            return paused.work.result
        self._paused = paused
        return None

    def decode_beside(self, job: Job, latents: torch.Tensor) -> bytes | RequestError | None:
        """Begin with a job, or look whether it is done, and wait for nothing."""
        if job.id not in self._beside:
            self._abandon()  # a VAE for videos can be at one only
            self._beside[job.id] = self._side.begin(partial(self._pixels, job, latents), latents)
        if not self._beside[job.id].done:
            return None
        return _picture(self._beside.pop(job.id).wait())

    def before_encoding(self) -> None:
        """Called before the VAE encodes: one for videos keeps on itself what it has seen of the frames before."""
        if self._paused and self.model.space.is_video:
            paused, self._paused = self._paused, None
            paused.work.go_on(math.inf)
            self._paused = paused

    def forget(self, job: JobId) -> None:
        """Give up a job, if it is paused or being decoded beside steps."""
        self._beside.pop(job, None)
        if self._paused and self._paused.job == job:
            self._abandon()

    def make_room(self) -> None:
        """Give up what is paused, which is done in one go later; and wait until what is beside steps is done."""
        for beside in self._beside.values():
            beside.wait()
        if self._paused:
            self._crowded = self._paused.job
            self._abandon()

    def _abandon(self) -> None:
        """Give up what is paused, if anything is."""
        if self._paused:
            self._paused.work.abandon()
            self._paused = None
            if self.model.space.is_video:
                self.model.space.vae.clear_cache()  # which it would have done at its end

    def _decode(self, job: Job, latents: torch.Tensor) -> bytes | RequestError:
        return _picture([tensor.cpu() for tensor in self._pixels(job, latents)])

    def _pixels(self, job: Job, latents: torch.Tensor) -> list[torch.Tensor]:
        """A picture, 8 bits each, and whether all is finite."""
        picture = self.model.decode(latents, job.request)
        finite = torch.isfinite(latents).all() & torch.isfinite(picture).all()
        return [picture.mul_(255).round_().to(torch.uint8, memory_format=torch.contiguous_format), finite]


def _picture(made: Sequence[torch.Tensor]) -> bytes | RequestError:
    pixels, finite = made
    return pixels.numpy().tobytes() if finite else InvalidModelOutput("the model made values that are not finite")
