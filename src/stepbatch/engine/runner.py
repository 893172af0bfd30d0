"""Packs jobs into one forward pass, applies guidance and the noise schedule, and unpacks."""

from __future__ import annotations

import resource
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from stepbatch.config import MemoryConfig
from stepbatch.engine.cache import ByteCache
from stepbatch.engine.engine import Tick
from stepbatch.errors import InvalidModelOutput, RequestError
from stepbatch.models.base import Blend, Embedding, Model, PackedSequence, Prompt, Start
from stepbatch.models.latents import Posterior
from stepbatch.models.noise_schedule import euler_step
from stepbatch.request import GenerationRequest, Job


@dataclass(eq=False)
class Denoising:
    """What a job is between two steps."""

    prompts: list[Embedding]  # its own, then the negative one where it is guided
    lengths: list[int]  # of the sequences with these prompts, tokens
    start: Start
    latents: torch.Tensor  # fp32 [N, C]


@dataclass(eq=False)
class Guided:
    """Which rows of a step's prediction are combined."""

    positive: torch.Tensor  # [R] the row of the prediction with the job's own prompt, for each row of the latents
    rows: torch.Tensor  # [G] the rows of the latents that are guided
    negative: torch.Tensor  # [G] and their rows of the prediction with the negative prompt
    scale: torch.Tensor  # fp32 [G, 1]


@dataclass(eq=False)
class Blended:
    """The rows of a step's latents that are of inpainted pictures."""

    rows: torch.Tensor  # [B]
    blend: Blend  # of all of them, fp32 [B, C] each


@dataclass(eq=False)
class Batch:
    """Jobs that step together, packed; kept from step to step while its members stay the same."""

    jobs: tuple[tuple[str, int], ...]
    latents: torch.Tensor  # fp32 [R, C]; each job's ``Denoising.latents`` is a slice of it
    layout: Any  # the model's
    sigmas: torch.Tensor  # fp32 [J, most steps + 1]
    step: torch.Tensor  # [J, 1] how many steps each job has taken
    row_job: torch.Tensor  # [R]
    guided: Guided | None
    blended: Blended | None


class TorchRunner:
    """The runner of native models.

    Args:
        model: The loaded model.
        memory: How much may be kept of what has been encoded.
    """

    def __init__(self, model: Model, memory: MemoryConfig | None = None) -> None:
        self.model = model
        self.info = model.info
        self.whole_calls = False
        room = (memory or MemoryConfig()).embedding_cache_mb * 2**20
        self._encoded: ByteCache[Embedding | Posterior] = ByteCache(int(room))
        self._states: dict[tuple[str, int], Denoising] = {}
        self._batch: Batch | None = None
        self._last_step: torch.cuda.Event | None = None

    def check(self, request: GenerationRequest) -> None:
        self.model.check(request)

    def tokens(self, request: GenerationRequest) -> int:
        return sum(self.model.length(request, prompt) for prompt in self.model.prompts(request))

    def signature(self, request: GenerationRequest) -> None:
        return None

    def shares(self, request: GenerationRequest) -> bool:
        return True

    @torch.inference_mode()
    def encode(self, jobs: Sequence[Job]) -> None:
        prompts = {job.request_id: self.model.prompts(job.request) for job in jobs}
        embeddings = self._embeddings([prompt for of_request in prompts.values() for prompt in of_request])
        images: dict[str, list[Posterior]] = {}
        states = {}
        for job in jobs:
            request, own = job.request, prompts[job.request_id]
            if job.request_id not in images:
                images[job.request_id] = self._images(request)
            start = self.model.start(request, job.seed, images[job.request_id])
            lengths = [self.model.length(request, prompt) for prompt in own]
            states[job.id] = Denoising([embeddings[prompt.key] for prompt in own], lengths, start, start.latents)
        self._states.update(states)

    @torch.inference_mode()
    def denoise(self, jobs: Sequence[Job], tick: Tick) -> None:
        ordered = sorted(jobs, key=lambda job: job.tokens)  # equally long neighbours attend in one call
        if self._batch is None or self._batch.jobs != tuple(job.id for job in ordered):
            self._batch = self._pack(ordered)
        batch = self._batch
        sigma = batch.sigmas.gather(1, batch.step)
        sigma_next = batch.sigmas.gather(1, batch.step + 1)
        velocity = self.model.denoise(batch.layout, batch.latents, sigma[:, 0])
        if batch.guided is not None:
            velocity = self._guide(velocity.float(), batch.guided)
        after = sigma_next[batch.row_job]
        latents = euler_step(batch.latents, velocity, sigma[batch.row_job], after)
        if batch.blended is not None:
            _blend(latents, batch.blended, after)
        batch.latents.copy_(latents)  # only now, when nothing can fail any more, so that a step can be tried again
        batch.step += 1
        self._stay_close()

    @torch.inference_mode()
    def decode(self, jobs: Sequence[Job]) -> list[bytes | RequestError]:
        return [self._picture(job) for job in jobs]

    def forget(self, job: Job) -> None:
        self._states.pop(job.id, None)
        if self._batch is not None and job.id in self._batch.jobs:
            self._batch = None

    def peak_memory_mb(self) -> float:
        if self.model.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.model.device) / 2**20
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10

    def latents(self, job: Job) -> torch.Tensor:
        """A job's latents as they are now, fp32 ``[N, C]``."""
        return self._states[job.id].latents

    def _stay_close(self) -> None:
        """Let the host be one step ahead of the device, to keep it busy, and no more: cancels and clocks stay true."""
        if self.model.device.type != "cuda":
            return
        if self._last_step is not None:
            self._last_step.synchronize()
        self._last_step = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._last_step.record()

    def _embeddings(self, prompts: Sequence[Prompt]) -> dict[Any, Embedding]:
        """Those of these prompts, by key; the new ones are encoded together."""
        found: dict[Any, Embedding] = {}
        new: dict[Any, Prompt] = {}
        for prompt in prompts:
            known = self._encoded.get(prompt.key)
            if isinstance(known, Embedding):
                found[prompt.key] = known
            else:
                new[prompt.key] = prompt
        if new:
            for key, embedding in zip(new, self.model.encode(list(new.values())), strict=True):
                found[key] = embedding
                self._encoded.put(key, embedding)
        return found

    def _images(self, request: GenerationRequest) -> list[Posterior]:
        """A request's images through the VAE, at the sizes that the model wants them, one at a time."""
        seen = []
        for image, size in zip(request.images, self.model.image_sizes(request), strict=True):
            key = image.digest, size
            known = self._encoded.get(key)
            if not isinstance(known, Posterior):
                known = self.model.encode_image(image, *size)
                self._encoded.put(key, known)
            seen.append(known)
        return seen

    def _pack(self, jobs: Sequence[Job]) -> Batch:
        states = [self._states[job.id] for job in jobs]
        counts = [len(state.latents) for state in states]
        latents = torch.cat([state.latents for state in states])
        slices, at = [], 0
        for state, count in zip(states, counts, strict=True):
            slices.append(slice(at, at + count))
            state.latents = latents[slices[-1]]
            at += count
        sequences = self._sequences(jobs, states, slices)
        device = latents.device
        return Batch(
            jobs=tuple(job.id for job in jobs),
            latents=latents,
            layout=self.model.layout(sequences),
            sigmas=torch.nn.utils.rnn.pad_sequence([state.start.sigmas for state in states], batch_first=True),
            step=torch.tensor([[job.step] for job in jobs], device=device),
            row_job=torch.arange(len(jobs)).repeat_interleave(torch.tensor(counts)).to(device),
            guided=self._guided(jobs, sequences, slices, device),
            blended=_blended(states, slices, device),
        )

    def _sequences(
        self, jobs: Sequence[Job], states: Sequence[Denoising], slices: Sequence[slice]
    ) -> list[PackedSequence]:
        """Those of all jobs, sorted by length so that equal ones are neighbours."""
        keyed = []
        for i, (job, state) in enumerate(zip(jobs, states, strict=True)):
            for branch, (prompt, length) in enumerate(zip(state.prompts, state.lengths, strict=True)):
                sequence = PackedSequence(i, branch, slices[i], job.request, prompt, state.start.references)
                keyed.append((length, sequence))
        return [sequence for _, sequence in sorted(keyed, key=lambda pair: pair[0])]

    def _guided(
        self, jobs: Sequence[Job], sequences: Sequence[PackedSequence], slices: Sequence[slice], device: torch.device
    ) -> Guided | None:
        if len(sequences) == len(jobs) and all(s.job == i for i, s in enumerate(sequences)):
            return None  # the prediction's rows are the latents' rows
        predicted: tuple[dict[int, torch.Tensor], dict[int, torch.Tensor]] = {}, {}  # by branch and job
        at = 0
        for sequence in sequences:
            count = sequence.latents.stop - sequence.latents.start
            predicted[sequence.branch][sequence.job] = torch.arange(at, at + count)
            at += count
        positive, negative = predicted
        empty = torch.empty(0, dtype=torch.long)
        scales = [torch.full((len(rows), 1), self.model.scale(jobs[i].request)) for i, rows in negative.items()]
        return Guided(
            positive=torch.cat([positive[i] for i in range(len(jobs))]).to(device),
            rows=torch.cat([empty, *(torch.arange(slices[i].start, slices[i].stop) for i in negative)]).to(device),
            negative=torch.cat([empty, *negative.values()]).to(device),
            scale=torch.cat([torch.empty(0, 1), *scales]).to(device),
        )

    def _guide(self, prediction: torch.Tensor, guided: Guided) -> torch.Tensor:
        positive = prediction.index_select(0, guided.positive)
        if len(guided.rows) == 0:
            return positive
        combined = self.model.guide(
            positive.index_select(0, guided.rows), prediction.index_select(0, guided.negative), guided.scale
        )
        return positive.index_copy_(0, guided.rows, combined)

    def _picture(self, job: Job) -> bytes | RequestError:
        latents = self._states[job.id].latents
        picture = self.model.decode(latents, job.request)
        finite = torch.isfinite(latents).all() & torch.isfinite(picture).all()
        pixels = picture.mul(255).round().to(torch.uint8).cpu()
        if not finite:
            return InvalidModelOutput("the model made values that are not finite")
        return pixels.numpy().tobytes()


def _blended(states: Sequence[Denoising], slices: Sequence[slice], device: torch.device) -> Blended | None:
    members = [(state.start.blend, rows) for state, rows in zip(states, slices, strict=True) if state.start.blend]
    if not members:
        return None
    blends = [blend for blend, _ in members]
    return Blended(
        rows=torch.cat([torch.arange(rows.start, rows.stop) for _, rows in members]).to(device),
        blend=Blend(
            image=torch.cat([blend.image for blend in blends]),
            noise=torch.cat([blend.noise for blend in blends]),
            mask=torch.cat([blend.mask for blend in blends]),
        ),
    )


def _blend(latents: torch.Tensor, blended: Blended, sigma: torch.Tensor) -> None:
    """Put back, in place, what is outside of the masks, as noisy as the rest is now."""
    blend, level = blended.blend, sigma.index_select(0, blended.rows)
    kept = level * blend.noise + (1 - level) * blend.image
    painted = latents.index_select(0, blended.rows)
    latents.index_copy_(0, blended.rows, (1 - blend.mask) * kept + blend.mask * painted)
