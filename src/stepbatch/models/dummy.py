"""Random weights from configs alone, at a model's own size and precision, made on the device that uses them.

The configs of well-known models are packaged in ``configs``, in diffusers' layout, so that such a model can be timed
where its weights are not. What it draws is noise, and no step takes longer or shorter than with the real weights.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerFast, T5EncoderModel, UMT5EncoderModel
from transformers.initialization import no_init_weights

from stepbatch.errors import CheckpointError
from stepbatch.models.stand_in import clip_tokenizer, qwen_tokenizer, t5_tokenizer
from stepbatch.models.weights import read_config, read_json

CONFIGS = Path(__file__).parent / "configs"
MEMORY = Path("/proc/meminfo")  # where there is one

LIBRARIES: dict[str, Any] = {"diffusers": diffusers, "transformers": transformers}
TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "CLIPTokenizer": clip_tokenizer,
    "Qwen2Tokenizer": qwen_tokenizer,
    "T5Tokenizer": t5_tokenizer,
}
LEFT_OUT = (
    None,
    "Qwen2VLProcessor",  # it wants torchvision; its parts are loaded where they are needed
    "StableDiffusionSafetyChecker",  # with random weights it would reject anything
)
SIZED_BY_ANOTHER = (
    "UNet2DConditionModel",
    "UNet2DModel",
    "UNetSpatioTemporalConditionModel",
)  # other names, other rules

SMALL: dict[str, Any] = {  # by name, wherever in a config it stands; the parts fit each other
    # transformers: two heads of 32
    "num_layers": 2,
    "num_single_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "axes_dims_rope": [8, 12, 12],
    "joint_attention_dim": 32,
    "text_dim": 32,
    "ffn_dim": 128,
    "pooled_projection_dim": 32,
    "n_layers": 2,
    "n_refiner_layers": 1,
    "n_heads": 2,
    "n_kv_heads": 2,
    "dim": 64,
    "axes_dims": [8, 12, 12],
    "cap_feat_dim": 32,
    # text encoders and the vision tower: two heads of 16
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "projection_dim": 32,
    "mrope_section": [2, 3, 3],
    "layer_types": ["full_attention"] * 2,
    "d_model": 32,
    "d_ff": 64,
    "d_kv": 16,
    "num_heads": 2,
    "depth": 2,
    "out_hidden_size": 32,
    "fullatt_block_indexes": [1],
    # VAEs: as many levels as before
    "block_out_channels": [8] * 4,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "base_dim": 8,
    "num_res_blocks": 1,
}


SMALL_SETTINGS = {"width": 256, "height": 256, "reference_area": 256 * 256, "prompt_image_area": 112 * 112}


def packaged_config(path: str) -> Path | None:
    """The packaged configs of the model that a folder or repository of this name holds; none for unknown models."""
    name = Path(path).name.lower()
    return next((folder for folder in sorted(CONFIGS.iterdir()) if folder.name.lower() == name), None)


def dummy_components(
    folder: Path,
    device: torch.device,
    dtype: torch.dtype,
    small: bool,
    drawn_on: torch.device | None = None,
    left_out: tuple[str, ...] = ("transformer",),
) -> dict[str, Any]:
    """All parts that the configs in ``folder`` name but those left out, as its pipeline's class takes them.

    Tokenizers are the folder's own where it has them, else stand-ins. Parts that are optional, and a processor of
    pictures, are ``None``.

    Args:
        small: The same architecture with hardly any width or depth.
        drawn_on: See ``randomize``.

    Raises:
        CheckpointError: a config is missing, or names a part that can't be made.
    """
    parts = {name: kind for name, kind in _classes(folder).items() if name not in left_out}
    return {
        name: _component(folder / name, kind, device, dtype, seed, small, drawn_on)
        for seed, (name, kind) in enumerate(sorted(parts.items()))
    }


def transformer_config(folder: Path, small: bool, part: str = "transformer") -> dict[str, Any]:
    """What diffusers' transformer is made with: the part's config in ``folder``, and defaults where it is silent.

    Raises:
        CheckpointError: the config is missing, or diffusers has no such transformer.
    """
    library, kind = _classes(folder).get(part, (None, None))
    cls = _class(folder / part, library, kind)
    return _arguments(cls, read_config(folder / part), small)


def dummy_module(
    build: Callable[[], Any], device: torch.device, dtype: torch.dtype, seed: int, drawn_on: torch.device | None = None
) -> Any:
    """The module that ``build`` makes: its weights random and never all elsewhere than on ``device``; buffers as built.

    Args:
        drawn_on: See ``randomize``.

    Raises:
        CheckpointError: there is no room for it.
    """
    with init_empty_weights(include_buffers=False), no_init_weights():  # it would be in vain, and takes half the time
        module = build().eval()
    _check_room(module, device, dtype)
    if isinstance(module, T5EncoderModel | UMT5EncoderModel):
        module.tie_weights()
    made: dict[int, nn.Parameter] = {}
    for part in module.modules():
        for name, empty in list(part.named_parameters(recurse=False)):
            if id(empty) not in made:
                weights = torch.empty(empty.shape, dtype=dtype, device=device)
                made[id(empty)] = nn.Parameter(weights, requires_grad=False)
            setattr(part, name, made[id(empty)])
        for name, buffer in list(part.named_buffers(recurse=False)):
            setattr(part, name, buffer.to(device))
    randomize(module, seed, drawn_on)
    return module


def _check_room(module: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """A CPU's memory is given away before it is there, and who takes too much is killed without a word."""
    if device.type != "cpu" or not MEMORY.exists():
        return
    lines = dict(line.split(":") for line in MEMORY.read_text().splitlines())
    room = int(lines["MemAvailable"].split()[0]) / 2**20
    need = sum(p.numel() for p in module.parameters()) * dtype.itemsize / 2**30
    if need > room:
        raise CheckpointError(
            f"its {type(module).__name__} needs {need:.1f} GiB of memory, of which {room:.1f} are free"
        )


@torch.no_grad()
def randomize(module: nn.Module, seed: int, drawn_on: torch.device | None = None) -> None:
    """Fill all parameters in place, so that values neither vanish nor explode however deep the model is.

    Args:
        drawn_on: Where the numbers are drawn, one parameter at a time, if not where they go: a CPU takes minutes for
            what an accelerator does in a second.
    """
    generators: dict[torch.device, torch.Generator] = {}
    for name, parameter in module.named_parameters():
        if parameter.is_meta:  # it has no values
            continue
        device = drawn_on or parameter.device
        if device not in generators:
            generators[device] = torch.Generator(device).manual_seed(seed)
        last = name.rpartition(".")[2]
        mean, std = 0.0, 0.02  # biases, and tokens that are learned
        if last in ("weight", "gamma"):
            fan_in = parameter[0].numel()
            mean, std = (0.0, fan_in**-0.5) if fan_in > 1 else (1.0, 0.1)  # a norm has one for a channel
        values = parameter if device.type == parameter.device.type else torch.empty_like(parameter, device=device)
        values.normal_(mean, std, generator=generators[device])
        if values is not parameter:
            parameter.copy_(values)


def _classes(folder: Path) -> dict[str, tuple[str | None, str | None]]:
    """Library and class of each part in ``model_index.json``, ``None`` for a part that is left out."""
    index = read_json(folder / "model_index.json")
    return {name: (value[0], value[1]) for name, value in index.items() if isinstance(value, list) and len(value) == 2}


def _class(folder: Path, library: str | None, kind: str | None) -> Any:
    try:
        return getattr(LIBRARIES[library or ""], kind or "")
    except (KeyError, AttributeError) as error:
        raise CheckpointError(f"{folder} is a {kind}, which is not to be had of {library} here") from error


def _component(
    folder: Path,
    part: tuple[str | None, str | None],
    device: torch.device,
    dtype: torch.dtype,
    seed: int,
    small: bool,
    drawn_on: torch.device | None,
) -> Any:
    library, kind = part
    if kind in LEFT_OUT:
        return None
    if "tokenizer" in folder.name:
        return _tokenizer(folder, kind)
    cls = _class(folder, library, kind)
    if small and kind in SIZED_BY_ANOTHER:
        raise CheckpointError(f"there is no small {kind}: --dummy-size small makes transformers")
    if (folder / "preprocessor_config.json").exists():
        return cls.from_pretrained(folder, local_files_only=True)
    if (folder / "scheduler_config.json").exists():
        return cls.from_config(read_json(folder / "scheduler_config.json"))
    values = read_config(folder)
    if library == "transformers":
        config = cls.config_class.from_dict(_shrunk(values) if small else values)
        return dummy_module(lambda: cls(config), device, dtype, seed, drawn_on)
    arguments = _arguments(cls, values, small)
    return dummy_module(lambda: cls(**arguments), device, dtype, seed, drawn_on)


def _tokenizer(folder: Path, kind: str | None) -> Any:
    if (folder / "tokenizer_config.json").exists():
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    stand_in = TOKENIZERS.get((kind or "").removesuffix("Fast"))
    if stand_in is None:
        raise CheckpointError(f"{folder} has no files, and there is no stand-in for a {kind}")
    return stand_in()


def _arguments(cls: Any, values: dict[str, Any], small: bool) -> dict[str, Any]:
    parameters = list(inspect.signature(cls).parameters.values())
    known = {p.name: values.get(p.name, p.default) for p in parameters}
    return _shrunk(known) if small else known


def _shrunk(values: dict[str, Any]) -> dict[str, Any]:
    return {
        name: SMALL[name] if name in SMALL else _shrunk(value) if isinstance(value, dict) else value
        for name, value in values.items()
    }
