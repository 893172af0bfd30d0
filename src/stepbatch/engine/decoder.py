"""Latents to pixels: in one go, or in slices between the steps of others, one output at a time."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch

from stepbatch.engine.clock import DeviceClock
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
    """Decodes jobs; at most one is paused.

    Args:
        model: Whose VAE it is.
        clock: Of its device.
    """

    def __init__(self, model: Model, clock: DeviceClock) -> None:
        self.model = model
        self.clock = clock
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
        if self._paused is None or self._paused.job != job.id:
            self.abandon()
            work = partial(self._picture, job, latents)
            if seconds == math.inf or job.id == self._crowded:
                return work()
            self._paused = _Paused(job.id, Sliced(self.model.space.vae, work, self.clock))
        paused, self._paused = self._paused, None  # nothing is, if this raises
        if paused.work.go_on(seconds):
            return paused.work.result
        self._paused = paused
        return None

    def before_encoding(self) -> None:
        """Called before the VAE encodes: one for videos keeps on itself what it has seen of the frames before."""
        if self._paused and self.model.space.is_video:
            paused, self._paused = self._paused, None
            paused.work.go_on(math.inf)
            self._paused = paused

    def abandon(self, job: JobId | None = None) -> None:
        """Give up what is paused, if anything is; with ``job``, if that is it."""
        if self._paused and job in (None, self._paused.job):
            self._paused.work.abandon()
            self._paused = None
            if self.model.space.is_video:
                self.model.space.vae.clear_cache()  # which it would have done at its end

    def make_room(self) -> None:
        """Give up what is paused; it is done in one go later."""
        if self._paused:
            self._crowded = self._paused.job
            self.abandon()

    def _picture(self, job: Job, latents: torch.Tensor) -> bytes | RequestError:
        picture = self.model.decode(latents, job.request)
        finite = torch.isfinite(latents).all() & torch.isfinite(picture).all()
        pixels = picture.mul_(255).round_().to(torch.uint8, memory_format=torch.contiguous_format).cpu()
        if not finite:
            return InvalidModelOutput("the model made values that are not finite")
        return pixels.numpy().tobytes()
