"""What a simulated machine's work costs: a profile that was measured here, or an example from published figures."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import msgspec

from stepbatch.bench.profile_file import ProfileFile, StepPoint
from stepbatch.engine.cost import Costs
from stepbatch.errors import OptionError, SetupError
from stepbatch.model_info import Sizing

PROMPT, LONGEST = "a lighthouse on a cliff above the sea at dusk, seen from a boat", 512  # characters, tokens
FOLDER = files("stepbatch.bench.simulate") / "curves"


class Curve(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Costs, and how many tokens a picture has."""

    name: str
    costs: Costs
    note: str = ""  # where the figures come from
    sizing: Sizing = Sizing()
    guided: bool = False  # whether a request that says nothing takes two sequences
    guidance_off: float = 0.0  # up to this strength a request takes one
    width: int = 1024  # of a request that says nothing, pixels
    height: int = 1024
    steps: int = 50  # likewise
    measured: dict[str, int] = {}  # WIDTHxHEIGHT -> tokens of a sequence, where that is known

    def lengths(self, width: int, height: int, frames: int, guidance: float | None) -> tuple[int, ...]:
        """The tokens of each of a job's sequences."""
        guided = self.guided if guidance is None else guidance > self.guidance_off
        length = self.measured.get(f"{width}x{height}") if frames == 1 else None
        if length is None:
            length = self.sizing.picture(width, height, frames) + self.sizing.text(PROMPT, LONGEST)
        return (length,) * (2 if guided else 1)


def shipped() -> list[str]:
    """The names of the examples."""
    return sorted(entry.name.removesuffix(".json") for entry in FOLDER.iterdir() if entry.name.endswith(".json"))


def read_curve(name: str) -> Curve:
    """An example by its name, or a file: such an example's, or what ``stepbatch profile`` wrote.

    Raises:
        OptionError: there is no such example or file.
        SetupError: it can't be read, or is neither; or it knows no cost.
    """
    if name in shipped():
        data, where = (FOLDER / f"{name}.json").read_bytes(), name
    elif name and Path(name).is_file():
        data, where = Path(name).read_bytes(), name
    else:
        known = ", ".join(shipped())
        raise OptionError(f"--curve must be a profile's file or one of {known}; {name or 'nothing'!r} is neither")
    curve = _decode(data, where)
    if not curve.costs.known or not curve.costs.step.seconds(1, 1) > 0:
        raise SetupError(f"{where} doesn't say what a step costs")
    return curve


def _decode(data: bytes, where: str) -> Curve:
    try:
        if "points" in msgspec.json.decode(data, type=dict[str, msgspec.Raw]):
            return of_profile(msgspec.json.decode(data, type=ProfileFile))
        return msgspec.json.decode(data, type=Curve)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise SetupError(f"{where} is no profile: {error}") from error


def of_profile(profile: ProfileFile) -> Curve:
    """A profile's costs, with what its points tell of tokens.

    A token's side is the least power of two for which no point has fewer tokens than its picture would.

    Raises:
        SetupError: it has no points.
    """
    if not profile.points:
        raise SetupError(f"the profile of {profile.name} has no points")
    first, known = profile.points[0], {(p.width, p.height): _length(p) for p in profile.points}
    side = next(
        side
        for side in (2**power for power in range(16))
        if all((width // side) * (height // side) <= length for (width, height), length in known.items())
    )
    text = [length - (width // side) * (height // side) for (width, height), length in known.items()]
    return Curve(
        name=profile.name,
        costs=profile.costs,
        note=f"measured on {profile.device}, {profile.dtype}",
        sizing=Sizing(token=side, prompt=sorted(text)[len(text) // 2]),
        guided=_sequences(first) > 1,
        width=first.width,
        height=first.height,
        measured={f"{width}x{height}": length for (width, height), length in known.items()},
    )


def _sequences(point: StepPoint) -> int:
    """How many a job has, all of them equally long."""
    return max(1, round(point.tokens**2 / point.squares / point.jobs))


def _length(point: StepPoint) -> int:
    return round(point.tokens / point.jobs / _sequences(point))
