import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file

from stepbatch.config import DefaultsConfig, EngineConfig, ModelConfig
from stepbatch.errors import CheckpointError, OptionError, SetupError
from stepbatch.models import checkpoint
from stepbatch.models.checkpoint import checkpoint_name
from stepbatch.models.loading import choose_dtype
from stepbatch.models.native import load_model


def load(path: Path, **settings: object) -> None:
    defaults = DefaultsConfig(**{k: v for k, v in settings.items() if k.startswith("default_")})  # type: ignore[arg-type]
    model = {k: v for k, v in settings.items() if not k.startswith("default_")}
    load_model(EngineConfig(model=ModelConfig(model_path=str(path), **model), defaults=defaults))  # type: ignore[arg-type]


def refusal(path: Path, kind: type[SetupError] = CheckpointError, **settings: object) -> str:
    with pytest.raises(kind) as caught:
        load(path, **settings)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture
def copy(z_image_path: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(z_image_path, tmp_path / "copy"))


def test_a_missing_folder(tmp_path: Path) -> None:
    assert "there is no folder" in refusal(tmp_path / "nothing")


def test_a_folder_that_is_no_checkpoint(tmp_path: Path) -> None:
    assert "model_index.json" in refusal(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"_class_name": 3}'])
def test_a_broken_index(tmp_path: Path, text: str) -> None:
    (tmp_path / "model_index.json").write_text(text)
    assert "model_index.json" in refusal(tmp_path)


def test_a_pipeline_without_a_native_model_is_named(copy: Path) -> None:
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps(index | {"_class_name": "OtherPipeline"}))
    message = refusal(copy)
    assert "OtherPipeline, which has no native model" in message


@pytest.mark.parametrize("part", ["vae", "transformer", "text_encoder", "tokenizer", "scheduler"])
def test_a_part_that_is_missing_is_named(copy: Path, part: str) -> None:
    shutil.rmtree(copy / part)
    assert f"{part} is missing" in refusal(copy)


def test_weights_that_are_missing_are_named(copy: Path) -> None:
    next((copy / "vae").glob("*.safetensors")).unlink()
    assert "vae has no weights" in refusal(copy)


def test_a_shard_that_is_missing_is_named(copy: Path) -> None:
    index = {"metadata": {}, "weight_map": {"a": "part-1.safetensors"}}
    (copy / "transformer" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    assert "transformer/part-1.safetensors is missing" in refusal(copy)


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": 3}'])
def test_a_broken_index_of_weights(copy: Path, text: str) -> None:
    (copy / "vae" / "diffusion_pytorch_model.safetensors.index.json").write_text(text)
    assert "no index of weights" in refusal(copy)


def test_an_override_that_the_architecture_does_not_reach(copy: Path) -> None:
    (copy / "stepbatch.json").write_text('{"width": 4096}')
    assert "default width" in refusal(copy, OptionError)


def test_a_tokenizer_without_chat_template(copy: Path) -> None:
    for path in (copy / "tokenizer").glob("chat_template*"):
        path.unlink()
    config = json.loads((copy / "tokenizer" / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (copy / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(config))
    assert "no chat template" in refusal(copy)


def test_pickled_weights_are_refused_unread(copy: Path) -> None:
    weights = next((copy / "transformer").glob("*.safetensors"))
    torch.save({}, weights.with_suffix(".bin"))
    weights.unlink()
    assert "pickled" in refusal(copy)


def test_truncated_weights(copy: Path) -> None:
    weights = next((copy / "transformer").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "can't be loaded" in refusal(copy)


def test_weights_of_another_shape(copy: Path) -> None:
    config = copy / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"cap_feat_dim": 48}))
    assert "can't be loaded" in refusal(copy)


@pytest.mark.parametrize("part", ["transformer", "text_encoder", "vae"])
def test_a_parameter_that_is_missing_is_named(copy: Path, part: str) -> None:
    path = next((copy / part).glob("*.safetensors"))
    tensors = load_file(path)
    name = sorted(tensors)[3]
    del tensors[name]
    save_file(tensors, path, {"format": "pt"})
    assert f"it has no {name}" in refusal(copy)


@pytest.mark.parametrize("config", [{"stochastic_sampling": True}, {"_class_name": "DDIMScheduler"}])
def test_a_noise_schedule_without_native_form(copy: Path, config: dict[str, object]) -> None:
    path = copy / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    if "_class_name" in config:
        index = json.loads((copy / "model_index.json").read_text())
        (copy / "model_index.json").write_text(json.dumps(index | {"scheduler": ["diffusers", "DDIMScheduler"]}))
    assert "noise schedule" in refusal(copy)


def test_overrides_beside_the_checkpoint(copy: Path) -> None:
    (copy / "stepbatch.json").write_text(
        '{"num_inference_steps": 6, "guidance_scale": 2, "width": 96, "max_side": 256}'
    )
    info = load_model(EngineConfig(model=ModelConfig(model_path=str(copy)))).info
    assert (info.defaults.num_inference_steps, info.defaults.guidance_scale) == (6, 2)
    assert (info.defaults.width, info.max_side) == (96, 256)


@pytest.mark.parametrize("text", ["{", "[]", '{"steps": 3}', '{"width": "x"}', '{"guidance_scale": null}'])
def test_broken_overrides(copy: Path, text: str) -> None:
    (copy / "stepbatch.json").write_text(text)
    assert "stepbatch.json" in refusal(copy)


def test_flags_go_over_everything(z_image_path: Path) -> None:
    flags = DefaultsConfig(
        default_size="64x96",
        default_num_inference_steps=3,
        default_guidance_scale=0.5,
        default_negative_prompt="blurry",
    )
    info = load_model(EngineConfig(model=ModelConfig(model_path=str(z_image_path)), defaults=flags)).info
    assert (info.defaults.width, info.defaults.height, info.defaults.num_inference_steps) == (64, 96, 3)
    assert (info.defaults.guidance_scale, info.defaults.negative_prompt) == (0.5, "blurry")


@pytest.mark.parametrize("size", ["64", "64x", "axb", "65x64", "64x100000"])
def test_a_default_size_that_can_not_be(z_image_path: Path, size: str) -> None:
    assert "default" in refusal(z_image_path, OptionError, default_size=size)


@pytest.mark.parametrize("device", ["cuda:99", "nonsense"])
def test_a_device_that_is_not_there(z_image_path: Path, device: str) -> None:
    assert device in refusal(z_image_path, OptionError, device=device)


def test_precision_by_device() -> None:
    assert choose_dtype("auto", torch.device("cpu")) is torch.float32
    assert choose_dtype("auto", torch.device("cuda")) is torch.bfloat16
    assert choose_dtype("float16", torch.device("cpu")) is torch.float16


def test_names(tmp_path: Path) -> None:
    cached = tmp_path / "models--Some--Model-Name" / "snapshots" / "0123"
    cached.mkdir(parents=True)
    assert checkpoint_name(cached) == "Model-Name"
    assert checkpoint_name(tmp_path) == tmp_path.name


@pytest.mark.parametrize("name", ["embed_tokens.weight", "norm.weight"])
def test_a_text_encoder_without_one_of_its_parameters_is_refused(copy: Path, name: str) -> None:
    [file] = (copy / "text_encoder").glob("*.safetensors")
    tensors = load_file(file)
    [key] = [key for key in tensors if key.endswith(name) and "layers" not in key]
    save_file({k: v for k, v in tensors.items() if k != key}, file, metadata={"format": "pt"})
    assert name in refusal(copy)


@pytest.mark.parametrize("text", [
    '{"strength": 0}', '{"strength": 5}', '{"max_sequence_length": 100000}', '{"reference_area": 0}',
    '{"max_side": -1}',
])  # fmt: skip
def test_overrides_that_no_request_could_live_with(copy: Path, text: str) -> None:
    (copy / "stepbatch.json").write_text(text)
    assert "stepbatch.json" in refusal(copy)


def test_only_the_parts_that_the_index_lists_are_fetched(
    copy: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A repository may have the same weights again, in one file at its top or in other precisions."""
    repository = [
        *(str(path.relative_to(copy)) for path in copy.rglob("*") if path.is_file()),
        "everything.safetensors", "vae/diffusion_pytorch_model.fp16.safetensors", "other/model.safetensors", "x.png",
    ]  # fmt: skip
    fetched: set[str] = set()

    def snapshot(name: str, **patterns: Any) -> str:
        assert name == "someone/model"
        fetched.update(filter_repo_objects(repository, **patterns))
        return str(copy)

    monkeypatch.setattr(checkpoint, "snapshot_download", snapshot)
    assert checkpoint.find_checkpoint(ModelConfig(model_path="someone/model")) == copy
    assert fetched == {str(path.relative_to(copy)) for path in copy.rglob("*") if path.is_file()}
