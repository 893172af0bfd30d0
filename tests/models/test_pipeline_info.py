"""Defaults that a checkpoint's own settings call for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tests.models.pipelines import checkpoint

from stepbatch.config import DefaultsConfig, EngineConfig, ModelConfig
from stepbatch.models.pipeline import Pipeline


def wan(folder: Path, settings: dict[str, Any], **flags: Any) -> Pipeline:
    path = checkpoint("wan", folder)
    if settings.get("boundary_ratio"):
        shutil.copytree(path / "transformer", path / "transformer_2", dirs_exist_ok=True)
        settings = settings | {"transformer_2": ["diffusers", "WanTransformer3DModel"]}
    index = json.loads((path / "model_index.json").read_text())
    (path / "model_index.json").write_text(json.dumps(index | settings))
    model = ModelConfig(model_path=str(path), backend="diffusers")
    return Pipeline(EngineConfig(model=model, defaults=DefaultsConfig(**flags)), path)


@pytest.mark.parametrize(("settings", "flags", "expected"), [
    ({}, {}, (50, 5.0, None, 16)),
    ({"expand_timesteps": True}, {}, (50, 5.0, None, 24)),
    ({"boundary_ratio": 0.875}, {}, (40, 4.0, 3.0, 16)),
    ({"boundary_ratio": 0.875}, {"default_guidance_scale": 6.0}, (40, 6.0, None, 16)),
])  # fmt: skip
def test_wan(
    tmp_path: Path, settings: dict[str, Any], flags: dict[str, Any], expected: tuple[int, float, float | None, int]
) -> None:
    own = wan(tmp_path, settings, **flags).info.defaults
    assert (own.num_inference_steps, own.guidance_scale, own.guidance_scale_2, own.fps) == expected
