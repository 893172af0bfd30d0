"""A checkpoint's folder: where it is, and whether everything that it lists is there."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from safetensors import SafetensorError, safe_open

from stepbatch.config import ModelConfig
from stepbatch.errors import CheckpointError
from stepbatch.models.defaults import OVERRIDES_FILE
from stepbatch.models.dummy import CONFIGS as PACKAGED
from stepbatch.models.dummy import packaged_config
from stepbatch.models.foreign_code import check_no_code
from stepbatch.models.weights import read_json

PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
CONFIGS = ("*.json", "*.txt", "*.model", "*.jinja")  # what is fetched of each part of a repository
WEIGHTS = ("*.safetensors",)
WEIGHTLESS = re.compile(r"(Processor|FeatureExtractor|Scheduler)(Fast|Pil)?$")  # classes of parts, beside tokenizers
VARIANTS = ["*.fp16.*", "*.bf16.*", "*.fp8.*"]  # the same weights again, and not fetched


def find_checkpoint(config: ModelConfig) -> Path:
    """The folder of ``config.model_path``: a folder, or a repository, which is fetched.

    For random weights, configs are enough: those of some models come with this package.

    Raises:
        CheckpointError: there is none.
    """
    path, dummy = config.model_path, config.load_format == "dummy"
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_file():
        why = "pickled weights, which could run code" if folder.suffix in PICKLED else "a file"
        raise CheckpointError(f"{path} is {why}; a checkpoint is a folder in diffusers' layout, with safetensors")
    packaged = packaged_config(path)
    if dummy and packaged:
        return packaged
    parts = path.split("/")
    if len(parts) != 2 or not all(parts) or parts[0] in (".", "..", "~"):
        raise CheckpointError(f"there is no folder {path}")
    try:
        return _fetch(path, CONFIGS if dummy else CONFIGS + WEIGHTS)
    except GatedRepoError as error:
        raise CheckpointError(f"{path} is for those who accepted its licence: log in with hf auth login") from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(f"there is no folder {path}, and no such repository on Hugging Face") from error
    except (OSError, ValueError, RuntimeError) as error:
        if dummy:
            known = ", ".join(sorted(folder.name for folder in PACKAGED.iterdir()))
            raise CheckpointError(f"there are no configs of {path} here or within reach, but of {known}") from error
        hint = "; --load-format dummy needs none of its files" if packaged else ""
        raise CheckpointError(
            f"there is no folder {path}, and the repository is neither in the cache nor within reach{hint}"
        ) from error


def _fetch(repository: str, patterns: tuple[str, ...]) -> Path:
    """The index and, of the parts it lists, what matches: many a repository has all weights in one more file."""
    folder = Path(snapshot_download(repository, allow_patterns=["model_index.json", OVERRIDES_FILE]))
    index = read_json(folder / "model_index.json")
    parts = [name for name, value in index.items() if isinstance(value, list)]
    wanted = [f"{part}/{pattern}" for part in parts for pattern in patterns]
    wanted += ["model_index.json", OVERRIDES_FILE]
    return Path(snapshot_download(repository, allow_patterns=wanted, ignore_patterns=VARIANTS))


def read_index(folder: Path, weights: bool = True) -> dict[str, Any]:
    """Read ``model_index.json`` and see that every part it lists is there, in safetensors, and that none brings code.

    Args:
        folder: The checkpoint.
        weights: Whether it is more than configs.

    Raises:
        CheckpointError: it isn't.
    """
    if not (folder / "model_index.json").exists():
        raise CheckpointError(f"{folder} has no model_index.json: it is not a checkpoint in diffusers' layout")
    index = read_json(folder / "model_index.json")
    check_no_code(folder, index)
    if not isinstance(index.get("_class_name"), str):
        raise CheckpointError(f"{folder / 'model_index.json'} names no pipeline")
    for name, value in index.items():
        if weights and isinstance(value, list) and value != [None, None]:
            _check_part(folder / name, str(value[-1]))
    return index


def _check_part(part: Path, kind: str) -> None:
    files = sorted(p.name for p in part.iterdir()) if part.is_dir() else []
    if not any(f.endswith(".json") for f in files):
        raise CheckpointError(f"{part.parent} is incomplete: {part.name} is missing")
    weights = [f for f in files if f.endswith(".safetensors")]
    if not weights and any(f.suffix in PICKLED for f in part.rglob("*")):
        raise CheckpointError(f"{part} holds pickled weights, which could run code; only safetensors are loaded")
    if not weights and "tokenizer" not in part.name and not WEIGHTLESS.search(kind):
        raise CheckpointError(f"{part.parent} is incomplete: {part.name} has no weights")
    for file in files:
        if file.endswith(".safetensors.index.json"):
            _check_shards(part, file, files)
    for file in weights:
        _check_header(part / file)


def _check_shards(part: Path, file: str, files: list[str]) -> None:
    try:
        shards = {str(shard) for shard in json.loads((part / file).read_text())["weight_map"].values()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{part / file} is no index of weights") from error
    if strange := [shard for shard in sorted(shards) if "/" in shard or not shard.endswith(".safetensors")]:
        raise CheckpointError(f"{part / file} names {strange[0]}, which is no file of safetensors beside it")
    if missing := shards.difference(files):
        raise CheckpointError(f"{part.parent} is incomplete: {part.name}/{min(missing)} is missing")


def _check_header(file: Path) -> None:
    """See that a file has the tensors that it says it has, by their sizes; their values are not read."""
    try:
        with safe_open(file, "numpy"):
            pass
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file} can't be loaded: {error}") from error


def checkpoint_name(folder: Path) -> str:
    """The name of a checkpoint's folder, or of the repository where it lies in the hub's cache."""
    for part in reversed(folder.resolve().parts):
        if part.startswith("models--"):
            return part.split("--")[-1]
    return folder.resolve().name
