"""Packs jobs into one forward pass, applies guidance and the noise schedule, and unpacks."""

from __future__ import annotations

import resource
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from stepbatch.config import EngineConfig
from stepbatch.engine.engine import Runner
from stepbatch.errors import InvalidModelOutput, RequestError
from stepbatch.models import load_model
from stepbatch.models.base import Model, PackedSequence
from stepbatch.models.noise_schedule import euler_step
from stepbatch.request import GenerationRequest, Job
from stepbatch.testing import FakeRunner

PROMPT_CACHE = 64  # embeddings; a large model's are megabytes


def load_runner(config: EngineConfig) -> Runner:
    """The runner that a configuration asks for.

    Raises:
        SetupError: its model can't be loaded as asked.
    """
    if config.model.backend == "fake":
        return FakeRunner(config.model)
    if config.model.num_threads:
        torch.set_num_threads(config.model.num_threads)
    return TorchRunner(load_model(config))


@dataclass(eq=False)
class Denoising:
    """What a job is between two steps."""

    prompts: list[Any]  # embeddings: its own, then the negative one where it is guided
    lengths: list[int]  # of the sequences with these prompts, tokens
    latents: torch.Tensor  # fp32 [N, C]
    sigmas: torch.Tensor  # fp32 [steps + 1]


@dataclass(eq=False)
class Guided:
    """Which rows of a step's prediction are combined."""

    positive: torch.Tensor  # [R] the row of the prediction with the job's own prompt, for each row of the latents
    rows: torch.Tensor  # [G] the rows of the latents that are guided
    negative: torch.Tensor  # [G] and their rows of the prediction with the negative prompt
    scale: torch.Tensor  # fp32 [G, 1]


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


class TorchRunner:
    """The runner of native models.

    Args:
        model: The loaded model.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self.info = model.info
        self._embeddings: OrderedDict[str, Any] = OrderedDict()
        self._states: dict[tuple[str, int], Denoising] = {}
        self._batch: Batch | None = None
        self._last_step: torch.cuda.Event | None = None

    def check(self, request: GenerationRequest) -> None:
        self.model.check(request)

    def tokens(self, request: GenerationRequest) -> int:
        return sum(self.model.length(request, prompt) for prompt in self.model.prompts(request))

    @torch.inference_mode()
    def encode(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            texts = self.model.prompts(job.request)
            prompts = [self._embedding(text) for text in texts]
            lengths = [self.model.length(job.request, text) for text in texts]
            start = self.model.start(job.request, job.seed)
            self._states[job.id] = Denoising(prompts, lengths, start.latents, start.sigmas)

    @torch.inference_mode()
    def denoise(self, jobs: Sequence[Job]) -> None:
        ordered = sorted(jobs, key=lambda job: job.tokens)  # equally long neighbours attend in one call
        if self._batch is None or self._batch.jobs != tuple(job.id for job in ordered):
            self._batch = self._pack(ordered)
        batch = self._batch
        sigma = batch.sigmas.gather(1, batch.step)
        sigma_next = batch.sigmas.gather(1, batch.step + 1)
        velocity = self.model.denoise(batch.layout, batch.latents, sigma[:, 0])
        if batch.guided is not None:
            velocity = self._guide(velocity.float(), batch.guided)
        euler_step(batch.latents, velocity, sigma[batch.row_job], sigma_next[batch.row_job])
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

    def _embedding(self, prompt: str) -> Any:
        if prompt not in self._embeddings:
            if len(self._embeddings) == PROMPT_CACHE:
                self._embeddings.popitem(last=False)
            self._embeddings[prompt] = self.model.encode(prompt)
        self._embeddings.move_to_end(prompt)
        return self._embeddings[prompt]

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
            sigmas=torch.nn.utils.rnn.pad_sequence([state.sigmas for state in states], batch_first=True),
            step=torch.tensor([[job.step] for job in jobs], device=device),
            row_job=torch.arange(len(jobs)).repeat_interleave(torch.tensor(counts)).to(device),
            guided=self._guided(jobs, sequences, slices, device),
        )

    def _sequences(
        self, jobs: Sequence[Job], states: Sequence[Denoising], slices: Sequence[slice]
    ) -> list[PackedSequence]:
        """Those of all jobs, sorted by length so that equal ones are neighbours."""
        keyed = []
        for i, (job, state) in enumerate(zip(jobs, states, strict=True)):
            width, height = job.request.width, job.request.height
            assert width is not None and height is not None
            for branch, (prompt, length) in enumerate(zip(state.prompts, state.lengths, strict=True)):
                keyed.append((length, PackedSequence(i, branch, slices[i], width, height, prompt)))
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
        request, latents = job.request, self._states[job.id].latents
        assert request.width is not None and request.height is not None
        picture = self.model.decode(latents, request.width, request.height)
        finite = torch.isfinite(latents).all() & torch.isfinite(picture).all()
        pixels = picture.mul(255).round().to(torch.uint8).cpu()
        if not finite:
            return InvalidModelOutput("the model made values that are not finite")
        return pixels.numpy().tobytes()
