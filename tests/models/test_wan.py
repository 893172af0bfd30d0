import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler, WanPipeline
from diffusers.utils.torch_utils import randn_tensor
from tests.models import tiny_wan
from tests.models.parity import BFLOAT16, TOLERANCE, Case, Parity, fields, generator
from tests.recording import make_engine, run

from stepbatch import EngineConfig, GenerationRequest
from stepbatch.config import DefaultsConfig, ModelConfig
from stepbatch.engine.runner import TorchRunner
from stepbatch.errors import CheckpointError, InvalidValue, NotNative
from stepbatch.models.native import load_model
from stepbatch.models.wan import Wan

NAMES = (
    "prompt", "negative_prompt", "width", "height", "num_frames", "num_inference_steps", "guidance_scale",
    "guidance_scale_2", "max_sequence_length",
)  # fmt: skip
LONG = " ".join(f"w{i}" for i in range(30))
SQUARE, WIDE, HIGH = {"width": 32, "height": 32}, {"width": 64, "height": 32}, {"width": 32, "height": 48}


class Family(NamedTuple):
    """A checkpoint, ours and theirs."""

    path: Path
    runner: TorchRunner
    pipeline: Any
    draw: Callable[..., torch.Tensor]  # the latents of diffusers, as rows


def load(path: Path, defaults: DefaultsConfig | None = None, **given: Any) -> TorchRunner:
    config = EngineConfig(model=ModelConfig(model_path=str(path), **given), defaults=defaults or DefaultsConfig())
    return TorchRunner(load_model(config))


def family(path: Path) -> Family:
    runner, pipeline = load(path), WanPipeline.from_pretrained(path)
    pipeline.set_progress_bar_config(disable=True)
    kept = pipeline.scheduler

    def draw(request: GenerationRequest, output_type: str = "latent") -> Any:
        shift = "flow_shift" if isinstance(kept, UniPCMultistepScheduler) else "shift"
        change = {} if request.flow_shift is None else {shift: request.flow_shift}
        pipeline.scheduler = type(kept).from_config(kept.config, **change)
        drawn = pipeline(**fields(request, *NAMES), generator=generator(request), output_type=output_type).frames[0]
        return rows(runner, drawn) if output_type == "latent" else drawn

    return Family(path, runner, pipeline, draw)


def rows(runner: TorchRunner, latents: torch.Tensor) -> torch.Tensor:
    """``[C, F', h, w]`` to ``[N, C']``."""
    return torch.cat([runner.model.space.pack(frame) for frame in latents.unbind(1)])


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return family(tiny_wan.wan(tmp_path_factory.mktemp("wan") / "one"))


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return family(tiny_wan.wan(tmp_path_factory.mktemp("wan") / "two", networks=2))


@pytest.fixture(scope="module")
def euler(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return family(tiny_wan.wan(tmp_path_factory.mktemp("wan") / "euler", 2, FlowMatchEulerDiscreteScheduler(shift=2.0)))


def case(of: Family, variant: str, **given: Any) -> Case:
    request = GenerationRequest(**{"max_sequence_length": 32} | given)
    return Case(f"Wan {variant}", request, lambda: of.draw(request))


@pytest.fixture(scope="module")
def one_parity(one: Family) -> Parity:
    def row(variant: str, **given: Any) -> Case:
        return case(one, f"2.1, {variant}", **given)

    return Parity(one.runner, [
        row("unguided", prompt="w1 w2", guidance_scale=1.0, num_frames=1, num_inference_steps=3, seed=1, **SQUARE),
        row("unguided", prompt=LONG, guidance_scale=0.0, num_frames=9, num_inference_steps=12, seed=2**40, **WIDE),
        row("guided", prompt="w3", guidance_scale=5.0, num_frames=5, num_inference_steps=4, seed=3, **HIGH),
        row(
            "guided", prompt="  w1 \n w2&#32;w3 ", negative_prompt=LONG, guidance_scale=2.5, num_frames=9,
            max_sequence_length=64, flow_shift=8.0, num_inference_steps=6, seed=4, **SQUARE,
        ),
        row("guided", prompt="w5", guidance_scale=1.5, num_frames=13, num_inference_steps=1, seed=5, **HIGH),
        row("guided", prompt="w3", negative_prompt="w9", num_frames=5, num_inference_steps=2, seed=3, **HIGH,
            guidance_scale=3.0, flow_shift=1.0),
    ])  # fmt: skip


@pytest.fixture(scope="module")
def two_parity(two: Family) -> Parity:
    return Parity(two.runner, two_cases(two, "2.2 A14B"))


@pytest.fixture(scope="module")
def euler_parity(euler: Family) -> Parity:
    return Parity(euler.runner, two_cases(euler, "2.2 A14B, Euler"))


def two_cases(of: Family, name: str) -> list[Case]:
    """They cross the boundary after different numbers of steps, and one of them never does."""

    def row(variant: str, **given: Any) -> Case:
        return case(of, f"{name}, {variant}", **given)

    return [
        row("unguided", prompt="w1 w2", guidance_scale=1.0, num_frames=5, num_inference_steps=9, seed=1, **SQUARE),
        row("unguided", prompt="w7", guidance_scale=1.0, num_frames=1, num_inference_steps=1, seed=1, **SQUARE),
        row("guided", prompt="w3", guidance_scale=4.0, num_frames=9, num_inference_steps=5, seed=3, **HIGH),
        row("guided", prompt=LONG, guidance_scale=4.0, guidance_scale_2=1.0, num_frames=1, num_inference_steps=7,
            flow_shift=9.0, seed=4, **WIDE),
        row("guided", prompt="w4", negative_prompt=LONG, guidance_scale=3.0, guidance_scale_2=6.0, num_frames=5,
            max_sequence_length=40, num_inference_steps=4, flow_shift=1.0, seed=5, **WIDE),
    ]  # fmt: skip


KINDS = ["one", "two", "euler"]


@pytest.fixture(params=KINDS)
def parity(request: pytest.FixtureRequest) -> Parity:
    made: Parity = request.getfixturevalue(f"{request.param}_parity")
    return made


def test_alone_it_draws_what_diffusers_draws(parity: Parity) -> None:
    assert parity.alone() < TOLERANCE


@pytest.mark.parametrize(("width", "reverse"), [(16, False), (3, True), (2, False)])
def test_in_company_it_draws_what_diffusers_draws(parity: Parity, width: int, reverse: bool) -> None:
    assert parity.in_company(width, reverse) < TOLERANCE


@pytest.mark.parametrize("kind", KINDS)
def test_in_bfloat16_company_moves_a_video_little(kind: str, request: pytest.FixtureRequest) -> None:
    of, parity = request.getfixturevalue(kind), request.getfixturevalue(f"{kind}_parity")
    assert parity.in_bfloat16(of.path) < BFLOAT16


def test_with_projections_as_they_are_stored(two: Family, two_parity: Parity) -> None:
    ours = run(make_engine(load(two.path, fuse_projections=False)), [case.request for case in two_parity.cases])
    for (latents, *_), expected in zip(ours, two_parity.expected, strict=True):
        assert (latents - expected).abs().max() < TOLERANCE


def test_in_bfloat16_it_is_close_to_diffusers_in_bfloat16(one: Family, one_parity: Parity) -> None:
    request = one_parity.cases[0].request
    ours = run(make_engine(load(one.path, dtype="bfloat16")), [request])[0][0]
    pipeline = WanPipeline.from_pretrained(one.path, dtype=torch.bfloat16)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(**fields(request, *NAMES), generator=generator(request), output_type="latent").frames[0]
    expected = rows(one.runner, theirs.float())
    assert (ours - expected).pow(2).mean().sqrt() < 0.02 * expected.pow(2).mean().sqrt()


def test_pixels_are_those_of_diffusers(one: Family, one_parity: Parity) -> None:
    for index in (0, 3):
        request = one_parity.cases[index].request
        [output] = make_engine(one.runner).generate([request])[0]
        shape = (output.frames, output.height, output.width, 3)
        ours = np.frombuffer(output.pixels, np.uint8).reshape(shape).astype(int)
        theirs = np.round(np.asarray(one.draw(request, "np")) * 255)
        assert theirs.shape == shape == (request.num_frames, request.height, request.width, 3)
        assert np.abs(ours - theirs).max() <= 1
        assert ours.std() > 1


def test_noise_is_that_of_diffusers_bit_for_bit(one: Family) -> None:
    request = GenerationRequest(prompt="w1", num_frames=9, **WIDE).resolve(one.runner.info)
    expected = randn_tensor((1, 4, 3, 4, 8), generator=torch.Generator("cpu").manual_seed(6), dtype=torch.float32)
    assert one.runner.model.start(request, 6, []).latents.equal(rows(one.runner, expected[0]))


def test_an_over_long_prompt_is_refused(one: Family) -> None:
    for name in ("prompt", "negative_prompt"):
        given = {"prompt": "w1", "max_sequence_length": 30, name: LONG}
        with pytest.raises(InvalidValue, match="31 tokens and at most 30") as caught:
            one.runner.check(GenerationRequest(**given).resolve(one.runner.info))  # type: ignore[arg-type]
        assert caught.value.param == name
        one.runner.check(GenerationRequest(**given | {"max_sequence_length": 31}).resolve(one.runner.info))  # type: ignore[arg-type]


def test_a_prompt_is_what_it_is_alone(one: Family) -> None:
    model = one.runner.model
    request = GenerationRequest(prompt="w1").resolve(one.runner.info)
    prompts = [model.prompt(text, request) for text in ("w1", LONG, "", "w1 w2")]
    with torch.inference_mode():
        for prompt, together in zip(prompts, model.encode(prompts), strict=True):
            (by_itself,) = model.encode([prompt])
            assert len(together.rows) == len(prompt.ids[0])
            torch.testing.assert_close(together.rows, by_itself.rows)


@pytest.mark.parametrize(("scale", "sequences"), [(1.0, 1), (0.0, 1), (1.1, 2), (None, 2)])
def test_tokens_are_those_of_the_video_in_each_sequence(one: Family, scale: float | None, sequences: int) -> None:
    request = GenerationRequest(prompt="w1", guidance_scale=scale, num_frames=9, **WIDE).resolve(one.runner.info)
    assert sum(one.runner.lengths(request)) == sequences * 3 * 2 * 4


def test_what_it_says_of_itself(one: Family, two: Family) -> None:
    for info, steps, scales in ((one.runner.info, 50, (5.0, None)), (two.runner.info, 40, (4.0, 3.0))):
        known = info.defaults
        assert (info.tasks, info.makes_videos, info.frames_multiple, info.max_frames) == (
            ("text-to-video",),
            True,
            4,
            161,
        )
        assert (known.width, known.height, known.num_frames, known.fps) == (832, 480, 81, 16)
        assert (known.num_inference_steps, known.guidance_scale, known.guidance_scale_2) == (steps, *scales)
        assert (info.size_multiple, info.max_sequence_length) == (16, 512)


@pytest.mark.parametrize(
    ("given", "scales"),
    [
        ({}, (4.0, 3.0)),
        ({"guidance_scale": 2.0}, (2.0, 2.0)),
        ({"guidance_scale_2": 2.0}, (4.0, 2.0)),
        ({"guidance_scale": 6.0, "guidance_scale_2": 2.0}, (6.0, 2.0)),
    ],
)
def test_guidance_of_the_second_transformer(two: Family, given: dict[str, float], scales: tuple[float, float]) -> None:
    request = GenerationRequest(prompt="w1", **given).resolve(two.runner.info)
    assert tuple(two.runner.model.scale(request, network) for network in (0, 1)) == scales


def test_a_default_guidance_is_for_both_transformers(two: Family) -> None:
    model = load(two.path, DefaultsConfig(default_guidance_scale=6.0)).model
    request = GenerationRequest(prompt="w1").resolve(model.info)
    assert [model.scale(request, network) for network in (0, 1)] == [6.0, 6.0]


@pytest.mark.parametrize(
    ("kind", "value", "param"),
    [
        ("one", {"guidance_scale_2": 3.0}, "guidance_scale_2"),
        ("one", {"true_cfg_scale": 3.0}, "true_cfg_scale"),
        ("one", {"num_frames": 8}, "num_frames"),
        ("one", {"num_frames": 165}, "num_frames"),
        ("one", {"width": 40, "height": 32}, "width"),
        ("two", {"max_sequence_length": 513}, "max_sequence_length"),
    ],
)
def test_what_it_can_not_do_is_refused(
    kind: str, value: dict[str, Any], param: str, request: pytest.FixtureRequest
) -> None:
    with pytest.raises(InvalidValue) as caught:
        GenerationRequest(prompt="w1", **value).resolve(request.getfixturevalue(kind).runner.info)
    assert caught.value.param == param


def changed(path: Path, folder: Path, file: str, change: dict[str, Any]) -> Path:
    """The same checkpoint with another config."""
    part = Path(file).parent
    (folder / part).mkdir(exist_ok=True)
    for there in (*path.iterdir(), *(path / part).iterdir()):
        here = folder / there.relative_to(path)
        if not here.exists() and there != path / file:
            here.symlink_to(there)
    (folder / file).write_text(json.dumps(json.loads((path / file).read_text()) | change))
    return folder


SCHEDULER, INDEX, CONFIG = "scheduler/scheduler_config.json", "model_index.json", "transformer/config.json"


@pytest.mark.parametrize(
    ("kind", "file", "change", "reason"),
    [
        ("one", INDEX, {"expand_timesteps": True}, "expand_timesteps"),
        ("two", INDEX, {"transformer": [None, None]}, "no transformer,"),
        ("one", INDEX, {"boundary_ratio": 0.5}, "no transformer_2"),
        ("one", CONFIG, {"image_dim": 32}, "image_dim 32"),
        ("one", CONFIG, {"added_kv_proj_dim": 32}, "added_kv_proj_dim 32"),
        ("one", CONFIG, {"patch_size": [1, 1, 1]}, "patch_size"),
        ("one", SCHEDULER, {"use_dynamic_shifting": True}, "use_dynamic_shifting"),
        ("one", SCHEDULER, {"prediction_type": "epsilon"}, "prediction_type epsilon"),
        ("euler", SCHEDULER, {"use_dynamic_shifting": True}, "use_dynamic_shifting"),
    ],
)
def test_what_has_no_native_form_is_said_to_have_none(
    kind: str, file: str, change: dict[str, Any], reason: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    with pytest.raises(NotNative, match=reason):
        load(changed(request.getfixturevalue(kind).path, tmp_path, file, change))


def test_another_noise_schedule_has_no_native_form(tmp_path: Path) -> None:
    scheduler = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    with pytest.raises(NotNative, match="DPMSolverMultistepScheduler"):
        load(tiny_wan.wan(tmp_path, scheduler=scheduler))


def test_another_transformer_is_refused(one: Family, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"blocks\.2"):
        load(changed(one.path, tmp_path, CONFIG, {"num_layers": 3}))


def test_without_a_boundary_the_second_transformer_is_never_asked(two: Family, tmp_path: Path) -> None:
    """As in diffusers; so it is not even loaded."""
    runner = load(changed(two.path, tmp_path, INDEX, {"boundary_ratio": None}))
    assert isinstance(runner.model, Wan)
    assert len(runner.model.transformers) == 1
    assert "guidance_scale_2" not in runner.info.uses


@pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")  # of diffusers, with numpy 2
def test_flow_shift_is_for_schedules_that_have_one(one: Family, tmp_path: Path) -> None:
    assert "flow_shift" in one.runner.info.uses
    info = load(changed(one.path, tmp_path, SCHEDULER, {"use_karras_sigmas": True})).info
    assert "flow_shift" not in info.uses


@pytest.mark.parametrize("name", ["Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "Wan-AI/Wan2.2-T2V-A14B-Diffusers"])
def test_the_small_models_are_of_either_kind(name: str) -> None:
    runner = load(Path(name), load_format="dummy", dummy_size="small")
    assert isinstance(runner.model, Wan)
    weights = [transformer.proj_out.weight for transformer in runner.model.transformers]
    assert len(weights) == 1 + name.endswith("A14B-Diffusers")
    assert not weights[0].equal(weights[-1]) or len(weights) == 1
    request = GenerationRequest(prompt="a red fox in the snow", num_inference_steps=3, num_frames=5, seed=1, **WIDE)
    [output] = make_engine(runner).generate([request])[0]
    assert (output.frames, len(output.pixels)) == (5, 5 * 32 * 64 * 3)
    assert len(set(output.pixels)) > 10
