"""Small machines and requests, whose seconds are sums of powers of two: what is added up has no rounding."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from stepbatch.bench.simulate.cluster import Course, Fleet, Simulation
from stepbatch.bench.simulate.curves import Curve
from stepbatch.bench.simulate.kinds import Kind, make_kind
from stepbatch.config import BatchingConfig, ModelConfig
from stepbatch.engine.cost import Costs, LinearCost, StepCost
from stepbatch.model_info import Defaults, Guidance
from stepbatch.request import GenerationRequest
from stepbatch.testing import FakeRunner

SERIAL = BatchingConfig(scheduling_policy="fcfs", dynamic_batch_max_size=1, max_batch_tokens=2**62)

MODEL = msgspec.structs.replace(
    FakeRunner(ModelConfig(backend="fake")).info,
    defaults=Defaults(width=64, height=64, num_inference_steps=4),
    uses=("negative_prompt", "true_cfg_scale", "max_sequence_length"),
    guidance=Guidance(field="true_cfg_scale", off=1.0, needs_negative=True),
)


def curve(base: float = 0.25, per_token: float = 1 / 256, encode: float = 0.0, decode: float = 0.0) -> Curve:
    """Of pictures of 16 tokens, 64 pixels square."""
    costs = Costs(
        known=True,
        step=StepCost(base=base, per_token=per_token),
        prompt=LinearCost(each=encode),
        decode=LinearCost(per_unit=decode / 64**2),
    )
    return Curve(name="made", costs=costs, model=MODEL)


def kind(of: Curve, steps: int = 4, side: int = 64, goal: float | None = None, **fields: object) -> Kind:
    request = GenerationRequest(
        prompt="x",
        width=side,
        height=side,
        num_inference_steps=steps,
        seed=0,
        **fields,  # type: ignore[arg-type]
    )
    return make_kind(request, of, goal)


def run(
    kinds: Sequence[Kind],
    times: Sequence[float] | None,
    of: Curve,
    limits: BatchingConfig | None = None,
    *,
    concurrency: int = 0,
    leaps: bool = True,
    seed: int = 0,
    **fleet: object,
) -> Course:
    """A simulation's course."""
    machines = Fleet(limits=limits or BatchingConfig(), pace=1.0, **fleet)  # type: ignore[arg-type]
    return Simulation(kinds, times, of.costs, machines, concurrency=concurrency, leaps=leaps, seed=seed).run()
