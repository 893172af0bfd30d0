"""Train the bundled model from nothing: ``python -m stepbatch.demo.train vae|cache|decoder|transformer|export``.

Five stages, each resumable from what it left in the work folder: an autoencoder on crops of rendered scenes, a cache of
latents at every size, more of the decoder on whole pictures, a text encoder and transformer by flow matching on that
cache (in several processes under ``torchrun``), and the export to a checkpoint in diffusers' ``ZImagePipeline`` layout.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3Model

from stepbatch.demo import MODEL_PATH, scenes
from stepbatch.demo.muon import Muon
from stepbatch.demo.processes import agree, average_gradients, join_processes
from stepbatch.models.defaults import OVERRIDES_FILE

MUON_RATE, ADAM_RATE = 8e-3, 3e-3
SIDES = range(128, 257, 16)
DEFAULTS = {
    "width": 192,
    "height": 192,
    "num_inference_steps": 12,
    "guidance_scale": 1.5,
    "min_side": SIDES[0],
    "max_side": SIDES[-1],
}
USER, ASSISTANT, PAD, UNKNOWN = "<user>", "<assistant>", "<pad>", "<unk>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<user> {{ message['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of whole words; words outside the language become one unknown token."""
    words = [*scenes.COLORS, *scenes.SHAPES, *scenes.SIZES, *scenes.SYNONYMS]
    words += ["a", "an", "on", "to", "the", "left", "right", "of", "and", "above", "below", "background", ",", "."]
    words += [w for filler in scenes.FILLERS for w in filler.split()]
    vocabulary = {w: i for i, w in enumerate(dict.fromkeys([PAD, UNKNOWN, USER, ASSISTANT, *words]))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(r"[^\w\s]"), "isolated")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        unk_token=UNKNOWN,
        additional_special_tokens=[USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        model_max_length=512,
        padding_side="right",
    )


def make_vae() -> AutoencoderKL:
    """An autoencoder of 8x compression into 8 channels."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 48, 64),
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=8,
        sample_size=256,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=1.0,
        shift_factor=0.0,
    )


def make_text_encoder(vocabulary: int, dim: int) -> Qwen3Model:
    """A Qwen3 whose last layer but one is read, as the pipeline does."""
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=dim,
        intermediate_size=2 * dim,
        num_hidden_layers=3,
        num_attention_heads=dim // 32,
        num_key_value_heads=dim // 32,
        head_dim=32,
        max_position_embeddings=1024,
        rope_theta=10000.0,
    )
    return Qwen3Model(config)


def make_transformer(dim: int, layers: int) -> ZImageTransformer2DModel:
    """The denoiser, small enough that a step is milliseconds on a CPU core."""
    return ZImageTransformer2DModel(
        in_channels=8,
        dim=dim,
        n_layers=layers,
        n_refiner_layers=1,
        n_heads=dim // 32,
        n_kv_heads=dim // 32,
        cap_feat_dim=dim,
        axes_dims=[8, 12, 12],
        axes_lens=[1024, 64, 64],
    )


def to_tensor(images: list[np.ndarray]) -> torch.Tensor:
    """uint8 ``[H, W, 3]`` arrays to one fp32 ``[B, 3, H, W]`` in [-1, 1]."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def train_vae(folder: Path, minutes: float) -> None:
    """Train the autoencoder on crops of 64 to 128 pixels that hold an edge."""
    resumed = (folder / "vae").exists()
    rng, vae = random.Random(), AutoencoderKL.from_pretrained(folder / "vae") if resumed else make_vae()
    rate = 1e-3 if resumed else 2e-3
    optimizer = torch.optim.AdamW(vae.parameters(), lr=rate, weight_decay=1e-3, betas=(0.9, 0.99))
    start, step = time.monotonic(), 0
    while (elapsed := (time.monotonic() - start) / 60) < minutes:
        progress = elapsed / minutes
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, step / 100) * (0.5 + 0.5 * math.cos(math.pi * progress)) + 1e-5
        side = rng.choice([64, 64, 96, 128])
        images = []
        for _ in range(16 * 64 * 64 // side // side + 1):
            width, height = rng.choice(SIDES), rng.choice(SIDES)
            scene = scenes.sample_scene(rng)
            placements = scene.placements(width, height)
            x, y, r = rng.choice(placements)
            left = min(max(0, int(x + rng.uniform(-r, r) - side / 2)), width - side)
            top = min(max(0, int(y + rng.uniform(-r, r) - side / 2)), height - side)
            images.append(np.asarray(scene.render(width, height))[top : top + side, left : left + side])
        batch = to_tensor(images)
        posterior = vae.encode(batch).latent_dist
        decoded = vae.decode(posterior.sample()).sample
        l1 = (decoded - batch).abs().mean()
        mse = F.mse_loss(decoded, batch)
        loss = l1 + mse + 2e-3 * posterior.kl().mean() / posterior.mean[0].numel()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 100 == 0:
            std = posterior.mean.std().item()
            print(
                f"{elapsed:6.1f} min step {step} l1 {l1.item():.4f} mse {mse.item():.5f} latent std {std:.3f}",
                flush=True,
            )
    vae.eval()
    latents = []
    with torch.no_grad():
        for _ in range(32):
            images = [np.asarray(scenes.sample_scene(rng).render(192, 192)) for _ in range(8)]
            latents.append(vae.encode(to_tensor(images)).latent_dist.mode())
    stacked = torch.cat(latents)
    vae.register_to_config(scaling_factor=1 / stacked.std().item(), shift_factor=stacked.mean().item())
    vae.save_pretrained(folder / "vae")


def train_decoder(folder: Path, minutes: float) -> None:
    """Go on with the decoder alone, on whole pictures and slightly wrong latents; the cached latents stay valid."""
    vae = AutoencoderKL.from_pretrained(folder / "vae").requires_grad_(False)
    parameters = list(vae.decoder.requires_grad_(True).parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=1e-3, betas=(0.9, 0.99))
    rng, start, step = random.Random(), time.monotonic(), 0
    while (elapsed := (time.monotonic() - start) / 60) < minutes:
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1.0, step / 50) * (0.5 + 0.5 * math.cos(math.pi * elapsed / minutes)) + 1e-6
        width, height = min(rng.choice(SIDES), rng.choice(SIDES)), min(rng.choice(SIDES), rng.choice(SIDES))
        batch = to_tensor([np.asarray(scenes.sample_scene(rng).render(width, height)) for _ in range(4)])
        with torch.no_grad():
            latents = vae.encode(batch).latent_dist.mode()
            latents += rng.uniform(0, 0.15) * torch.randn_like(latents) / vae.config.scaling_factor
        decoded = vae.decode(latents).sample
        loss = (decoded - batch).abs().mean() + F.mse_loss(decoded, batch)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        step += 1
        if step % 50 == 0:
            print(f"{elapsed:6.1f} min step {step} loss {loss.item():.4f}", flush=True)
    vae.save_pretrained(folder / "vae-decoded")


def cache_latents(folder: Path, minutes: float, seed: int) -> None:
    """Write shards of (prompt, latents), each of one size; the trainer picks them up as they come."""
    vae = AutoencoderKL.from_pretrained(folder / "vae").eval()
    scale, shift = vae.config.scaling_factor, vae.config.shift_factor
    (folder / "latents").mkdir(exist_ok=True)
    rng, start, index = random.Random(seed), time.monotonic(), 0
    while time.monotonic() - start < 60 * minutes:
        width, height = rng.choice(SIDES), rng.choice(SIDES)
        if rng.random() < 0.5:
            width, height = min(width, rng.choice(SIDES)), min(height, rng.choice(SIDES))
        prompts, latents = [], []
        with torch.no_grad():
            for _ in range(8):
                drawn = [scenes.sample_scene(rng, pairs=0.45) for _ in range(16)]
                images = [np.asarray(s.render(width, height)) for s in drawn]
                latents.append(((vae.encode(to_tensor(images)).latent_dist.mode() - shift) * scale).half())
                prompts += drawn
        path = folder / "latents" / f"{seed}-{index:05d}.pt"
        torch.save({"scenes": prompts, "latents": torch.cat(latents)}, path.with_suffix(".part"))
        path.with_suffix(".part").rename(path)
        index += 1


class Sampler:
    """Batches of one size from the cache, which may still be growing."""

    def __init__(self, folder: Path, seed: int, singles: float) -> None:
        self.folder, self.rng, self.singles = folder / "latents", random.Random(seed), singles
        self.shards: dict[str, dict[str, Any]] = {}

    def refresh(self) -> None:
        """Read the shards that are new."""
        for path in self.folder.glob("*.pt"):
            if path.name not in self.shards:
                self.shards[path.name] = torch.load(path, weights_only=False)

    def batch(self, tokens: int, favour_small: bool) -> tuple[list[str], torch.Tensor]:
        """Prompts (a tenth of them empty) and fp32 latents ``[B, C, H, W]`` of about ``tokens`` tokens."""
        weights = [shard["latents"].shape[-2:].numel() ** (-0.75 * favour_small) for shard in self.shards.values()]
        shard = self.rng.choices(list(self.shards.values()), weights)[0]
        latents = shard["latents"]
        count = min(len(latents), tokens // (latents.shape[2] * latents.shape[3] // 4 + 32))
        drawn = shard["scenes"]
        by_turns = sorted(self.rng.sample(range(len(latents)), len(latents)), key=lambda i: len(drawn[i].things))
        singles = sum(len(scene.things) == 1 for scene in drawn)
        half = min(singles, int(self.singles * count))
        chosen = by_turns[:half] + by_turns[singles : singles + count - half]
        prompts = [scenes.sample_wording(drawn[i], self.rng) if self.rng.random() > 0.1 else "" for i in chosen]
        return prompts, latents[chosen].float()


def embed(tokenizer: PreTrainedTokenizerFast, encoder: Qwen3Model, prompts: list[str]) -> list[torch.Tensor]:
    """Prompt embeddings as ``ZImagePipeline`` makes them, without padding to its full length."""
    texts = [
        tokenizer.apply_chat_template([{"role": "user", "content": p}], tokenize=False, add_generation_prompt=True)
        for p in prompts
    ]
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    mask = inputs.attention_mask.bool()
    hidden = encoder(input_ids=inputs.input_ids, attention_mask=mask, output_hidden_states=True).hidden_states[-2]
    return [h[m] for h, m in zip(hidden, mask, strict=True)]


def flow_loss(
    transformer: ZImageTransformer2DModel, embeds: list[torch.Tensor], latents: torch.Tensor, shift: float = 3.0
) -> torch.Tensor:
    """Flow matching: the transformer's output is ``latents - noise`` at time ``1 - sigma``."""
    uniform = torch.rand(len(latents))
    shifted = shift * uniform / (1 + (shift - 1) * uniform)
    # a prompt determines its picture, so what it says is learned best where the noise hides all else
    sigma = torch.where(torch.rand(len(latents)) < 0.5, 0.8 + 0.2 * uniform, shifted)
    noise = torch.randn_like(latents)
    s = sigma[:, None, None, None]
    noisy = s * noise + (1 - s) * latents
    output = transformer(list(noisy.unsqueeze(2).unbind(0)), 1 - sigma, embeds, return_dict=False)[0]
    return F.mse_loss(torch.stack(output).squeeze(2), latents - noise)


def make_optimizers(modules: nn.ModuleDict) -> tuple[Muon, torch.optim.AdamW]:
    """Muon for the matrices inside the blocks, AdamW for embeddings, projections in and out, norms and biases."""
    matrices: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in modules.named_parameters():
        inside = parameter.ndim == 2 and any(part in name for part in ("layers.", "refiner.")) and "adaLN" not in name
        if parameter.requires_grad:
            (matrices if inside else rest).append(parameter)
    return (
        Muon(matrices, rate=MUON_RATE, momentum=0.95, decay=0.01),
        torch.optim.AdamW(rest, lr=ADAM_RATE, weight_decay=0.0, betas=(0.9, 0.98)),
    )


def train_transformer(
    folder: Path, minutes: float, dim: int, layers: int, name: str, tokens: int, singles: float
) -> None:
    """Train text encoder and transformer together; keeps an exponential average, saved every five minutes."""
    rank = join_processes()
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    modules = nn.ModuleDict({"text": make_text_encoder(len(tokenizer), dim), "image": make_transformer(dim, layers)})
    if (folder / f"{name}.pt").exists():
        modules.load_state_dict(torch.load(folder / f"{name}.pt"))
    for parameter in modules["text"].get_submodule("layers.2").parameters():
        parameter.requires_grad_(False)  # beyond the layer that is read
    print(sum(p.numel() for p in modules.parameters()), "parameters", flush=True)
    trained = [p for p in modules.parameters() if p.requires_grad]
    average = copy.deepcopy(modules).requires_grad_(False)
    muon, adam = make_optimizers(modules)
    torch.manual_seed(rank)
    sampler, start, saved, step, running = Sampler(folder, rank, singles), time.monotonic(), 0.0, 0, 1.0
    while (elapsed := agree(time.monotonic() - start) / 60) < minutes:
        if step % 50 == 0:
            sampler.refresh()
        # warm up, hold, and come down over the last five eighths
        share = min(1.0, (step + 1) / 100) * min(1.0, max(0.01, (1 - elapsed / minutes) * 1.6))
        muon.rate = MUON_RATE * share
        adam.param_groups[0]["lr"] = ADAM_RATE * share
        prompts, latents = sampler.batch(tokens, favour_small=elapsed < 0.7 * minutes)
        loss = flow_loss(modules["image"], embed(tokenizer, modules["text"], prompts), latents)
        modules.zero_grad()
        torch.autograd.backward(loss)
        average_gradients(trained)
        nn.utils.clip_grad_norm_(trained, 1.0)
        muon.step()
        adam.step()
        step += 1
        if step % 10 == 0:
            with torch.no_grad():
                for mean, parameter in zip(average.parameters(), modules.parameters(), strict=True):
                    mean.lerp_(parameter, 0.02)
        running = 0.98 * running + 0.02 * loss.item()
        if step % 50 == 0 and rank == 0:
            print(f"{elapsed:6.1f} min step {step} loss {running:.4f} shards {len(sampler.shards)}", flush=True)
        if elapsed - saved > 5 and rank == 0:
            saved = elapsed
            torch.save(average.state_dict(), folder / f"{name}.pt")
    if rank == 0:
        torch.save(average.state_dict(), folder / f"{name}.pt")


def export(folder: Path, target: Path, dim: int, layers: int, name: str) -> None:
    """Put the parts together as a ``ZImagePipeline`` checkpoint in fp16."""
    tokenizer = make_tokenizer()
    modules = nn.ModuleDict({"text": make_text_encoder(len(tokenizer), dim), "image": make_transformer(dim, layers)})
    modules.load_state_dict(torch.load(folder / f"{name}.pt"))
    pipeline = ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=AutoencoderKL.from_pretrained(folder / "vae-decoded"),
        text_encoder=modules["text"],
        tokenizer=tokenizer,
        transformer=modules["image"],
    )
    pipeline.to(torch.float16).save_pretrained(target, safe_serialization=True)
    (target / OVERRIDES_FILE).write_text(json.dumps(DEFAULTS, indent=2) + "\n")


def main() -> None:
    """Run one stage."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=["vae", "cache", "decoder", "transformer", "export"])
    parser.add_argument("--folder", type=Path, default=Path("training"))
    parser.add_argument("--target", type=Path, default=MODEL_PATH)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dim", type=int, default=96)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--name", default="transformer")
    parser.add_argument("--tokens", type=int, default=3072, help="in a process's batch")
    parser.add_argument("--singles", type=float, default=0.9, help="share of scenes with one thing; learn those first")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.folder.mkdir(parents=True, exist_ok=True)
    if options.stage == "vae":
        train_vae(options.folder, options.minutes)
    elif options.stage == "cache":
        cache_latents(options.folder, options.minutes, options.seed)
    elif options.stage == "decoder":
        train_decoder(options.folder, options.minutes)
    elif options.stage == "transformer":
        train_transformer(
            options.folder,
            options.minutes,
            options.dim,
            options.layers,
            options.name,
            options.tokens,
            options.singles,
        )
    else:
        export(options.folder, options.target, options.dim, options.layers, options.name)


if __name__ == "__main__":
    main()
