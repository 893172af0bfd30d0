"""Checkpoints that bring code of their own, or name some: refused by what their files say, before any is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from stepbatch.errors import CheckpointError
from stepbatch.models.weights import read_json

LIBRARIES = ("diffusers", "transformers")
SOUGHT = ("pipeline.py", "None.py")  # what diffusers looks for beside model_index.json; other scripts lie there unread
OTHER_LOADERS = ("Pipeline", "OnnxRuntime")  # in classes of parts: they read what is not looked at here
NAMING_CODE = ("auto_map", "custom_pipelines")  # keys of configs: classes in Python files
NAMING_FILES = ("transformers_weights",)  # weights to be loaded in place of those that were looked at
NAMING_KERNELS = ("attn_implementation", "_attn_implementation")  # with a slash, a repository of compiled code


def check_no_code(folder: Path, index: Mapping[str, Any]) -> None:
    """Refuse a checkpoint that the loaders could run code of, or would follow to somewhere else.

    Args:
        folder: The checkpoint.
        index: Its ``model_index.json``.

    Raises:
        CheckpointError: a part is of another library, or a pipeline itself, or there is Python that may be run, or a
            config that names code.
    """
    where = folder / "model_index.json"
    if isinstance(index.get("_class_name"), list):
        raise CheckpointError(f"{where} has a pipeline of its own, and no checkpoint's code is run here")
    parts = {name: value for name, value in index.items() if isinstance(value, list)}
    for name, value in parts.items():
        if not name.isidentifier():
            raise CheckpointError(f"{where} has a part called {name!r}, which is no name of a folder in it")
        if value and value[0] is not None and not _is_known(value[0]):
            raise CheckpointError(
                f"{where} has its {name} from {value[0]!r}: parts must be of diffusers or transformers, and no "
                "checkpoint's code is run here"
            )
        if value and any(loader in str(value[-1]) for loader in OTHER_LOADERS):
            raise CheckpointError(f"{where} has its {name} as a {value[-1]}: parts must be no pipelines, and no ONNX")
    beside = [folder / name for name in SOUGHT if (folder / name).exists()]
    for file in (*beside, *(file for name in parts for file in sorted((folder / name).rglob("*.py")))):
        raise CheckpointError(f"{file} is Python, and no checkpoint's code is run here; serve it without that file")
    for file in (file for name in parts for file in sorted((folder / name).rglob("model_index.json"))):
        raise CheckpointError(f"{file} makes a part a pipeline, whose own parts are not looked at")
    for name in parts:
        for file in sorted((folder / name).rglob("*config.json")):
            _check_config(file)


def _is_known(library: Any) -> bool:
    """Whether it is a library whose parts are loaded, or the module of one of diffusers' pipelines."""
    if not isinstance(library, str) or not library.isidentifier():
        return False
    return library in LIBRARIES or find_spec(f"diffusers.pipelines.{library}") is not None


def _check_config(file: Path) -> None:
    if file.name == "adapter_config.json":
        raise CheckpointError(f"{file} is an adapter's, which would bring other weights; merge it, or leave it out")
    for key, value in _items(read_json(file)):
        if key in NAMING_CODE and value:
            raise CheckpointError(f"{file} names code ({key}), and no checkpoint's code is run here")
        if key in NAMING_FILES and value:
            raise CheckpointError(f"{file} names other weights ({key}) than the usual files")
        if key in NAMING_KERNELS and "/" in str(value):
            raise CheckpointError(f"{file} names code to be fetched ({key}), and no checkpoint's code is run here")


def _items(value: Any) -> Iterator[tuple[str, Any]]:
    """All keys of a JSON value with what they hold, however deep."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            yield from value.items()
            waiting.extend(value.values())
        elif isinstance(value, list):
            waiting.extend(value)
