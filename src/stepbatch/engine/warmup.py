"""What a model costs before the first request: measured, or as it was measured before.

What was measured is kept in a file for each model, device, precision and whatever else it depends on. A file that can't
be read, or is of something else, is as good as none.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec

from stepbatch import __version__
from stepbatch.config import EngineConfig
from stepbatch.engine.cost import UNKNOWN, Costs
from stepbatch.engine.engine import Runner
from stepbatch.engine.measured import Measured
from stepbatch.engine.probe import probe

OFF = "off"
FAKE_SECONDS = 0.25  # that a fake model is measured for at least,
FAKE_STEPS = 12  # or as long as so many of its steps take,
FAKE_MOST = 1.0  # but no longer than this

log = logging.getLogger(__name__)


class _Entry(msgspec.Struct, frozen=True):
    """What is in a file."""

    depends: dict[str, Any]  # on what, as JSON has it
    measured: Measured


def warm_up(runner: Runner, config: EngineConfig) -> Costs:
    """What is known of a model that has just been loaded; measured, if that is asked for and it isn't known yet.

    Whole calls are tried only at sizes that are named: one may take minutes, and what they cost is learned as they run.
    """
    known = remembered(runner, config)
    wanted = config.warmup.warmup and (config.warmup.sizes or not runner.whole_calls)
    if known.known or not wanted:
        return known
    return measure(runner, config).costs()


def measure(runner: Runner, config: EngineConfig) -> Measured:
    """Measure a model that has nothing to do, and keep what was found for the next start."""
    seconds = config.warmup.warmup_seconds
    if config.model.backend == "fake":  # whose steps all take the same
        some_steps = FAKE_STEPS * config.model.fake_step_ms / 1000
        seconds = min(seconds, max(FAKE_SECONDS, some_steps), FAKE_MOST)
    measured = probe(runner, seconds, config.warmup.sizes)
    log.info("what steps cost was measured in %.1f s", measured.seconds)
    if measured.points:
        _remember(runner, config, measured)
    return measured


def remembered(runner: Runner, config: EngineConfig) -> Costs:
    """What was measured before; nothing is known where nothing was."""
    path = _path(runner, config)
    with suppress(OSError, msgspec.DecodeError, ValueError, ArithmeticError):
        entry = msgspec.json.decode(path.read_bytes(), type=_Entry) if path else None
        if entry and entry.depends == _depends(runner, config):
            return entry.measured.costs()
    return UNKNOWN


def _remember(runner: Runner, config: EngineConfig, measured: Measured) -> None:
    """Keep it for the next start; whole, or not at all."""
    path = _path(runner, config)
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", delete=False) as file:
            file.write(msgspec.json.encode(_Entry(_depends(runner, config), measured)))
        os.replace(file.name, path)
    except OSError as error:
        log.warning("what was measured can't be kept in %s: %s", path.parent, error.strerror or error)


def _path(runner: Runner, config: EngineConfig) -> Path | None:
    if config.warmup.profile_cache == OFF:
        return None
    try:
        folder = Path(config.warmup.profile_cache) if config.warmup.profile_cache else _home()
    except RuntimeError:  # this user has no home
        return None
    key = hashlib.sha256(msgspec.json.encode(_depends(runner, config))).hexdigest()
    return folder / f"{key[:24]}.json"


def _home() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "stepbatch" / "profiles"


def _depends(runner: Runner, config: EngineConfig) -> dict[str, Any]:
    """What the figures depend on, as JSON has it."""
    weights = Path(runner.info.path)
    depends = {
        "model": asdict(config.model),
        "info": msgspec.to_builtins(runner.info),
        "weights": weights.stat().st_mtime if weights.exists() else None,  # of a folder that is written again
        "memory": asdict(config.memory),
        "sizes": config.warmup.warmup_sizes,
        "device": runner.clock.name,
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "cores": os.cpu_count(),
        "seconds": config.warmup.warmup_seconds,
        "stepbatch": __version__,
        "torch": version("torch"),
        "diffusers": version("diffusers"),
    }
    return msgspec.json.decode(msgspec.json.encode(depends), type=dict[str, Any])
