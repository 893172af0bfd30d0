"""``stepbatch profile``: measures a model, says what it found, and writes it down."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from stepbatch.bench.environment import environment
from stepbatch.bench.profile.picture import draw_profile
from stepbatch.bench.profile.report import render
from stepbatch.bench.profile_file import ProfileFile
from stepbatch.bench.results import check_writable, save
from stepbatch.config import EngineConfig
from stepbatch.engine.backends import load_runner
from stepbatch.engine.engine import Runner
from stepbatch.engine.measured import Measured
from stepbatch.engine.warmup import measure
from stepbatch.errors import SetupError

PACKAGES = ("torch", "diffusers", "transformers")


def run_profile(config: EngineConfig, folder: Path) -> int:
    """Measure a model afresh; print what was found and write it, as ``profile.json`` and ``profile.png``.

    Raises:
        SetupError: the model can't be loaded, none of its sizes can be run, or too few in the time there is, or the
            folder can't be written.
    """
    check_writable(folder / "profile.json")
    console = Console(stderr=True)
    with console.status("loading the model"):
        runner = load_runner(config)
    with console.status("measuring"):
        measured = measure(runner, config)
    if not measured.points:
        raise SetupError("nothing could be measured: the model takes none of these sizes")
    profile = profile_of(runner, measured)
    if not profile.costs.known:
        raise SetupError(
            "too little could be measured to tell what steps cost: give --warmup-seconds more, or --warmup-sizes that "
            "are smaller"
        )
    print(render(profile))
    save(profile, folder / "profile.json")
    draw_profile(profile, folder / "profile.png")
    print(f"\nmeasured in {measured.seconds:.1f} s; {folder / 'profile.json'} and {folder / 'profile.png'} have it")
    return 0


def profile_of(runner: Runner, measured: Measured) -> ProfileFile:
    """What was measured of a model, with what it says of itself."""
    return ProfileFile(
        name=runner.info.id,
        costs=measured.costs(),
        model=runner.info,
        device=runner.clock.name,
        dtype=runner.info.dtype,
        environment=environment(PACKAGES) | {"probe_seconds": round(measured.seconds, 2)},
        points=measured.points,
    )
