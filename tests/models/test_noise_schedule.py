from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from tests.models import tiny_wan

from stepbatch import GenerationRequest
from stepbatch.models.noise_schedule import solver_step, stepwise_schedule


@pytest.mark.parametrize("steps", [1, 2, 17])
@pytest.mark.parametrize("shift", [None, 7.0])
def test_a_stepwise_schedule_is_that_of_diffusers(steps: int, shift: float | None) -> None:
    request = GenerationRequest(prompt="any", num_inference_steps=steps, flow_shift=shift)
    for own, field in ((tiny_wan.unipc(), "flow_shift"), (FlowMatchEulerDiscreteScheduler(shift=2.0), "shift")):
        given: dict[str, Any] = {} if shift is None else {field: shift}
        theirs = type(own).from_config(own.config, **given)
        theirs.set_timesteps(steps)
        ours = stepwise_schedule(own, request)
        assert ours.sigmas.equal(theirs.sigmas)
        assert ours.times.equal(theirs.timesteps.float())
        assert ours.networks == (0,) * steps
        assert isinstance(ours.solver, UniPCMultistepScheduler) == (field == "flow_shift")


def test_a_solvers_steps_are_those_of_diffusers_and_can_be_taken_again() -> None:
    generator = torch.Generator().manual_seed(0)
    latents, *velocities = torch.randn(6, 5, 4, generator=generator).unbind(0)
    theirs, expected = scheduled(len(velocities)), latents[None].clone()
    solver = scheduled(len(velocities))
    for time, velocity in zip(theirs.timesteps, velocities, strict=True):
        expected = theirs.step(velocity[None], time, expected).prev_sample
        state = (solver.step_index, list(solver.model_outputs), solver.lower_order_nums)
        (after, once), (_, again) = (solver_step(solver, latents, velocity) for _ in range(2))
        assert (solver.step_index, list(solver.model_outputs), solver.lower_order_nums) == state
        assert once.equal(again)
        assert once.equal(expected[0])
        solver = after
        latents.copy_(once)  # as the runner does


def scheduled(steps: int) -> UniPCMultistepScheduler:
    made = tiny_wan.unipc()
    made.set_timesteps(steps)
    made.set_begin_index(0)
    return made
