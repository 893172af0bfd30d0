"""``stepbatch profile``: what it reads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from stepbatch.cli.bench import extra
from stepbatch.cli.parser import Parser, build_groups
from stepbatch.config import DefaultsConfig, EngineConfig, MemoryConfig, ModelConfig, WarmupConfig
from stepbatch.errors import OptionError


def profile_parser() -> Parser:
    """The flags of ``stepbatch profile``."""
    parser = Parser(
        "profile",
        "stepbatch profile [FLAG ...]",
        "Measure what a model's steps cost on this machine, and tell how far batching pays.",
    )
    parser.add_flag("-o", "--output", type=Path, default=Path("profile"), metavar="DIR", help="(default: profile)")
    for cls in (ModelConfig, MemoryConfig, DefaultsConfig, WarmupConfig):
        parser.add_config(cls)
    return parser


def profile(arguments: Sequence[str]) -> int:
    """``stepbatch profile``."""
    values = profile_parser().read(arguments)
    config = build_groups(EngineConfig, values)
    if not config.warmup.warmup:
        raise OptionError("--warmup false leaves stepbatch profile nothing to do")
    with extra("profile"):
        from stepbatch.bench.profile.run import run_profile
    return run_profile(config, values["output"])
