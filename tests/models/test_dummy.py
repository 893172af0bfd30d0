import json
import math
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus
from PIL import Image
from torch import nn
from transformers import BatchFeature, Qwen2VLImageProcessorPil

from stepbatch import EngineConfig, GenerationRequest
from stepbatch.config import ModelConfig
from stepbatch.demo import MODEL_PATH
from stepbatch.engine.backends import load_runner
from stepbatch.engine.engine import Engine
from stepbatch.errors import CheckpointError
from stepbatch.image import InputImage
from stepbatch.models import dummy
from stepbatch.models.dummy import (
    CONFIGS,
    dummy_components,
    dummy_module,
    packaged_config,
    randomize,
    transformer_config,
)
from stepbatch.models.stand_in import QWEN_SPECIAL, clip_tokenizer, qwen_tokenizer, t5_tokenizer

CPU, META = torch.device("cpu"), torch.device("meta")
FOLDERS = sorted(CONFIGS.iterdir())
PROMPT = (
    "A cozy wooden cabin beside a frozen mountain lake at dawn, smoke rising from the chimney, pine trees covered with "
    "fresh snow, warm light glowing in the windows, reflections of purple clouds on the ice, highly detailed photograph"
)
MILLIONS = {  # parameters, as published
    "FLUX.1-dev": {"transformer": 11901, "text_encoder": 123, "text_encoder_2": 4762, "vae": 84},
    "Qwen-Image-2512": {"transformer": 20430, "text_encoder": 8292, "vae": 127},
    "Wan2.1-T2V-1.3B-Diffusers": {"transformer": 1419, "text_encoder": 5681, "vae": 127},
    "Wan2.2-T2V-A14B-Diffusers": {"transformer": 14288, "text_encoder": 5681, "vae": 127},
    "Z-Image-Turbo": {"transformer": 6155, "text_encoder": 4022, "vae": 84},
}


def transformer(folder: Path, device: torch.device, small: bool) -> Any:
    kind = getattr(diffusers, json.loads((folder / "model_index.json").read_text())["transformer"][1])
    return dummy_module(lambda: kind(**transformer_config(folder, small)), device, torch.float32, seed=1)


def millions(module: nn.Module) -> int:
    return round(sum(p.numel() for p in module.parameters()) / 1e6)


class Processor:
    """What diffusers' editing pipeline asks of a processor, without torchvision."""

    def __init__(self, tokenizer: Any, image_processor: Any) -> None:
        self.tokenizer, self.image_processor = tokenizer, image_processor

    def __call__(self, text: list[str], images: list[Image.Image], padding: bool, return_tensors: str) -> BatchFeature:
        pictures = self.image_processor(images=images, return_tensors=return_tensors)
        (prompt,) = text
        for grid in pictures["image_grid_thw"]:
            prompt = prompt.replace("<|image_pad|>", "<pad>" * (int(grid.prod()) // 4), 1)
        tokens = self.tokenizer([prompt.replace("<pad>", "<|image_pad|>")], return_tensors=return_tensors)
        return BatchFeature({**tokens, **pictures})


def pipeline(folder: Path) -> Any:
    kind = getattr(diffusers, json.loads((folder / "model_index.json").read_text())["_class_name"])
    made = kind(**dummy_components(folder, CPU, torch.float32, small=True), transformer=transformer(folder, CPU, True))
    made.set_progress_bar_config(disable=True)
    if "processor" in made.components:
        made.processor = Processor(made.tokenizer, Qwen2VLImageProcessorPil.from_pretrained(folder / "processor"))
    return made


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_the_small_model_draws(folder: Path) -> None:
    """Of its size by default, 256 x 256, from its repository's name alone."""
    name = f"anyone/{folder.name}"
    config = EngineConfig(model=ModelConfig(model_path=name, load_format="dummy", dummy_size="small"))
    engine = Engine(load_runner(config), config)
    info = engine.runner.info
    noise = Image.effect_noise((64, 64), 50).convert("RGB").tobytes()
    images = () if {"text-to-image", "text-to-video"}.intersection(info.tasks) else (InputImage(64, 64, noise),)
    frames = 1 if info.defaults.num_frames else None
    request = GenerationRequest(prompt=PROMPT, images=images, num_frames=frames, num_inference_steps=2, seed=1)
    [[output]] = engine.generate([request])
    assert (info.id, output.width, output.height) == (folder.name, 256, 256)
    assert len(set(output.pixels)) > 10


@pytest.mark.parametrize("name", ["FLUX.1-dev", "Qwen-Image-Edit-2511", "Z-Image-Turbo"])
def test_diffusers_draws_with_the_small_model(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made, more = pipeline(CONFIGS / name), {}
    if "Edit" in name:
        more["image"] = Image.effect_noise((64, 64), 50).convert("RGB")
    for area in ("CONDITION_IMAGE_SIZE", "VAE_IMAGE_SIZE"):
        monkeypatch.setattr(pipeline_qwenimage_edit_plus, area, 64 * 64)
    generator = torch.Generator().manual_seed(0)
    picture = made(
        prompt=PROMPT, height=64, width=64, num_inference_steps=2, generator=generator, output_type="np", **more
    ).images[0]
    assert picture.shape == (64, 64, 3)
    assert math.isfinite(picture.sum())
    assert picture.std() > 0.01


@pytest.mark.parametrize("name", MILLIONS)
def test_at_their_own_size_they_have_as_many_parameters_as_the_real_ones(name: str) -> None:
    folder = CONFIGS / name
    made = dummy_components(folder, META, torch.bfloat16, small=False)
    made["transformer"] = transformer(folder, META, small=False)
    assert {part: millions(made[part]) for part in MILLIONS[name]} == MILLIONS[name]
    assert all(p.is_meta for part in MILLIONS[name] for p in made[part].parameters())


@pytest.mark.parametrize(("path", "name"), [
    ("Qwen/Qwen-Image-2512", "Qwen-Image-2512"),
    ("black-forest-labs/flux.1-DEV", "FLUX.1-dev"),
    ("~/models/Z-Image-Turbo/", "Z-Image-Turbo"),
    ("Qwen/Qwen3-4B", None),
    ("..", None),
    ("", None),
])  # fmt: skip
def test_packaged_configs_are_told_by_name(path: str, name: str | None) -> None:
    folder = packaged_config(path)
    assert (folder and folder.name) == name


def test_what_the_variants_differ_in() -> None:
    def config(name: str) -> dict[str, Any]:
        return transformer_config(CONFIGS / name, small=True)

    assert config("Qwen-Image-Edit-2511") == config("Qwen-Image-Edit-2509") | {"zero_cond_t": True}
    assert config("FLUX.1-schnell") == config("FLUX.1-dev") | {"guidance_embeds": False}
    assert config("Wan2.2-T2V-A14B-Diffusers") == config("Wan2.1-T2V-1.3B-Diffusers")  # where both are small


def test_buffers_are_real_and_stay_precise() -> None:
    encoder = dummy_components(CONFIGS / "Qwen-Image", CPU, torch.bfloat16, small=True)["text_encoder"]
    buffers = dict(encoder.named_buffers())
    assert buffers["model.language_model.rotary_emb.inv_freq"].tolist() == pytest.approx(
        [1000000 ** (-i / 8) for i in range(8)]
    )
    assert {b.dtype for b in buffers.values()} == {torch.float32}
    assert {p.dtype for p in encoder.parameters()} == {torch.bfloat16}
    assert not set(buffers) & set(encoder.state_dict())


def test_tied_weights_stay_tied_and_nothing_is_dropped_out() -> None:
    encoder = dummy_components(CONFIGS / "FLUX.1-dev", CPU, torch.float32, small=True)["text_encoder_2"]
    assert encoder.shared.weight is encoder.encoder.embed_tokens.weight
    assert not encoder.training


def test_weights_depend_on_the_seed_alone() -> None:
    def weights(seed: int) -> torch.Tensor:
        module = nn.Sequential(nn.Linear(64, 128), nn.LayerNorm(128), nn.Conv2d(4, 8, 3))
        randomize(module, seed)
        return nn.utils.parameters_to_vector(module.parameters())

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_weights_keep_the_size_of_what_passes_them() -> None:
    module = nn.Sequential(nn.Linear(1024, 512), nn.LayerNorm(512), *(nn.Linear(512, 512) for _ in range(20)))
    randomize(module, 0)
    out = module(torch.randn(64, 1024, generator=torch.Generator().manual_seed(0)))
    assert 0.3 < out.std() < 3


@pytest.mark.parametrize("make", [qwen_tokenizer, clip_tokenizer, t5_tokenizer])
def test_tokens_are_believable_and_tell_texts_apart(make: Any) -> None:
    tokenizer = make()
    assert 1 < len(tokenizer(PROMPT, add_special_tokens=False).input_ids) / len(PROMPT.split()) < 1.6
    texts = [PROMPT, PROMPT[:-1], "", "a", "b", "ab", "a b", "日本", "日木", "\x00", "y" * 500, "y" * 501]
    assert len({tuple(tokenizer(text).input_ids) for text in texts}) == len(texts)
    assert tokenizer.decode(tokenizer("ab, cde日本").input_ids, skip_special_tokens=True).strip() == "ab, cde日本"


def test_special_tokens_of_qwen() -> None:
    tokenizer = qwen_tokenizer()
    config = json.loads((CONFIGS / "Qwen-Image" / "text_encoder" / "config.json").read_text())
    assert [tokenizer(token).input_ids for token in QWEN_SPECIAL] == [[151643 + i] for i in range(14)]
    for name in ("image", "video", "vision_start", "vision_end"):
        token = f"<|{name}|>" if name.startswith("vision") else f"<|{name}_pad|>"
        assert tokenizer(token).input_ids == [config[f"{name}_token_id"]]
    assert tokenizer.pad_token_id == 151643
    chat = [{"role": "user", "content": "hi"}]
    asked = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True, enable_thinking=True)
    assert asked == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("name", ["Qwen-Image-2512", "Qwen-Image-Edit-2511"])
def test_what_diffusers_cuts_off_before_a_prompt_has_its_real_length(name: str) -> None:
    index = json.loads((CONFIGS / name / "model_index.json").read_text())
    made = getattr(diffusers, index.pop("_class_name"))(**dict.fromkeys(index))
    before = made.prompt_template_encode.partition("{}")[0]
    assert len(qwen_tokenizer()(before).input_ids) == made.prompt_template_encode_start_idx


def test_special_tokens_of_clip_and_t5() -> None:
    clip, t5 = clip_tokenizer(), t5_tokenizer()
    assert (clip("a", padding="max_length", max_length=5).input_ids[::2]) == [49406, 49407, 49407]
    assert max(clip(PROMPT).input_ids) == 49407  # the pooled embedding is taken where the greatest number stands first
    assert len(clip(PROMPT * 9, truncation=True).input_ids) == clip.model_max_length == 77
    assert t5("a", padding="max_length", max_length=4).input_ids[1:] == [1, 0, 0]
    assert len(t5(PROMPT * 20, truncation=True).input_ids) == t5.model_max_length == 512
    assert max(t5(PROMPT).input_ids) < 32000


@pytest.mark.skipif(not MODEL_PATH.exists(), reason="the bundled model is not there")
def test_a_checkpoint_has_a_tokenizer_of_its_own() -> None:
    made = dummy_components(MODEL_PATH, CPU, torch.float32, small=False)
    tokens = made["tokenizer"]("a red star", return_tensors="pt").input_ids
    assert torch.isfinite(made["text_encoder"](tokens).last_hidden_state).all()


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(CONFIGS / "Z-Image-Turbo", tmp_path / "copy"))


@pytest.mark.parametrize(("part", "text"), [
    ("model_index.json", "{"),
    ("model_index.json", "[]"),
    ("model_index.json", '{"transformer": ["diffusers", "NoSuchModel"], "vae": ["diffusers", "NorThis"]}'),
    ("transformer/config.json", "3"),
])  # fmt: skip
def test_broken_configs(copy: Path, part: str, text: str) -> None:
    (copy / part).write_text(text)
    with pytest.raises(CheckpointError, match=str(copy)):
        transformer_config(copy, small=True)


def test_parts_of_which_there_is_no_dummy(copy: Path) -> None:
    (copy / "model_index.json").write_text('{"tokenizer": ["transformers", "LlamaTokenizer"]}')
    with pytest.raises(CheckpointError, match="no stand-in for a LlamaTokenizer"):
        dummy_components(copy, CPU, torch.float32, small=True)


def test_what_does_not_fit_a_cpu_is_refused_before_it_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 9999999 kB\nMemAvailable: 1048576 kB\n")
    monkeypatch.setattr(dummy, "MEMORY", tmp_path / "meminfo")
    with pytest.raises(CheckpointError, match=r"Linear needs .* of which"):
        dummy_module(lambda: nn.Linear(1 << 14, 1 << 14), CPU, torch.float32, seed=0)
