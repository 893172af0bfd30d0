"""The settings, grouped. The command line's flags are made from these fields; no flag is declared anywhere else."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from dataclasses import Field, dataclass, field, fields, replace
from typing import Any, Literal, get_args, get_origin, get_type_hints

from stepbatch.demo import MODEL_PATH
from stepbatch.engine.policies import POLICIES
from stepbatch.errors import InvalidValue, OptionError
from stepbatch.sizes import parse_size

API_KEY_VARIABLE = "STEPBATCH_API_KEY"  # of the environment: keys, separated by commas


def option(
    default: Any,
    help: str,
    *,
    low: float | None = None,
    high: float | None = None,
    endless: bool = False,
    auto: bool = False,
    bare: Any = None,
    aliases: tuple[str, ...] = (),
    secret: bool = False,
    choices: Iterable[str] = (),
) -> Any:
    """A field that becomes a flag.

    Args:
        low: The least value.
        high: The greatest value.
        endless: Infinity will do.
        auto: It is a number, or ``None``, which is written auto.
        bare: What the flag means without a value; ``None`` if it needs one.
        aliases: Other names of the flag.
        secret: It is left out where a config is written as text.
        choices: What it may be, where its type doesn't say.
    """
    bounds = {"low": low, "high": high, "endless": endless}
    metadata = {"help": help, **bounds, "auto": auto, "bare": bare, "aliases": aliases, "choices": (*choices,)}
    return field(default=default, repr=not secret, metadata=metadata)


def check(config: Any) -> None:
    """Raise ``OptionError`` for a value that is out of its range or none of its choices."""
    hints = get_type_hints(type(config))
    for f in fields(config):
        value, flag = getattr(config, f.name), f"--{f.name.replace('_', '-')}"
        choices = choices_of(f, hints[f.name])
        if choices:
            _check_choice(flag, value, choices)
        elif isinstance(value, int | float) and not (f.metadata["endless"] and value == math.inf):
            _check_range(flag, value, f.metadata["low"], f.metadata["high"])


def choices_of(option: Field[Any], hint: Any) -> tuple[str, ...]:
    """What a config's field may be, where there is a choice; ``hint`` is its type."""
    choices: tuple[str, ...] = get_args(hint) if get_origin(hint) is Literal else option.metadata["choices"]
    return choices


def _check_choice(flag: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        close = difflib.get_close_matches(value, choices, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise OptionError(f"{flag} must be one of {', '.join(choices)}, not {value!r}{hint}")


def _check_range(flag: str, value: float, low: float | None, high: float | None) -> None:
    low, high = -math.inf if low is None else low, math.inf if high is None else high
    if not (math.isfinite(value) and low <= value <= high):
        bounds = f"at least {low:.12g}" if math.isinf(high) else f"from {low:.12g} to {high:.12g}"
        bounds = f"{low:.12g}" if low == high else bounds
        raise OptionError(f"{flag} must be {bounds}, not {value}")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which model, where, and in what precision."""

    model_path: str = option(
        str(MODEL_PATH), "a checkpoint's folder in diffusers' layout, or the name of such a repository on Hugging Face"
    )
    served_model_name: str = option("", "the name that clients use for the model; without it, the folder's name")
    backend: Literal["auto", "native", "diffusers", "fake"] = option(
        "auto",
        "how the model is run: step by step, as a whole diffusers pipeline, or whichever can be, the first before the "
        "second; fake draws no pictures and takes a fixed time a step, for load tests",
    )
    load_format: Literal["auto", "dummy"] = option(
        "auto", "dummy makes random weights from the configs alone, for timing; those of well-known models are packaged"
    )
    dummy_size: Literal["full", "small"] = option(
        "full", "how large --load-format dummy makes it; small is the same architecture with hardly any width or depth"
    )
    fake_step_ms: float = option(5.0, "how long a step of --backend fake takes", low=0)
    fake_memory_tokens: int | None = option(
        None, "the most tokens that a step of --backend fake has memory for; without it, any number", low=1
    )
    fake_videos: bool = option(False, "--backend fake makes videos instead of pictures")
    num_gpus: int = option(1, "how many accelerators to use", low=1, high=1)
    device: str = option("auto", "cpu, cuda, cuda:1, ...; auto takes cuda where there is one")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto", "precision of every part of the model; auto is float32 on a CPU, bfloat16 elsewhere"
    )
    fuse_projections: bool = option(True, "multiply by the weights of neighbouring layers at once")
    image_positions: Literal["diffusers", "trained"] = option(
        "diffusers", "where a text encoder that sees images counts them: as diffusers has it, or as it was trained"
    )
    num_threads: int = option(0, "threads that the model computes with on a CPU; 0 leaves it to torch", low=0)

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, kw_only=True)
class BatchingConfig:
    """How wide a step may be."""

    dynamic_batch_max_size: int | None = option(
        None,
        "the most jobs that share a denoising step; auto is as many as pay, and 8 in a whole pipeline call",
        auto=True,
        low=1,
        high=4096,
    )
    dynamic_batch_delay_ms: float = option(
        0.0,
        "how long a request waits for company where a batch is a whole pipeline call; native models never wait",
        low=0,
    )
    max_batch_tokens: int | None = option(
        None,
        "the most tokens in a denoising step; a larger job runs by itself; auto is as many as pay, by what steps were "
        "measured to cost",
        auto=True,
        low=1,
    )
    max_encodes_per_step: int | None = option(
        None,
        "the most requests, or images of them, that are encoded, together, between two steps; auto is what takes no "
        "longer than a step",
        auto=True,
        low=1,
    )
    max_decodes_per_step: int | None = option(
        None,
        "the most pictures that are decoded between two steps; auto is what takes no longer than a step",
        auto=True,
        low=1,
    )
    scheduling_policy: str = option(
        "boost",
        "who goes first: first come, first served, with a start for what is short that grows with how busy it is; "
        "without one; the shortest remaining processing time; or the earliest deadline",
        choices=POLICIES,
    )
    ageing: float = option(
        0.5, "seconds of remaining time that a second of waiting makes up for, with --scheduling-policy srpt", low=0
    )
    fair_shares: bool = option(False, "give each user, as requests name them, the same share of the machine's time")

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """What is kept where, and how much of it."""

    embedding_cache_mb: float = option(
        1024.0, "room for embeddings of prompts and latents of input images that may come again, MiB", low=0
    )
    dit_layerwise_offload: bool = option(
        False, "keep the transformer's blocks in the CPU's memory, each on the device for its turn in a step"
    )
    text_encoder_cpu_offload: bool = option(
        False, "keep the text encoders in the CPU's memory, each layer on the device for its turn"
    )
    vae_cpu_offload: bool = option(False, "keep the VAE in the CPU's memory, each layer on the device for its turn")

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, kw_only=True)
class AdmissionConfig:
    """What is let in, and what is refused with 429."""

    max_queue_seconds: float | None = option(
        None,
        "the most work that may be there when a request comes, what runs included, in predicted seconds; inf is no "
        "bound; auto is 600 for pictures, as clients give up after ten minutes, and no bound for videos, which nobody "
        "waits for on the line",
        low=0,
        endless=True,
        auto=True,
    )
    max_queue_requests: int = option(10_000, "the most jobs that may wait, whatever they take", low=1)

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, kw_only=True)
class WarmupConfig:
    """What is measured at the start, so that it is known what a step costs."""

    warmup: bool = option(
        True,
        "measure what steps cost before the first request, unless that is known from before; what whole pipeline calls "
        "cost is learned as they run, unless --warmup-sizes names sizes",
    )
    warmup_sizes: tuple[str, ...] = option(
        (), "WIDTHxHEIGHT of what is tried; may be repeated; without it, sizes from small to over the default"
    )
    warmup_seconds: float = option(10.0, "how long that may take", low=0)
    profile_cache: str = option(
        "",
        "the folder where it is kept, or off; without it, stepbatch/profiles where XDG_CACHE_HOME says",
    )

    def __post_init__(self) -> None:
        check(self)
        _ = self.sizes

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Width and height of each of ``warmup_sizes``; raises ``OptionError``."""
        try:
            return [parse_size(size) for size in self.warmup_sizes]
        except InvalidValue:
            given = ", ".join(self.warmup_sizes)
            raise OptionError(f"--warmup-sizes must be WIDTHxHEIGHT, like 1024x1024, not {given}") from None


@dataclass(frozen=True, kw_only=True)
class DefaultsConfig:
    """What a request gets where it says nothing; without these, the model's own."""

    default_size: str = option("", "WIDTHxHEIGHT, pixels")
    default_num_inference_steps: int = option(0, "denoising steps; 0 leaves it to the model", low=0, high=1000)
    default_guidance_scale: float | None = option(None, "strength of guidance", low=0, high=100)
    default_true_cfg_scale: float | None = option(
        None, "strength of classifier-free guidance, where guidance_scale is something else", low=0, high=100
    )
    default_negative_prompt: str | None = option(None, "what not to draw")

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, kw_only=True)
class HttpConfig:
    """Where it listens, and how it stops."""

    host: str = option("127.0.0.1", "the address to listen on")
    port: int = option(30200, "the port to listen on", low=0, high=65535)
    url_ttl_seconds: float = option(3600.0, "how long a picture answered as a url can be fetched", low=1)
    idempotency_seconds: float = option(
        600.0, "how long an answer is kept for whoever sends the request again with the same Idempotency-Key", low=0
    )
    drain_seconds: float = option(30.0, "how long requests in flight may take to finish at shutdown", low=0)

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, kw_only=True)
class AccessConfig:
    """Who is let in."""

    api_key: tuple[str, ...] = option(
        (),
        "a key that lets in, as NAME=KEY or KEY; may be repeated; others see it in the list of processes, unlike those "
        "of --api-key-file, or of STEPBATCH_API_KEY in the environment, separated by commas",
        secret=True,
    )
    api_key_file: str = option("", "a file of keys, NAME=KEY or KEY, one a line; a line may be a comment, after #")
    insecure_no_auth: bool = option(False, "let anyone in, without a key, who reaches the server from other machines")
    allowed_host: tuple[str, ...] = option(
        (),
        "a name that requests may call the server by, in their Host header, beside localhost and --host; may be "
        "repeated; without it, any name will do where there are keys, or --insecure-no-auth",
    )
    docs: bool = option(False, "serve /openapi.json, the description of this interface")

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, kw_only=True)
class LimitsConfig:
    """How much a client may send, and how slowly; what has more is refused before it is held."""

    max_body_bytes: int = option(1 << 20, "the largest body of a request, or all of an edit's texts", low=1024)
    max_upload_bytes: int = option(32 << 20, "the largest body of an edit, its images included", low=1024)
    max_image_bytes: int = option(32 << 20, "the largest file of an image or mask", low=1024)
    max_image_pixels: int = option(16 << 20, "the most pixels of an image or mask", low=1024)
    max_uploads_mb: int = option(
        512, "room for bodies, and what their images decode to, until they are answered, MiB", low=1
    )
    max_answers_mb: int = option(
        2048, "room for pictures' answers that are being made, or that clients have not read yet, MiB", low=1
    )
    max_form_parts: int = option(64, "the most parts of a form", low=1)
    max_header_bytes: int = option(16 << 10, "the longest request line and headers, together", low=1024)
    max_prompt_bytes: int = option(32 << 10, "the longest prompt, and negative prompt, in UTF-8", low=1)
    max_outputs: int = option(10, "the most pictures of a request, its n", low=1, high=10)
    max_steps: int = option(1000, "the most denoising steps that a request may ask for", low=1, high=1000)
    max_connections: int = option(1024, "the most clients that are connected; another is answered 503", low=1)
    header_seconds: float = option(10.0, "how long a request line and its headers may take to come", low=0.1)
    body_seconds: float = option(30.0, "how long a body may take, or 64 KiB of it for each of these seconds", low=0.1)
    write_seconds: float = option(
        60.0, "how long a client may take for its answer, or 32 KiB of it for each of these seconds", low=0.1
    )

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What is written down."""

    log_level: Literal["debug", "info", "warning", "error"] = option("info", "how much is logged")
    log_format: Literal["text", "json"] = option("text", "lines for people, or one JSON object a line")
    log_prompts: bool = option(False, "log what each request asks to be drawn, 2,000 characters of it at most")

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, kw_only=True)
class VideosConfig:
    """Where videos are kept, and for how long."""

    video_dir: str = option(
        "", "where videos and their records are kept; without it, stepbatch/videos where XDG_DATA_HOME says"
    )
    video_ttl_seconds: float = option(86400.0, "how long a finished video is kept", low=1, high=1e9)
    video_disk_mb: float = option(10240.0, "room for finished videos, MiB; the oldest go first", low=0, high=1e9)

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Everything that the HTTP side needs."""

    http: HttpConfig = field(default_factory=HttpConfig)
    access: AccessConfig = field(default_factory=AccessConfig)
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    log: LogConfig = field(default_factory=LogConfig)
    videos: VideosConfig = field(default_factory=VideosConfig)


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Everything that the engine process needs."""

    model: ModelConfig = field(default_factory=ModelConfig)
    batching: BatchingConfig = field(default_factory=BatchingConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    defaults: DefaultsConfig = field(default_factory=DefaultsConfig)
    admission: AdmissionConfig = field(default_factory=AdmissionConfig)
    warmup: WarmupConfig = field(default_factory=WarmupConfig)

    def undelayed(self) -> EngineConfig:
        """The same where all requests are known from the start, so that nothing gains by waiting for company."""
        return replace(self, batching=replace(self.batching, dynamic_batch_delay_ms=0.0))
