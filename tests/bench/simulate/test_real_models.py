"""What the simulator thinks of requests, by a profile's file, against what the model's own runner counts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.models import tiny_flux, tiny_wan
from tests.models.pipelines import checkpoint

from stepbatch.bench.profile.run import profile_of
from stepbatch.bench.profile_file import StepPoint
from stepbatch.bench.results import save
from stepbatch.bench.simulate.curves import Curve, read_curve
from stepbatch.bench.simulate.kinds import make_kind
from stepbatch.config import EngineConfig, ModelConfig
from stepbatch.engine.backends import load_runner
from stepbatch.engine.engine import Runner
from stepbatch.engine.fitting import Sample
from stepbatch.engine.measured import Measured
from stepbatch.engine.probe import PROMPT
from stepbatch.errors import OptionError
from stepbatch.request import GenerationRequest

MODELS: dict[str, tuple[Callable[[Path], Path], list[dict[str, Any]], list[int]]] = {  # and sequences of each request
    "bundled": (lambda folder: Path(ModelConfig().model_path), [{}, {"guidance_scale": 0.0}], [2, 1]),
    "wan": (
        tiny_wan.wan,
        [{}, {"guidance_scale": 1.0}, {"num_frames": 5}, {"width": 96, "height": 64, "num_frames": 21}],
        [2, 1, 2, 2],
    ),
    "flux": (
        lambda folder: tiny_flux.flux(folder, "dev"),
        [{}, {"guidance_scale": 4.0}, {"true_cfg_scale": 4.0}, {"true_cfg_scale": 1.0, "negative_prompt": "blurry"}],
        [1, 1, 2, 1],
    ),
}


def profiled(runner: Runner, folder: Path) -> Curve:
    """The curve of a profile's file, with made-up seconds."""
    points, decodes = [], []
    for width in (64, 128, 256):
        tokens = 2 * width * 64 // 256
        points.append(StepPoint(width=width, height=64, jobs=1, tokens=tokens, squares=tokens**2, seconds=tokens / 1e4))
        decodes.append(Sample(size=width * 64, cost=0.1 + width * 64 / 1e6))
    save(profile_of(runner, Measured(points=points, decodes=decodes, prompts=[0.01])), folder / "profile.json")
    return read_curve(str(folder / "profile.json"))


@pytest.mark.parametrize("name", MODELS)
def test_it_thinks_what_the_runner_counts(name: str, tmp_path: Path) -> None:
    make, requests, sequences = MODELS[name]
    runner = load_runner(EngineConfig(model=ModelConfig(model_path=str(make(tmp_path / name)))))
    curve = profiled(runner, tmp_path)
    for fields, count in zip(requests, sequences, strict=True):
        request = GenerationRequest(prompt=PROMPT, seed=0, **fields)
        kind, resolved = make_kind(request, curve), request.resolve(runner.info)
        counted = runner.lengths(resolved)
        assert len(kind.lengths) == len(counted) == count
        assert sum(kind.lengths) == pytest.approx(sum(counted), rel=0.1)
        assert (kind.request.steps, kind.request.frames) == (resolved.steps, resolved.frames)
        assert kind.decode == pytest.approx(0.1 + resolved.pixels / 1e6, rel=0.01)
        written = count > 1 and bool(resolved.negative_prompt)  # else it is empty, which is encoded once and for all
        assert kind.encode == pytest.approx(0.01 * (1 + written))


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_whole_pipelines_are_refused(tmp_path: Path) -> None:
    path = checkpoint("stable-diffusion", tmp_path)
    runner = load_runner(EngineConfig(model=ModelConfig(model_path=str(path), backend="diffusers")))
    with pytest.raises(OptionError, match=r"--curve: .* whole pipeline calls"):
        profiled(runner, tmp_path)
