"""From a checkpoint's folder to its parts: diffusers and transformers load, and what is wrong is said in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from transformers.utils import logging as transformers_logging

from stepbatch.config import EngineConfig, ModelConfig
from stepbatch.errors import CheckpointError, InvalidValue, OptionError
from stepbatch.image import InputImage
from stepbatch.model_info import ModelInfo
from stepbatch.models.defaults import Settings, make_defaults
from stepbatch.models.layers import fuse
from stepbatch.models.weights import load_weights, read_config
from stepbatch.request import GenerationRequest

T = TypeVar("T", bound=torch.nn.Module)

PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]  # what is fetched of a repository


def find_checkpoint(path: str) -> Path:
    """The folder of a checkpoint given by folder or by repository name, which is fetched.

    Raises:
        CheckpointError: there is none.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    parts = path.split("/")
    if len(parts) != 2 or not all(parts) or parts[0] in (".", "..", "~"):
        raise CheckpointError(f"there is no folder {path}")
    try:
        return Path(snapshot_download(path, allow_patterns=FILES))
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"there is no folder {path}, and no such repository could be fetched") from error


def read_index(folder: Path) -> dict[str, Any]:
    """Read ``model_index.json`` and see that every part it lists is there, in safetensors.

    Raises:
        CheckpointError: it isn't.
    """
    try:
        index = json.loads((folder / "model_index.json").read_text())
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{folder} has no model_index.json: it is not a checkpoint in diffusers' layout"
        ) from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / 'model_index.json'} can't be read: {error}") from error
    if not isinstance(index, dict) or not isinstance(index.get("_class_name"), str):
        raise CheckpointError(f"{folder / 'model_index.json'} names no pipeline")
    for name, value in index.items():
        if isinstance(value, list) and value != [None, None]:
            _check_part(folder / name)
    return index


def _check_part(part: Path) -> None:
    files = sorted(p.name for p in part.iterdir()) if part.is_dir() else []
    if not any(f.endswith(".json") for f in files):
        raise CheckpointError(f"{part.parent} is incomplete: {part.name} is missing")
    weights = [f for f in files if f.endswith(".safetensors")]
    if not weights and any(f.endswith(PICKLED) for f in files):
        raise CheckpointError(f"{part} holds pickled weights, which could run code; only safetensors are loaded")
    if not weights and part.name not in ("scheduler", "tokenizer"):
        raise CheckpointError(f"{part.parent} is incomplete: {part.name} has no weights")
    for file in files:
        if file.endswith(".safetensors.index.json"):
            try:
                missing = {str(shard) for shard in json.loads((part / file).read_text())["weight_map"].values()} - {
                    *files
                }
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise CheckpointError(f"{part / file} is no index of weights") from error
            if missing:
                raise CheckpointError(f"{part.parent} is incomplete: {part.name}/{min(missing)} is missing")


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
    except (RuntimeError, AssertionError) as error:
        raise OptionError(f"--device {name} is not to be had here") from error
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The precision that ``--dtype`` means on this device."""
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


@dataclass(eq=False)
class Parts(Generic[T]):
    """A checkpoint's parts, loaded."""

    folder: Path
    name: str  # the folder's, or the repository's
    pipeline_class: str  # in model_index.json
    pipeline: Any  # diffusers', without a transformer, for its other parts; it is never called
    transformer: T
    transformer_config: dict[str, Any]
    device: torch.device
    dtype: torch.dtype


def load_parts(
    pipeline: type[DiffusionPipeline], transformer: Callable[[dict[str, Any]], T], folder: Path, config: ModelConfig
) -> Parts[T]:
    """Load all parts of a checkpoint, every one in the same precision.

    Args:
        pipeline: Diffusers' class for the checkpoint.
        transformer: Ours; made from the part's config.
        folder: The checkpoint.
        config: Device, precision, and whether layers are fused.

    Raises:
        CheckpointError: a part can't be loaded.
    """
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device)
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    transformer_config = read_config(folder / "transformer")
    with torch.device("meta"):
        ours = transformer(transformer_config)
    ours = load_weights(ours, folder / "transformer", device, dtype)
    if config.fuse_projections:
        fuse(ours)
    index = read_index(folder)
    # the first is ours, and the second wants packages that it can do without
    absent = {name: None for name in ("transformer", "processor") if name in index}
    try:
        rest = pipeline.from_pretrained(folder, dtype=dtype, use_safetensors=True, local_files_only=True, **absent)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, AttributeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{folder} can't be loaded: {reason}") from error
    for part, module in rest.components.items():
        if isinstance(module, torch.nn.Module):
            _check_weights(folder / part, module)
    name = checkpoint_name(folder)
    return Parts(folder, name, index["_class_name"], rest.to(device), ours, transformer_config, device, dtype)


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
    missing = sorted(set(part.state_dict()) - stored)
    if missing:
        raise CheckpointError(f"{folder} is incomplete: it has no {missing[0]}")


def model_info(
    config: EngineConfig,
    parts: Parts[T],
    values: Settings,
    *,
    size_multiple: int,
    longest_side: int,
    longest_prompt: int,
    **more: Any,
) -> ModelInfo:
    """What a loaded model says of itself; the limits given are the architecture's, the settings' may be tighter.

    Raises:
        OptionError: a ``--default-...`` flag has a value that the model can't serve.
    """
    info = ModelInfo(
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
    check_defaults(info)
    return info


def check_defaults(info: ModelInfo) -> None:
    """Raise ``OptionError`` if a request that says nothing could not be served."""
    images = () if "text-to-image" in info.tasks else (InputImage(64, 64, bytes(3 * 64 * 64)),)
    names = ("guidance_scale", "true_cfg_scale", "negative_prompt")
    values = {name: getattr(info.defaults, name) for name in names}
    try:
        GenerationRequest(prompt="any", images=images, **values).resolve(info)
    except InvalidValue as error:
        raise OptionError(f"the default {error.message}") from error


def checkpoint_name(folder: Path) -> str:
    """The name of a checkpoint's folder, or of the repository where it lies in the hub's cache."""
    for part in reversed(folder.resolve().parts):
        if part.startswith("models--"):
            return part.split("--")[-1]
    return folder.resolve().name
