"""Offload without a device to bring weights to: what is away is no numbers, and so is whatever comes of using it."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import QwenImageEditPlusPipeline
from diffusers.hooks import group_offloading
from tests.models import tiny_flux, tiny_qwen, tiny_wan
from tests.models.parity import disc, picture
from tests.recording import RecordingRunner, make_engine, run
from torch import nn

from stepbatch import EngineConfig, GenerationRequest
from stepbatch.config import MemoryConfig, ModelConfig
from stepbatch.engine.engine import Engine
from stepbatch.engine.runner import TorchRunner
from stepbatch.models import loading
from stepbatch.models.native import load_model
from stepbatch.models.offload import FLAGS, offload_blocks, offload_part, possible_offload
from stepbatch.models.wan import Wan
from stepbatch.models.z_image import Transformer

EVERYTHING = MemoryConfig(dit_layerwise_offload=True, text_encoder_cpu_offload=True, vae_cpu_offload=True)
LONG = " ".join(f"w{i}" for i in range(40))

REQUESTS = [
    GenerationRequest(prompt="w1 w2", width=64, height=64, num_inference_steps=3, guidance_scale=0.0, seed=1),
    GenerationRequest(prompt=LONG, width=72, height=88, num_inference_steps=4, guidance_scale=4.0, seed=7),
    GenerationRequest(
        prompt="w4", images=(picture(64, 64),), mask=disc(64, 64), strength=0.7, width=64, height=64,
        num_inference_steps=4, guidance_scale=2.0, seed=5,
    ),
]  # fmt: skip


class Group(group_offloading.ModuleGroup):
    """Weights that are no numbers while they are away."""

    made: list["Group"]
    homes: dict[torch.Tensor, torch.Tensor]  # of all groups: some share a weight

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.offload_device = torch.device("meta")  # which no weight is on: what wasn't brought ahead is not noticed
        self.onload_device = torch.device("cpu")
        modules = chain.from_iterable((*module.parameters(), *module.buffers()) for module in self.modules)
        self.tensors = [*self.parameters, *self.buffers, *modules]
        for tensor in self.tensors:
            self.homes.setdefault(tensor, tensor.data)
        self.is_away = False
        self.crossings = 0
        self.made.append(self)

    def _init_cpu_param_dict(self) -> dict[torch.Tensor, torch.Tensor]:
        return {}  # no memory can be pinned without a device

    def onload_(self) -> None:
        self.is_away = False
        self.crossings += 1
        for tensor in self.tensors:
            tensor.data = self.homes[tensor].clone()

    def offload_(self) -> None:
        self.is_away = True
        for tensor in self.tensors:
            tensor.data = torch.full_like(tensor.data, torch.nan if tensor.is_floating_point() else 0)


@pytest.fixture
def groups(monkeypatch: pytest.MonkeyPatch) -> list[Group]:
    """The groups of weights that are offloaded from here on, with a CPU that is treated as a device."""
    monkeypatch.setattr(Group, "made", [], raising=False)
    monkeypatch.setattr(Group, "homes", {}, raising=False)
    monkeypatch.setattr(group_offloading, "ModuleGroup", Group)
    monkeypatch.setattr(loading, "possible_offload", lambda memory, device: memory)
    return Group.made


def load(path: Path, memory: MemoryConfig, **settings: Any) -> TorchRunner:
    config = EngineConfig(model=ModelConfig(model_path=str(path), **settings), memory=memory)
    return TorchRunner(load_model(config))


def transformer_of(runner: TorchRunner) -> Transformer:
    assert isinstance(runner.model.transformer, Transformer)
    return runner.model.transformer


def crossings(groups: list[Group], blocks: nn.ModuleList) -> list[int]:
    of = {id(module): group.crossings for group in groups for module in group.modules}
    return [of[id(block)] for block in blocks]


def draw(runner: TorchRunner, requests: Sequence[GenerationRequest]) -> tuple[list[torch.Tensor], list[bytes]]:
    """Final latents and pixels."""
    recording = RecordingRunner(runner.model)
    outputs = [output for outputs in Engine(recording, EngineConfig()).generate(requests) for output in outputs]
    return [recording.final[o.request_id, o.index] for o in outputs], [o.pixels for o in outputs]


def assert_same(ours: tuple[list[torch.Tensor], list[bytes]], theirs: tuple[list[torch.Tensor], list[bytes]]) -> None:
    """Bit for bit."""
    assert all(torch.equal(a, b) for a, b in zip(ours[0], theirs[0], strict=True))
    assert ours[1] == theirs[1]


@pytest.mark.parametrize("fused", [True, False])
def test_it_draws_what_it_draws_without(z_image_path: Path, groups: list[Group], fused: bool) -> None:
    """Sizes, steps, guidance and tasks mix."""
    expected = draw(load(z_image_path, MemoryConfig(), fuse_projections=fused), REQUESTS)
    assert not groups
    assert_same(draw(load(z_image_path, EVERYTHING, fuse_projections=fused), REQUESTS), expected)


def test_every_block_comes_once_a_step(z_image_path: Path, groups: list[Group]) -> None:
    """For all sequences together; the prompts' own blocks come once for all that are encoded together."""
    runner = load(z_image_path, MemoryConfig(dit_layerwise_offload=True))
    engine, transformer = make_engine(runner), transformer_of(runner)
    run(engine, REQUESTS)
    assert isinstance(engine.runner, RecordingRunner)
    steps = engine.runner.steps
    assert len(steps[0]) == len(REQUESTS)
    assert crossings(groups, transformer.noise_refiner) == [len(steps)] * 2
    assert crossings(groups, transformer.layers) == [len(steps)] * 2
    assert crossings(groups, transformer.context_refiner) == [1] * 2


FAMILIES: dict[str, Callable[[Path], Path]] = {
    "FLUX.1 Kontext": lambda folder: tiny_flux.flux(folder, "kontext"),
    "Qwen-Image-Edit-Plus": lambda folder: tiny_qwen.qwen_image(folder, QwenImageEditPlusPipeline, zero_cond_t=True),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_keeps_to_what_is_brought(tmp_path: Path, groups: list[Group], family: str) -> None:
    """Blocks and layers use their weights in their own turns only, edits included."""
    path = FAMILIES[family](tmp_path)
    plain = load(path, MemoryConfig())
    given: dict[str, Any] = {"width": 64, "height": 64, "num_inference_steps": 2, "seed": 1}
    image = {"images": (picture(64, 64),), "strength": None if "editing" in plain.info.tasks else 0.6}
    requests = [GenerationRequest(prompt=LONG, negative_prompt="w3", true_cfg_scale=2.0, **given, **image)]
    if "text-to-image" in plain.info.tasks:
        requests.append(GenerationRequest(prompt="w1", **given))
    assert_same(draw(load(path, EVERYTHING), requests), draw(plain, requests))
    assert len(groups) > 50


def test_both_transformers_keep_to_what_is_brought(tmp_path: Path, groups: list[Group]) -> None:
    path = tiny_wan.wan(tmp_path, networks=2)
    given: dict[str, Any] = {"width": 32, "height": 32, "seed": 1}
    requests = [
        GenerationRequest(prompt=LONG, num_frames=5, num_inference_steps=4, **given),
        GenerationRequest(prompt="w1", num_frames=1, num_inference_steps=6, **given),
    ]
    expected, offloaded = draw(load(path, MemoryConfig()), requests), load(path, EVERYTHING)
    assert_same(draw(offloaded, requests), expected)
    assert isinstance(offloaded.model, Wan)
    assert all(min(crossings(groups, transformer.blocks)) > 0 for transformer in offloaded.model.transformers)


def test_two_blocks_are_there_at_most(z_image_path: Path, groups: list[Group]) -> None:
    runner = load(z_image_path, MemoryConfig(dit_layerwise_offload=True))
    transformer, there = transformer_of(runner), []
    lists = {"noise_refiner", "context_refiner", "layers"}
    names = [name for name, _ in transformer.named_parameters() if name.split(".")[0] not in lists]
    for block in transformer.layers:
        block.feed_forward.register_forward_hook(lambda *_: there.append([group.is_away for group in groups[-3:]]))
    run(make_engine(runner), REQUESTS[:1])
    assert there == [[True, False, False], [True, True, False]] * 3  # it and the next one; at each of three steps
    assert all(group.is_away for group in groups)
    assert [name for name, tensor in transformer.named_parameters() if not tensor.isnan().any()] == names


def test_after_a_fault_in_a_block_the_next_step_is_right(
    z_image_path: Path, z_image_runner: TorchRunner, groups: list[Group]
) -> None:
    expected = run(make_engine(z_image_runner), REQUESTS[:2])
    runner = load(z_image_path, MemoryConfig(dit_layerwise_offload=True))
    faults = [RuntimeError("once")]

    def fail(*_: Any) -> None:
        if faults:
            raise faults.pop()

    transformer_of(runner).layers[0].feed_forward.register_forward_pre_hook(fail)
    ours = run(make_engine(runner), REQUESTS[:2])  # that step is done again, one job at a time
    assert all(torch.allclose(a[0], b[0], atol=1e-4) for a, b in zip(ours, expected, strict=True))


class Accelerator:
    """Enough of a device's module in torch for streams to be asked for."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    class Stream:
        def synchronize(self) -> None:
            pass


@pytest.fixture
def cuda(groups: list[Group], monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A device with streams, as far as diffusers can see."""
    monkeypatch.setattr(group_offloading, "TorchDeviceBackend", Accelerator)
    return torch.device("cuda")


def test_the_first_block_is_waited_for_and_the_others_come_ahead(groups: list[Group], cuda: torch.device) -> None:
    transformer = nn.Module()
    transformer.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])
    offload_blocks(transformer, cuda)
    assert all(group.stream is groups[0].stream is not None for group in groups)
    assert [(group.onload_self, group.non_blocking) for group in groups] == [
        (True, False),
        (False, True),
        (False, True),
    ]


def test_a_part_keeps_no_record_of_its_calls(groups: list[Group], cuda: torch.device) -> None:
    """Left to itself, diffusers would take the layers' order from a first call; calls differ here."""
    part = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4))
    x = torch.randn(2, 4)
    expected = part(x)
    offload_part(part, cuda)
    weights = [group for group in groups if group.tensors]
    for count in (1, 2):
        assert torch.equal(part(x), expected)
        assert [group.crossings for group in weights] == [count] * 3
        assert all(group.is_away and not group.non_blocking for group in weights)
    assert all(set(module._diffusers_hook.hooks) <= {"group_offloading"} for module in part.modules())


def test_without_a_device_the_flags_are_said_to_do_nothing(
    z_image_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    memory = replace(EVERYTHING, vae_cpu_offload=False)
    runner = load(z_image_path, memory)
    assert [record.getMessage() for record in caplog.records] == [
        "--dit-layerwise-offload, --text-encoder-cpu-offload: no effect on cpu, only on a CUDA device"
    ]
    assert not any(hasattr(module, "_diffusers_hook") for module in runner.model.transformer.modules())


def test_where_offload_is_possible() -> None:
    assert possible_offload(EVERYTHING, torch.device("cuda:0")) == EVERYTHING
    nothing = possible_offload(replace(EVERYTHING, embedding_cache_mb=3.0), torch.device("cpu"))
    assert nothing == MemoryConfig(embedding_cache_mb=3.0)
    assert set(FLAGS) == {name for name in vars(nothing) if name.endswith("offload")}
