"""Noise schedules: diffusers computes each job's sigmas; steps are then taken on stacked tensors."""

from __future__ import annotations

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from stepbatch.errors import InvalidValue, NotNative
from stepbatch.request import GenerationRequest


def check_flow_match(noise_scheduler: object) -> FlowMatchEulerDiscreteScheduler:
    """Refuse a checkpoint whose noise schedule ``euler_step`` does not take.

    Raises:
        NotNative: it is another schedule, or one that draws noise at each step.
    """
    if not isinstance(noise_scheduler, FlowMatchEulerDiscreteScheduler):
        raise NotNative(f"its noise schedule is {type(noise_scheduler).__name__}, which has no native form")
    if noise_scheduler.config["stochastic_sampling"]:
        raise NotNative("its noise schedule draws noise at each step (stochastic_sampling), which has no native form")
    return noise_scheduler


def flow_match_sigmas(
    noise_scheduler: FlowMatchEulerDiscreteScheduler, request: GenerationRequest, image_tokens: int
) -> torch.Tensor:
    """The sigmas of one job, as its diffusers pipeline makes them.

    Args:
        noise_scheduler: Read for its settings only; it is shared by all jobs and has no state of theirs.
        request: Its ``num_inference_steps``, and its ``flow_shift`` in place of the schedule's own, if it has one.
        image_tokens: Where the schedule depends on the picture's size, this is its size.

    Returns:
        fp32 ``[steps + 1]``, from 1 or near it to 0.

    Raises:
        InvalidValue: it is not defined for so few steps.
    """
    config = noise_scheduler.config
    own = FlowMatchEulerDiscreteScheduler.from_config(config)
    if request.flow_shift is not None:
        own.set_shift(request.flow_shift)
    steps = request.num_inference_steps
    assert steps is not None
    mu = calculate_shift(
        image_tokens,
        config["base_image_seq_len"],
        config["max_image_seq_len"],
        config["base_shift"],
        config["max_shift"],
    )
    with np.errstate(all="ignore"):
        own.set_timesteps(sigmas=torch.linspace(1.0, 1 / steps, steps).tolist(), mu=mu)
    sigmas: torch.Tensor = own.sigmas
    if not sigmas.isfinite().all():  # a schedule whose last step is stretched to a given noise can't have one step only
        raise InvalidValue(f"num_inference_steps must be more than {steps} on this model", "num_inference_steps")
    return sigmas


def euler_step(
    latents: torch.Tensor, velocity: torch.Tensor, sigma: torch.Tensor, sigma_next: torch.Tensor
) -> torch.Tensor:
    """One step of the flow's differential equation, ``[R, C]``.

    Args:
        latents: fp32 ``[R, C]``.
        velocity: ``[R, C]``, noise minus data.
        sigma: fp32 ``[R, 1]``, each row's now.
        sigma_next: fp32 ``[R, 1]``, each row's after this step.
    """
    return torch.addcmul(latents, velocity.float(), sigma_next - sigma)
