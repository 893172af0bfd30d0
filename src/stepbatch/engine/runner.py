"""Packs jobs into one forward pass of each transformer, applies guidance and the noise schedule, and unpacks."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from stepbatch.config import MemoryConfig
from stepbatch.engine import device_memory
from stepbatch.engine.cache import ByteCache
from stepbatch.engine.clock import DeviceClock
from stepbatch.engine.decoder import Decoder
from stepbatch.engine.device_errors import device_errors
from stepbatch.engine.engine import Tick
from stepbatch.engine.meter import Encoded
from stepbatch.errors import RequestError
from stepbatch.models.base import Blend, Embedding, Model, PackedSequence, Prompt, Start
from stepbatch.models.latents import Posterior
from stepbatch.models.noise_schedule import NoiseSchedule, euler_step, solver_step
from stepbatch.request import GenerationRequest, Job


@dataclass(eq=False)
class Denoising:
    """What a job is between two steps."""

    prompts: list[Embedding]  # its own, then the negative one where it is guided
    lengths: list[int]  # of the sequences with these prompts, tokens
    start: Start
    latents: torch.Tensor  # fp32 [N, C]
    schedule: NoiseSchedule  # with the state of its solver, where it has one


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
    """Jobs that step together by one transformer, packed; kept from step to step while its members stay the same."""

    network: int
    jobs: tuple[tuple[str, int], ...]
    states: list[Denoising]
    slices: list[slice]  # each job's rows
    latents: torch.Tensor  # fp32 [R, C]; each job's ``Denoising.latents`` is a slice of it
    layout: Any  # the model's
    times: torch.Tensor  # fp32 [J, most steps], what the transformer is told
    sigmas: torch.Tensor  # fp32 [J, most steps + 1]
    changes: torch.Tensor  # fp32 [J, most steps], of sigma
    step: torch.Tensor  # [J, 1] how many steps each job has taken
    row_job: torch.Tensor  # [R]
    guided: Guided | None
    blended: Blended | None


@dataclass(eq=False)
class Taken:
    """A step that a batch may take: nothing is changed yet."""

    latents: torch.Tensor  # fp32 [R, C]
    schedules: list[NoiseSchedule]  # of the jobs


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
        self.clock = DeviceClock(model.device)
        room = (memory or MemoryConfig()).embedding_cache_mb * 2**20
        self._encoded: ByteCache[Embedding | Posterior] = ByteCache(int(room))
        self._states: dict[tuple[str, int], Denoising] = {}
        self._batches: list[Batch] = []
        self._decoder = Decoder(model, self.clock)

    def check(self, request: GenerationRequest) -> None:
        self.model.check(request)

    def lengths(self, request: GenerationRequest) -> tuple[int, ...]:
        return tuple(self.model.length(request, prompt) for prompt in self.model.prompts(request))

    def signature(self, request: GenerationRequest) -> None:
        return None

    def shares(self, request: GenerationRequest) -> bool:
        return True

    @torch.inference_mode()
    @device_errors()
    def encode(self, jobs: Sequence[Job]) -> Encoded:
        prompts = {job.request_id: self.model.prompts(job.request) for job in jobs}
        embeddings, made = self._embeddings([prompt for of_request in prompts.values() for prompt in of_request])
        encoded = Encoded(made, [])
        images: dict[str, list[Posterior]] = {}
        states = {}
        for job in jobs:
            request, own = job.request, prompts[job.request_id]
            if job.request_id not in images:
                images[job.request_id], made = self._images(request)
                encoded.images.extend([request.pixels] * made)
            start = self.model.start(request, job.seed, images[job.request_id])
            lengths = [self.model.length(request, prompt) for prompt in own]
            embedded = [embeddings[prompt.key] for prompt in own]
            states[job.id] = Denoising(embedded, lengths, start, start.latents, start.schedule)
        self._states.update(states)
        return encoded

    @torch.inference_mode()
    @device_errors()
    def denoise(self, jobs: Sequence[Job], tick: Tick) -> None:
        batches = self._pack_anew(jobs)
        predicted = [self._predict(batch) for batch in batches]
        taken = [_take(batch, velocity) for batch, velocity in zip(batches, predicted, strict=True)]
        for batch, step in zip(batches, taken, strict=True):
            _keep(batch, step)  # only now, when nothing can fail any more, so that a step can be tried again
        self.clock.stay_close()

    @torch.inference_mode()
    @device_errors()
    def decode(self, jobs: Sequence[Job], seconds: float = math.inf) -> list[bytes | RequestError | None]:
        until = time.perf_counter() + seconds
        pictures: list[bytes | RequestError | None] = []
        for job in jobs:
            time_up = pictures and time.perf_counter() >= until
            left = until - time.perf_counter()
            pictures.append(None if time_up else self._decoder.decode(job, self.latents(job), left))
        return pictures

    @torch.inference_mode()
    @device_errors()
    def decode_beside(self, jobs: Sequence[Job]) -> list[bytes | RequestError | None]:
        return [self._decoder.decode_beside(job, self.latents(job)) for job in jobs]

    def forget(self, job: Job) -> None:
        self._states.pop(job.id, None)
        self._batches = [batch for batch in self._batches if job.id not in batch.jobs]
        self._decoder.forget(job.id)

    def peak_memory_mb(self) -> float:
        return device_memory.peak_mb(self.model.device)

    def memory_budget(self) -> float:
        return device_memory.budget(self.model.device)

    def streamed_seconds(self) -> float:
        away = device_memory.bytes_away(self.model.transformer, self.model.device)
        return away * device_memory.seconds_per_byte(self.clock) if away else 0.0

    def free_memory(self) -> None:
        self._decoder.make_room()
        self._encoded.clear()
        self._batches = []
        device_memory.release(self.model.device)

    def latents(self, job: Job) -> torch.Tensor:
        """A job's latents as they are now, fp32 ``[N, C]``."""
        return self._states[job.id].latents

    def _embeddings(self, prompts: Sequence[Prompt]) -> tuple[dict[Any, Embedding], int]:
        """Those of these prompts, by key, and how many are new; these are encoded together."""
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
        return found, len(new)

    def _images(self, request: GenerationRequest) -> tuple[list[Posterior], int]:
        """A request's images through the VAE, at the sizes that the model wants, one at a time; how many are new."""
        seen, new = [], 0
        for image, size in zip(request.images, self.model.image_sizes(request), strict=True):
            key = image.digest, size
            known = self._encoded.get(key)
            if not isinstance(known, Posterior):
                self._decoder.before_encoding()
                known = self.model.encode_image(image, *size)
                self._encoded.put(key, known)
                new += 1
            seen.append(known)
        return seen, new

    def _pack_anew(self, jobs: Sequence[Job]) -> list[Batch]:
        """A batch for each transformer that the next steps of these jobs need; those are kept that are as they were."""
        members: dict[int, list[Job]] = {}
        for job in sorted(jobs, key=lambda job: job.tokens):  # equally long neighbours attend in one call
            members.setdefault(self._states[job.id].schedule.networks[job.step], []).append(job)
        wanted = {(network, tuple(job.id for job in of)): of for network, of in members.items()}
        known = {(batch.network, batch.jobs): batch for batch in self._batches}
        self._batches = [batch for key, batch in known.items() if key in wanted]
        for key, of in wanted.items():
            if key not in known:
                self._batches.append(self._pack(of, key[0]))
        return self._batches

    def _predict(self, batch: Batch) -> torch.Tensor:
        """The velocity of each row of the latents, guided."""
        time = batch.times.gather(1, batch.step)[:, 0]
        velocity = self.model.denoise(batch.layout, batch.latents, time)
        return velocity if batch.guided is None else self._guide(velocity.float(), batch.guided)

    def _pack(self, jobs: Sequence[Job], network: int) -> Batch:
        states = [self._states[job.id] for job in jobs]
        counts = [len(state.latents) for state in states]
        latents = torch.cat([state.latents for state in states])
        slices, at = [], 0
        for state, count in zip(states, counts, strict=True):
            slices.append(slice(at, at + count))
            state.latents = latents[slices[-1]]
            at += count
        sequences = self._sequences(jobs, states, slices, network)
        device = latents.device
        schedules = [state.schedule for state in states]
        sigmas = pad_sequence([schedule.sigmas for schedule in schedules], batch_first=True)
        return Batch(
            network=network,
            jobs=tuple(job.id for job in jobs),
            states=states,
            slices=slices,
            latents=latents,
            layout=self.model.layout(sequences),
            times=pad_sequence([schedule.times for schedule in schedules], batch_first=True),
            sigmas=sigmas,
            changes=sigmas.diff(),
            step=torch.tensor([[job.step] for job in jobs], device=device),
            row_job=torch.arange(len(jobs)).repeat_interleave(torch.tensor(counts)).to(device),
            guided=self._guided(jobs, sequences, slices, network, device),
            blended=_blended(states, slices, device),
        )

    def _sequences(
        self, jobs: Sequence[Job], states: Sequence[Denoising], slices: Sequence[slice], network: int
    ) -> list[PackedSequence]:
        """Those of all jobs, sorted by length so that equal ones are neighbours."""
        keyed = []
        for i, (job, state) in enumerate(zip(jobs, states, strict=True)):
            for branch, (prompt, length) in enumerate(zip(state.prompts, state.lengths, strict=True)):
                sequence = PackedSequence(i, branch, slices[i], job.request, prompt, state.start.references, network)
                keyed.append((length, sequence))
        return [sequence for _, sequence in sorted(keyed, key=lambda pair: pair[0])]

    def _guided(
        self,
        jobs: Sequence[Job],
        sequences: Sequence[PackedSequence],
        slices: Sequence[slice],
        network: int,
        device: torch.device,
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
        strengths = {i: self.model.scale(jobs[i].request, network) for i in negative}
        scales = [torch.full((len(rows), 1), strengths[i]) for i, rows in negative.items()]
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


def _take(batch: Batch, velocity: torch.Tensor) -> Taken:
    """The step of each job along its noise schedule."""
    schedules = [state.schedule for state in batch.states]
    if schedules[0].solver is not None:
        return _take_each(batch, velocity)
    latents = euler_step(batch.latents, velocity, batch.changes.gather(1, batch.step)[batch.row_job])
    if batch.blended is not None:
        _blend(latents, batch.blended, batch.sigmas.gather(1, batch.step + 1)[batch.row_job])
    return Taken(latents, schedules)


def _take_each(batch: Batch, velocity: torch.Tensor) -> Taken:
    """Likewise where steps look back at those before: job by job."""
    latents, schedules = [], []
    for state, rows in zip(batch.states, batch.slices, strict=True):
        assert state.schedule.solver is not None
        solver, after = solver_step(state.schedule.solver, batch.latents[rows], velocity[rows])
        latents.append(after)
        schedules.append(replace(state.schedule, solver=solver))
    return Taken(torch.cat(latents), schedules)


def _keep(batch: Batch, taken: Taken) -> None:
    batch.latents.copy_(taken.latents)
    batch.step += 1
    for state, schedule in zip(batch.states, taken.schedules, strict=True):
        state.schedule = schedule


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
