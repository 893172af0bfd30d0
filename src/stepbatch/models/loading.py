"""From a checkpoint's folder to its parts: diffusers and transformers load, or they are made with random weights."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import diffusers
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from stepbatch.config import EngineConfig, MemoryConfig
from stepbatch.errors import CheckpointError, OptionError
from stepbatch.model_info import ModelInfo
from stepbatch.models.checkpoint import checkpoint_name, read_index
from stepbatch.models.defaults import Settings, make_defaults
from stepbatch.models.dummy import SMALL_SETTINGS, dummy_components, dummy_module, transformer_config
from stepbatch.models.finite import mark_infinite
from stepbatch.models.layers import fuse
from stepbatch.models.offload import CPU, offload_blocks, offload_network, offload_part, possible_offload
from stepbatch.models.weights import load_weights

T = TypeVar("T", bound=torch.nn.Module)

FAULTS = (OSError, ValueError, KeyError, TypeError, RuntimeError, AttributeError)  # of files, as the loaders tell them
OLD_NAMES = {  # of a VAE's attention
    ".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn.",
}  # fmt: skip
TRANSFORMERS = ("transformer", "transformer_2")
NETWORKS = (*TRANSFORMERS, "unet")  # parts of pipelines that denoise
LOADING = (*FAULTS, ImportError, SafetensorError)


def choose_device(name: str) -> torch.device:
    """The device that ``--device`` means.

    Raises:
        OptionError: there is no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
        if device.type == "cuda" and device.index is not None:  # set_device takes no other
            torch.cuda.set_device(device)  # events and streams are of the current one
    except (RuntimeError, AssertionError) as error:
        raise OptionError(f"--device {name} is not to be had here") from error
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The precision that ``--dtype`` means on this device."""
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


@dataclass(eq=False, kw_only=True)
class Loaded:
    """A checkpoint's parts as diffusers loads them, and what is known of it."""

    name: str  # the folder's, or the repository's
    pipeline_class: str  # in model_index.json
    pipeline: Any  # diffusers'
    settings: dict[str, Any]  # that go before the family's
    device: torch.device
    dtype: torch.dtype


@dataclass(eq=False, kw_only=True)
class Parts(Loaded, Generic[T]):
    """The same where transformers are ours: ``pipeline`` has none, and is never called."""

    transformers: tuple[T, ...]  # in the order asked for
    transformer_config: dict[str, Any]  # the first one's

    @property
    def transformer(self) -> T:
        return self.transformers[0]


@dataclass(frozen=True, kw_only=True)
class _Target:
    """Where a checkpoint's parts are to lie, and as what."""

    device: torch.device
    dtype: torch.dtype
    memory: MemoryConfig
    dummy: bool
    small: bool  # dummies with hardly any width or depth


def load_parts(
    pipeline: type[DiffusionPipeline],
    transformer: Callable[[dict[str, Any]], T],
    folder: Path,
    config: EngineConfig,
    names: Sequence[str] = ("transformer",),
) -> Parts[T]:
    """Load all parts of a checkpoint, every one in the same precision.

    Args:
        pipeline: Diffusers' class for the checkpoint.
        transformer: Ours; made from the part's config.
        folder: The checkpoint.
        config: Device, precision, whether layers are fused, and what stays in the CPU's memory.
        names: The folders of the checkpoint's transformers.

    Raises:
        CheckpointError: a part can't be loaded.
    """
    target = _target(config)
    device, dtype, memory = target.device, target.dtype, target.memory
    index = read_index(folder, weights=False)
    configs = [transformer_config(folder, target.small, name) for name in names]
    where = CPU if memory.dit_layerwise_offload else device
    if target.dummy:
        ours = [dummy_module(partial(transformer, c), where, dtype, seed, device) for seed, c in enumerate(configs)]
        made_on = CPU if memory.text_encoder_cpu_offload or memory.vae_cpu_offload else device
        parts = dummy_components(folder, made_on, dtype, target.small, drawn_on=device, left_out=TRANSFORMERS)
        rest = pipeline(**parts, transformer=None)
    else:
        with torch.device("meta"):
            empty = [transformer(values) for values in configs]
        ours = [load_weights(module, folder / name, where, dtype) for name, module in zip(names, empty, strict=True)]
        rest = _load_rest(pipeline, folder, index, dtype)
    for module in ours:
        if config.model.fuse_projections:
            fuse(module)
            if where.type == "cuda":
                torch.cuda.empty_cache()  # of the single layers, which no other tensor's size matches
        if memory.dit_layerwise_offload:
            offload_blocks(module, device)
    loaded = _placed(rest, folder, index, target)
    return Parts(**vars(loaded), transformers=tuple(ours), transformer_config=configs[0])


def load_pipeline(folder: Path, config: EngineConfig) -> Loaded:
    """Load a checkpoint as the pipeline of diffusers that it is, every part in the same precision.

    Raises:
        CheckpointError: diffusers has no such pipeline, or a part can't be loaded.
    """
    target = _target(config)
    index = read_index(folder, weights=not target.dummy)
    kind = _pipeline_class(index["_class_name"])
    diffusers_logging.set_verbosity_error()  # calls have the same warnings for every request
    if target.dummy:
        made = _dummy_pipeline(kind, folder, index, target)
    else:
        made = _load_rest(DiffusionPipeline, folder, {}, target.dtype)
    return _placed(made, folder, index, target)


def _target(config: EngineConfig) -> _Target:
    device = choose_device(config.model.device)
    dtype = choose_dtype(config.model.dtype, device)
    memory = possible_offload(config.memory, device)
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    dummy = config.model.load_format == "dummy"
    small = dummy and config.model.dummy_size == "small"
    return _Target(device=device, dtype=dtype, memory=memory, dummy=dummy, small=small)


def _placed(pipeline: Any, folder: Path, index: dict[str, Any], target: _Target) -> Loaded:
    """Bring every part of a pipeline to where it is to lie, and have what is not finite stay so."""
    for part, module in pipeline.components.items():
        if isinstance(module, torch.nn.Module):
            _place(part, module, target.device, target.memory)
            mark_infinite(module)
    return Loaded(
        name=checkpoint_name(folder),
        pipeline_class=index["_class_name"],
        pipeline=pipeline,
        settings=SMALL_SETTINGS if target.small else {},
        device=target.device,
        dtype=target.dtype,
    )


def _pipeline_class(name: str) -> type[DiffusionPipeline]:
    try:
        found = getattr(diffusers, name)
    except AttributeError as error:
        raise CheckpointError(f"diffusers {diffusers.__version__} has no {name}") from error
    if not (isinstance(found, type) and issubclass(found, DiffusionPipeline)):
        raise CheckpointError(
            f"diffusers can't run a {name} here: it is no pipeline, or wants a package that is missing"
        )
    return found


def _dummy_pipeline(kind: type[DiffusionPipeline], folder: Path, index: dict[str, Any], target: _Target) -> Any:
    memory, device = target.memory, target.device
    offloaded = memory.dit_layerwise_offload or memory.text_encoder_cpu_offload or memory.vae_cpu_offload
    made_on = CPU if offloaded else device
    known = inspect.signature(kind).parameters
    try:
        parts = dummy_components(folder, made_on, target.dtype, target.small, drawn_on=device, left_out=())
        return kind(**parts, **{name: value for name, value in index.items() if name in known and name not in parts})
    except FAULTS as error:
        raise CheckpointError(f"{folder} can't be made with random weights: {error}") from error


def _load_rest(pipeline: type[DiffusionPipeline], folder: Path, index: dict[str, Any], dtype: torch.dtype) -> Any:
    """A pipeline without transformers, which are ours, and a processor, which wants packages it can do without."""
    absent = {name: None for name in (*TRANSFORMERS, "processor") if name in index}
    try:
        rest = pipeline.from_pretrained(folder, dtype=dtype, use_safetensors=True, local_files_only=True, **absent)
    except LOADING as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{folder} can't be loaded: {reason}") from error
    for part, module in rest.components.items():
        if isinstance(module, torch.nn.Module):
            _check_weights(folder / part, module)
    return rest


def _check_weights(folder: Path, part: torch.nn.Module) -> None:
    """The loaders only warn of a parameter that no file has, and leave it random."""
    stored: set[str] = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118, it is no dict
                names = key.split(".")
                stored.update(
                    ".".join(names[i:]) for i in range(len(names))
                )  # a file may have its parts under a prefix
    state = part.state_dict(keep_vars=True)
    # one of two that are tied is enough
    present = {id(value) for name, value in state.items() if not stored.isdisjoint(_file_names(name, part))}
    missing = sorted(name for name, value in state.items() if id(value) not in present)
    if missing:
        raise CheckpointError(f"{folder} is incomplete: it has no {missing[0]}")


def _file_names(name: str, part: torch.nn.Module) -> set[str]:
    """What files may call a parameter: transformers renames parts, of a language model that got eyes for one."""
    pieces = name.split(".")
    if not isinstance(part, PreTrainedModel):
        old = next((name.replace(new, old) for new, old in OLD_NAMES.items() if new in name), name)
        return {name, old}
    renamed = ".".join(pieces[1:]), ".".join(pieces[:1] + pieces[2:])
    return {name, *(other for other in renamed if "." in other)}  # "weight" alone is anything's


def _place(name: str, part: torch.nn.Module, device: torch.device, memory: MemoryConfig) -> None:
    """Bring a part to where its weights are to lie."""
    if isinstance(part, AutoencoderKL):
        part.to(memory_format=torch.channels_last)  # convolutions are faster so
    if (name == "vae" and memory.vae_cpu_offload) or (
        name.startswith("text_encoder") and memory.text_encoder_cpu_offload
    ):
        offload_part(part, device)
    elif name in NETWORKS and memory.dit_layerwise_offload:
        offload_network(part, device)
    else:
        part.to(device)


def model_info(
    config: EngineConfig,
    parts: Loaded,
    values: Settings,
    *,
    size_multiple: int,
    longest_side: int,
    longest_prompt: int,
    **more: Any,
) -> ModelInfo:
    """What a loaded model says of itself; the limits given are the architecture's, the settings' may be tighter."""
    return ModelInfo(
        id=config.model.served_model_name or parts.name,
        path=config.model.model_path,
        pipeline=parts.pipeline_class,
        device=str(parts.device),
        dtype=str(parts.dtype).removeprefix("torch."),
        size_multiple=size_multiple,
        min_side=max(values.min_side, size_multiple),
        max_side=min(values.max_side, longest_side) // size_multiple * size_multiple,
        max_sequence_length=longest_prompt,
        defaults=make_defaults(values, config.defaults),
        **more,
    )
