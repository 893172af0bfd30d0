"""Promise 6: values that are not finite are an error of the request that has them, and never a picture."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from tests.models import tiny, tiny_wan

from stepbatch.config import EngineConfig, ModelConfig
from stepbatch.engine.backends import load_runner
from stepbatch.engine.engine import Engine, Runner
from stepbatch.engine.messages import Failure, FromEngine, Output, Submit
from stepbatch.request import GenerationRequest

from .inside import WIDTH, assert_failed, inside, is_own
from .record import Finding

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

POISON = "w7"  # a word that the text encoder makes NaN of
BACKENDS = ("native", "diffusers")


def spoil(folder: Path, part: str, name: str, change: Callable[[Any], object]) -> Path:
    """Change a weight of a checkpoint."""
    [file] = (folder / part).glob("*.safetensors")
    weights = load_file(file)
    change(next(value for key, value in weights.items() if key.endswith(name)))
    save_file(weights, file, {"format": "pt"})
    return folder


def runner_of(folder: Path, backend: Any) -> Runner:
    return load_runner(EngineConfig(model=ModelConfig(model_path=str(folder), backend=backend)))


def drawn(runner: Runner, prompts: Sequence[str]) -> dict[str, bytes | str]:
    """What comes of prompts that are given at once, in one batch: pixels, or the code of an error."""
    said: list[FromEngine] = []
    engine = Engine(runner, EngineConfig(), said.append)
    more = {"num_frames": 5} if runner.info.makes_videos else {}
    for prompt in prompts:
        request = GenerationRequest(prompt=prompt, width=64, height=64, num_inference_steps=3, seed=0, **more)
        engine.submit(Submit(prompt, request, [0], time.monotonic()))
    while not engine.idle:
        engine.step()
    ends = {message.request_id: message.pixels for message in said if isinstance(message, Output)}
    return ends | {message.request_id: message.code for message in said if isinstance(message, Failure)}


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_is_the_error_of_the_one_that_has_it(
    tmp_path: Path, size: Callable[[int, int], int], note: Callable[[Finding], None], backend: str
) -> None:
    row = tiny.tokenizer().convert_tokens_to_ids(POISON)
    folder = tiny.z_image(tmp_path / "sick")
    spoil(folder, "text_encoder", "embed_tokens.weight", lambda weight: weight[row].fill_(math.nan))
    runner, prompts = runner_of(folder, backend), [f"w{i}" for i in range(1, 1 + size(WIDTH, 64))]
    found = drawn(runner, prompts)
    assert found.pop(POISON) == "invalid_model_output"
    expected = drawn(runner, list(found))
    assert set(found) == set(expected) == {*prompts} - {POISON}
    worst = max(difference(found[prompt], expected[prompt]) for prompt in found)
    assert worst <= 1
    note(
        Finding(
            6, f"NaN, {backend}", f"{len(prompts)} requests at once", "one prompt is embedded as NaN",
            f"it gets 500; the others are within {worst} of 255 of what they are without it",
        )
    )  # fmt: skip


def difference(ours: bytes | str, theirs: bytes | str) -> int:
    """The largest, in 255ths."""
    assert isinstance(ours, bytes)
    assert isinstance(theirs, bytes)
    a, b = (np.frombuffer(pixels, np.uint8).astype(int) for pixels in (ours, theirs))
    return int(np.abs(a - b).max())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("family", [tiny.z_image, tiny_wan.wan])
def test_what_is_infinite_is_not_black(tmp_path: Path, family: Callable[[Path], Path], backend: str) -> None:
    """Latents are finite here; it is the VAE that is not, and what follows it clamps what it makes."""
    folder = spoil(family(tmp_path / "sick"), "vae", "decoder.conv_out.bias", lambda weight: weight.fill_(-math.inf))
    assert drawn(runner_of(folder, backend), ["w1", "w2"]) == dict.fromkeys(["w1", "w2"], "invalid_model_output")


@pytest.mark.anyio
async def test_a_caller_is_told_so(size: Callable[[int, int], int], note: Callable[[Finding], None]) -> None:
    rounds = size(1, 25)
    async with inside(EngineConfig(model=ModelConfig(backend="fake", fake_step_ms=2))) as site:
        for _ in range(rounds):
            prompts = [f"prompt {i}" for i in range(WIDTH - 1)]
            *others, sick = await site.together([{"prompt": prompt} for prompt in (*prompts, "[nan]")])
            assert_failed(sick, 500, "invalid_model_output")
            assert all(is_own(answer, prompt) for answer, prompt in zip(others, prompts, strict=True))
            site.engine.forget()
    note(
        Finding(
            6, "NaN, over HTTP", f"{rounds} batches of {WIDTH}", "one makes values that are not finite",
            f"{rounds} of {rounds} get 500, not to be retried; {7 * rounds} of {7 * rounds} others finish",
        )
    )  # fmt: skip
