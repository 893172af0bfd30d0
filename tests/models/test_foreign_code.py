"""What brings code is refused in tests/reliability/test_model_loading.py; here is what must not be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from stepbatch.errors import CheckpointError
from stepbatch.models.foreign_code import check_no_code


@pytest.mark.parametrize("part", [
    ["diffusers", "AutoencoderKL"], ["transformers", "CLIPTextModel"], [None, None], [],
    ["stable_diffusion", "StableDiffusionSafetyChecker"], ["deepfloyd_if", "IFWatermarker"],
])  # fmt: skip
def test_parts_of_the_libraries_and_of_their_pipelines(tmp_path: Path, part: list[Any]) -> None:
    check_no_code(tmp_path, {"_class_name": "AnyPipeline", "part": part, "requires_safety_checker": False})


@pytest.mark.parametrize(
    "library", ["os", "diffusers.utils", "stepbatch", "", "../x", "nothing", 3, ["os"], "__main__"]
)
def test_parts_of_anything_else(tmp_path: Path, library: Any) -> None:
    with pytest.raises(CheckpointError, match="part from"):
        check_no_code(tmp_path, {"_class_name": "AnyPipeline", "part": [library, "X"]})


@pytest.mark.parametrize("config", [
    {"auto_map": {}}, {"auto_map": None}, {"_attn_implementation": "sdpa"}, {"attn_implementation": None},
    {"deep": [{"deeper": {"attn_implementation": "eager"}}]}, {"_name_or_path": "someone/model"},
])  # fmt: skip
def test_configs_that_name_no_code(tmp_path: Path, config: dict[str, Any]) -> None:
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "config.json").write_text(json.dumps(config))
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "train.py").write_text("# no loader looks here")
    (tmp_path / "handler.py").write_text("# nor here for this name")
    check_no_code(tmp_path, {"_class_name": "AnyPipeline", "part": ["diffusers", "AutoencoderKL"]})


@pytest.mark.parametrize("config", [
    {"auto_map": {"AutoModel": "x.Y"}}, {"deep": [{"deeper": {"auto_map": {"AutoModel": "x.Y"}}}]},
    {"attn_implementation": {"text_config": "someone/kernel"}}, {"transformers_weights": "x.safetensors"},
])  # fmt: skip
def test_configs_that_do(tmp_path: Path, config: dict[str, Any]) -> None:
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "any_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"part/any_config\.json names"):
        check_no_code(tmp_path, {"_class_name": "AnyPipeline", "part": ["diffusers", "AutoencoderKL"]})
