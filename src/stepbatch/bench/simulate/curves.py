"""What a simulated machine's work costs: a profile that was measured here, or an example from published figures."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import msgspec

from stepbatch.bench.profile_file import ProfileFile
from stepbatch.engine.cost import Costs
from stepbatch.errors import OptionError, SetupError
from stepbatch.model_info import ModelInfo

FOLDER = files("stepbatch.bench.simulate") / "curves"


class Curve(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Costs, and the model that they are of: what requests get where they say nothing, and how many tokens that is."""

    name: str
    costs: Costs
    model: ModelInfo
    note: str = ""  # where the figures come from


def shipped() -> list[str]:
    """The names of the examples."""
    return sorted(entry.name.removesuffix(".json") for entry in FOLDER.iterdir() if entry.name.endswith(".json"))


def read_curve(name: str) -> Curve:
    """An example by its name, or a file: such an example's, or what ``stepbatch profile`` wrote.

    Raises:
        OptionError: there is no such example or file, or it is of what isn't simulated.
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
    if curve.model.sizing.whole_calls:
        raise OptionError(
            f"--curve: {where} is of {curve.name}, which runs in whole pipeline calls; bench simulate knows steps that "
            "any requests share"
        )
    if not curve.costs.known or not curve.costs.step.seconds(1, 1) > 0:
        raise SetupError(f"{where} doesn't say what a step costs")
    return curve


def _decode(data: bytes, where: str) -> Curve:
    try:
        fields = msgspec.json.decode(data, type=dict[str, msgspec.Raw])
        if "points" not in fields:
            return msgspec.json.decode(data, type=Curve)
        if "model" not in fields:
            raise SetupError(
                f"--curve: {where} is of an earlier version, and doesn't say how many tokens the model's sequences "
                "have; stepbatch profile writes it anew"
            )
        return of_profile(msgspec.json.decode(data, type=ProfileFile))
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise SetupError(f"{where} is no profile: {error}") from error


def of_profile(profile: ProfileFile) -> Curve:
    """A profile's costs and model."""
    note = f"measured on {profile.device}, {profile.dtype}"
    return Curve(name=profile.name, costs=profile.costs, model=profile.model, note=note)
