"""A transformer's weights: from its files straight to the device, whatever precision they are stored in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from stepbatch.errors import CheckpointError

FILE = "diffusion_pytorch_model.safetensors"
M = TypeVar("M", bound=nn.Module)


def load_weights(module: M, folder: Path, device: torch.device, dtype: torch.dtype) -> M:
    """Fill a module that was made on the meta device; its parameters need no gradients then.

    Args:
        module: Has the parameter names of the files.
        folder: Has diffusers' safetensors files, one or several with an index.
        device: Where the weights go.
        dtype: What they become.

    Raises:
        CheckpointError: a parameter is missing, is one too many or has another shape.
    """
    state: dict[str, torch.Tensor] = {}
    try:
        for file in _files(folder):
            with safe_open(file, "pt", device=str(device)) as tensors:
                for name in tensors.keys():  # noqa: SIM118, it is no dict
                    state[name] = tensors.get_tensor(name).to(dtype)
        missing, unexpected = module.load_state_dict(state, strict=False, assign=True)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{folder} can't be loaded: {str(error).strip().splitlines()[-1].strip()}") from error
    if missing:
        raise CheckpointError(f"{folder} is incomplete: it has no {missing[0]}")
    if unexpected:
        raise CheckpointError(f"{folder} has {unexpected[0]}, which this architecture has no place for")
    return module.requires_grad_(False)


def _files(folder: Path) -> list[Path]:
    index = folder / f"{FILE}.index.json"
    if not index.exists():
        return [folder / FILE]
    shards: dict[str, str] = json.loads(index.read_text())["weight_map"]
    return [folder / name for name in sorted(set(shards.values()))]


def read_config(folder: Path) -> dict[str, Any]:
    """A part's ``config.json``.

    Raises:
        CheckpointError: there is none.
    """
    return read_json(folder / "config.json")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        CheckpointError: it isn't there, or is something else.
    """
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} can't be read: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is no JSON object")
    return value
