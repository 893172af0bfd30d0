"""docs/models.md is held to its word: which guidance a family takes, by what default, and what it can do."""

import re
from pathlib import Path

import pytest

from stepbatch.config import EngineConfig, ModelConfig
from stepbatch.models.native import NATIVE, load_model

DOCUMENT = (Path(__file__).parents[2] / "docs" / "models.md").read_text()
SECTIONS = {  # the packaged configs, and where they are told of
    "FLUX.1-dev": "FLUX.1",
    "FLUX.1-schnell": "FLUX.1",
    "FLUX.1-Kontext-dev": "FLUX.1",
    "Qwen-Image-2512": "Qwen-Image",
    "Qwen-Image-Edit-2511": "Qwen-Image",
    "Wan2.1-T2V-1.3B-Diffusers": "Wan",
    "Wan2.2-T2V-A14B-Diffusers": "Wan",
    "Z-Image": "Z-Image",
    "Z-Image-Turbo": "Z-Image",
}


@pytest.mark.parametrize("name", SECTIONS)
def test_guidance_is_as_documented(name: str) -> None:
    model = ModelConfig(model_path=name, load_format="dummy", dummy_size="small")
    info = load_model(EngineConfig(model=model)).info
    section = DOCUMENT.split(f"\n## {SECTIONS[name]}\n")[1].split("\n## ")[0]
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", section, re.MULTILINE))
    for field in ("guidance_scale", "true_cfg_scale", "negative_prompt"):
        meaning, default, *_ = rows[field].split(" | ")
        value = getattr(info.defaults, field)
        if field not in info.uses:
            assert "400" in meaning
        elif isinstance(value, float):
            assert f"{value:g}" in re.findall(r"[\d.]+", default)
    steps = f"{info.defaults.num_inference_steps}"
    assert steps in re.findall(r"\d+", section.split("The default is ")[1].split(". ")[0])
    row = next(line for line in DOCUMENT.splitlines() if f"`{info.pipeline}`" in line)
    assert row.rstrip(" |").endswith(", ".join(info.tasks))


def test_every_pipeline_is_documented() -> None:
    for pipeline in NATIVE:
        assert f"`{re.sub('Img2Img|Inpaint', '', pipeline)}`" in DOCUMENT
