"""How far a step's prediction is from diffusers' with the same weights and inputs, and in company from alone."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from parts.common import SEED
from parts.families import STEPS, Call, Pair, Size, their_step, unguided
from stepbatch.models.base import Embedding, PackedSequence
from stepbatch.models.dummy import CONFIGS
from stepbatch.request import GenerationRequest

COMPANY = 4  # pictures in a batch
SHALLOW = {  # layers of parts of every family, by their names in configs
    "num_layers": 2,
    "num_single_layers": 2,
    "n_layers": 2,
    "num_hidden_layers": 2,
    "depth": 2,
    "layer_types": ["full_attention"] * 2,
    "fullatt_block_indexes": [1],
}


@dataclass(eq=False)
class Member:
    """A picture that is denoised."""

    request: GenerationRequest
    latents: torch.Tensor  # fp32 [N, C]
    sigma: torch.Tensor  # fp32, a number
    embedding: Embedding


@torch.inference_mode()
def members(pair: Pair, sizes: list[Size]) -> list[Member]:
    """A picture of each size, each with noise of its own, all at the step at which ``their_step`` is."""
    model, found = pair.ours, []
    for seed, size in enumerate(sizes, start=SEED):
        request = unguided(model, size, STEPS)
        (embedding,) = model.encode(model.prompts(request))
        start = model.start(request, seed, [])
        found.append(Member(request, start.latents, start.schedule.sigmas[STEPS - 1], embedding))
    return found


@torch.inference_mode()
def ours(pair: Pair, packed: list[Member]) -> list[torch.Tensor]:
    """The velocity of each picture's rows, fp32 ``[N, C]``, from one packed forward pass."""
    at, sequences = 0, []
    for job, member in enumerate(packed):
        rows = slice(at, at + len(member.latents))
        sequences.append((rows.stop - rows.start, PackedSequence(job, 0, rows, member.request, member.embedding)))
        at = rows.stop
    ordered = [sequence for _, sequence in sorted(sequences, key=lambda pair: pair[0])]
    latents = torch.cat([member.latents for member in packed])
    sigma = torch.stack([member.sigma for member in packed])
    out = pair.ours.denoise(pair.ours.layout(ordered), latents, sigma).float()
    parts = out.split([s.latents.stop - s.latents.start for s in ordered])
    return [rows for _, rows in sorted(zip([s.job for s in ordered], parts, strict=True), key=lambda pair: pair[0])]


def theirs(pair: Pair, call: Call, batch: list[Member]) -> list[torch.Tensor]:
    """The same from diffusers' transformer, for pictures of one size; ``call`` is of as many."""
    space, (width, height) = pair.ours.space, batch[0].request.size
    if "hidden_states" in call.kwargs:  # [B, N, C]
        given = torch.stack([member.latents for member in batch]).to(pair.dtype)
        out = Call(call.transformer, call.args, call.kwargs | {"hidden_states": given})()
        return list(out.float())
    pictures = [space.unpack(member.latents, width, height).unsqueeze(1).to(pair.dtype) for member in batch]
    out = Call(call.transformer, (pictures, *call.args[1:]), call.kwargs)()  # data minus noise, [C, 1, h, w] each
    return [-space.pack(picture.squeeze(1).float()) for picture in out]


def difference(rows: torch.Tensor, reference: torch.Tensor) -> dict[str, float]:
    """How far two predictions are apart: the largest difference, and its length over the reference's."""
    a, b = rows.double(), reference.double()
    return {
        "max_abs": float((a - b).abs().max()),
        "relative": float(torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(b)),
        "reference_rms": float(b.square().mean().sqrt()),
    }


def compare(pair: Pair, size: Size, other: Size) -> dict[str, dict[str, float]]:
    """A picture's prediction by both sides, alone and among others; of the others, some have another size."""
    equal, mixed = members(pair, [size] * COMPANY), members(pair, [size, other, size, other])
    one = equal[:1]  # the first of ``mixed`` is the same
    alone, (reference,) = ours(pair, one), theirs(pair, their_step(pair, size, 1), one)
    in_batch = theirs(pair, their_step(pair, size, COMPANY), equal)
    assert all(bool(torch.isfinite(rows).all()) for rows in (*alone, reference))
    return {
        "ours, against diffusers'": difference(alone[0], reference),
        "ours among mixed sizes, against alone": difference(ours(pair, mixed)[0], alone[0]),
        "ours among equal sizes, against alone": difference(ours(pair, equal)[0], alone[0]),
        "diffusers' in a batch, against alone": difference(in_batch[0], reference),
    }


def shallow_configs(name: str, folder: Path) -> Path:
    """Configs of a packaged model at its own width with a few layers, in a folder of its name within ``folder``."""
    copied = Path(shutil.copytree(CONFIGS / name, folder / name))
    for path in copied.glob("*/config.json"):
        if path.parent.name != "vae":
            path.write_text(json.dumps(_shallow(json.loads(path.read_text()))))
    return copied


def _shallow(values: dict[str, Any]) -> dict[str, Any]:
    return {
        name: SHALLOW[name] if name in SHALLOW else _shallow(value) if isinstance(value, dict) else value
        for name, value in values.items()
    }
