"""Noise schedules: diffusers computes each job's, and takes its steps where one looks back at those before it."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from stepbatch.errors import InvalidValue, NotNative
from stepbatch.request import GenerationRequest

FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "predict_x0": True}  # settings of UniPC


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """One job's noise schedule."""

    sigmas: torch.Tensor  # fp32 [steps + 1]
    times: torch.Tensor  # fp32 [steps], what the transformer is told: the sigmas, or the scheduler's own timesteps
    networks: tuple[int, ...]  # [steps] which of the model's transformers predicts
    solver: UniPCMultistepScheduler | None = None  # takes the steps; without one, they are those of ``euler_step``

    @classmethod
    def of(cls, sigmas: torch.Tensor) -> NoiseSchedule:
        """Of a model with one transformer, which is told the sigma."""
        return cls(sigmas, sigmas[:-1], (0,) * (len(sigmas) - 1))

    def begin(self, step: int, device: torch.device) -> NoiseSchedule:
        """What is left of it from this step on, on a device."""
        assert step == 0 or self.solver is None
        sigmas, times = self.sigmas[step:].to(device), self.times[step:].to(device)
        return replace(self, sigmas=sigmas, times=times, networks=self.networks[step:])


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
    return _defined(own.sigmas, request)


def check_stepwise(noise_scheduler: object) -> FlowMatchEulerDiscreteScheduler | UniPCMultistepScheduler:
    """Refuse a checkpoint whose noise schedule ``stepwise_schedule`` does not make.

    Raises:
        NotNative: it is another schedule, or is set to what is not done here.
    """
    if isinstance(noise_scheduler, UniPCMultistepScheduler):
        checked, known = noise_scheduler, {"use_dynamic_shifting": False} | FLOW
    else:
        checked, known = check_flow_match(noise_scheduler), {"use_dynamic_shifting": False}
    for name, value in known.items():
        if checked.config[name] != value:
            raise NotNative(f"its noise schedule has {name} {checked.config[name]}, which has no native form")
    return checked


def is_shifted(noise_scheduler: FlowMatchEulerDiscreteScheduler | UniPCMultistepScheduler) -> bool:
    """Whether ``flow_shift`` means something to it."""
    others = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")  # they take the place of UniPC's shift
    is_multistep = isinstance(noise_scheduler, UniPCMultistepScheduler)
    return not (is_multistep and any(noise_scheduler.config[name] for name in others))


def stepwise_schedule(
    noise_scheduler: FlowMatchEulerDiscreteScheduler | UniPCMultistepScheduler, request: GenerationRequest
) -> NoiseSchedule:
    """The noise schedule of one job whose diffusers pipeline asks for a number of steps and leaves all else to it.

    Args:
        noise_scheduler: Read for its settings only.
        request: Its ``num_inference_steps``, and its ``flow_shift`` in place of the schedule's own, if it has one.

    Raises:
        InvalidValue: it is not defined for so few steps.
    """
    is_multistep = isinstance(noise_scheduler, UniPCMultistepScheduler)
    shift = {} if request.flow_shift is None else {"flow_shift" if is_multistep else "shift": request.flow_shift}
    own = type(noise_scheduler).from_config(noise_scheduler.config, **shift)
    with np.errstate(all="ignore"):
        own.set_timesteps(request.num_inference_steps)
    own.set_begin_index(0)
    schedule = NoiseSchedule.of(_defined(own.sigmas, request))
    return replace(schedule, times=own.timesteps.float(), solver=own if is_multistep else None)


def _defined(sigmas: torch.Tensor, request: GenerationRequest) -> torch.Tensor:
    if not sigmas.isfinite().all():  # a schedule whose last step is stretched to a given noise can't have one step only
        steps = request.num_inference_steps
        raise InvalidValue(f"num_inference_steps must be more than {steps} on this model", "num_inference_steps")
    return sigmas


def euler_step(latents: torch.Tensor, velocity: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
    """One step of the flow's differential equation, ``[R, C]``.

    Args:
        latents: fp32 ``[R, C]``.
        velocity: ``[R, C]``, noise minus data.
        change: fp32 ``[R, 1]``, what is added to each row's sigma.
    """
    return torch.addcmul(latents, velocity.float(), change)


def solver_step(
    solver: UniPCMultistepScheduler, latents: torch.Tensor, velocity: torch.Tensor
) -> tuple[UniPCMultistepScheduler, torch.Tensor]:
    """One step of a job whose solver looks back at the steps before.

    Args:
        solver: Stays as it is, so that the step can be taken again.
        latents: fp32 ``[N, C]``.
        velocity: ``[N, C]``, what the transformer predicts.

    Returns:
        The solver after the step, and the latents after it.
    """
    after = copy.copy(solver)
    after.model_outputs, after.timestep_list = list(solver.model_outputs), list(solver.timestep_list)
    time = solver.timesteps[solver.step_index or 0]
    before = latents.clone()[None]  # it is kept, and the latents given are overwritten
    stepped: torch.Tensor = after.step(velocity.float()[None], time, before, return_dict=False)[0]
    return after, stepped[0]
