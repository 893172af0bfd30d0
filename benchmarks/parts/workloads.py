"""The four workloads on which servers are compared, and the checkpoints that they serve."""

from __future__ import annotations

import itertools
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from stepbatch.bench.options import DatasetOptions, LoadOptions, RequestOptions
from stepbatch.demo.scenes import sample_scene

SEED = 2026
WARMUP = 2  # requests before each load
SIZE, STEPS = "128x128", 8  # where they are not mixed
MIXED_SIZES = ("128x128", "128x160", "160x128", "160x160", "192x192")
MIXED_STEPS = (4, 6, 8, 10, 12)  # their mean is STEPS
NEGATIVE = "a black ring"
PROMPT_TOKENS = 64  # that prompts are padded to, or may have at most: theirs have fewer
POISSON_LOAD = 0.7  # of what one request at a time can serve

Name = Literal["same", "steps", "everything", "poisson"]
WORKLOADS: tuple[Name, ...] = ("same", "steps", "everything", "poisson")


@dataclass(frozen=True)
class Checkpoint:
    """A model that all servers load, and what its requests ask for."""

    name: str
    path: str
    guidance: float  # where it is not mixed
    mixed_guidance: tuple[float, ...]
    negative_prompts: tuple[str | None, ...] = (None,)  # where everything is mixed


def choices(checkpoint: Checkpoint, workload: Name) -> dict[str, tuple[Any, ...]]:
    """What a workload's requests ask for: of each field one of these, each as often as the others."""
    everything = workload in ("everything", "poisson")
    return {
        "size": MIXED_SIZES if everything else (SIZE,),
        "num_inference_steps": (STEPS,) if workload == "same" else MIXED_STEPS,
        "guidance_scale": checkpoint.mixed_guidance if everything else (checkpoint.guidance,),
        "negative_prompt": checkpoint.negative_prompts if everything else (None,),
    }


def profiles(checkpoint: Checkpoint, workload: Name) -> list[dict[str, Any]]:
    """The same as ``stepbatch bench serving`` takes it: every combination."""
    fields = choices(checkpoint, workload)
    products = (dict(zip(fields, values, strict=True)) for values in itertools.product(*fields.values()))
    return [{name: value for name, value in product.items() if value is not None} for product in products]


def write_prompts(path: Path, workload: Name, count: int) -> Path:
    """A file of prompts, none of which another workload has: what a server remembers of prompts is of no use."""
    rng = random.Random(f"{SEED} {workload}")
    prompts: dict[str, None] = {}
    while len(prompts) < count:
        prompts.setdefault(sample_scene(rng).prompt())
    path.write_text("\n".join(prompts) + "\n")
    return path


def load(
    checkpoint: Checkpoint, workload: Name, prompts: Path, count: int, concurrency: int, rate: float
) -> tuple[DatasetOptions, RequestOptions, LoadOptions]:
    """What ``stepbatch bench serving`` would be told; ``rate`` is that of the Poisson arrivals, requests a second."""
    limits = {"request_rate": rate} if workload == "poisson" else {"max_concurrency": concurrency}
    return (
        DatasetOptions(dataset="text", dataset_path=str(prompts), num_prompts=count, seed=SEED),
        RequestOptions(
            random_request_config=json.dumps(profiles(checkpoint, workload)),
            extra_body=json.dumps({"max_sequence_length": PROMPT_TOKENS}),
        ),
        LoadOptions(warmup_requests=WARMUP, **limits),
    )
