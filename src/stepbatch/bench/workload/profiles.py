"""``--random-request-config``: what requests ask for, drawn by weight."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import msgspec

from stepbatch.bench.workload.entries import parse
from stepbatch.bench.workload.files import parse_json, read_text
from stepbatch.errors import OptionError

FLAG = "--random-request-config"


class Profile(msgspec.Struct, frozen=True):
    """What some of the requests ask for: fields of an ``Entry``, with ``images`` as text."""

    weight: float  # how many, in proportion to the others' weights
    fields: dict[str, Any]


def read_profiles(config: str) -> list[Profile]:
    """The profiles that a flag's value says: JSON, or ``@`` and the name of a file with it.

    Raises:
        OptionError: it is no list of objects, or one of them says what can't be; the message names the profile.
    """
    if not config:
        return []
    if config.startswith("@"):
        path = Path(config[1:])
        return _profiles(parse_json(read_text(path, FLAG), str(path), is_file=True), f"{FLAG}: {path}")
    return _profiles(parse_json(config, FLAG, is_file=False), FLAG)


def draw(profiles: list[Profile], count: int, seed: int) -> list[Profile]:
    """One profile for each of ``count`` requests."""
    return random.Random(seed).choices(profiles, [profile.weight for profile in profiles], k=count)


def _profiles(value: Any, source: str) -> list[Profile]:
    if not isinstance(value, list) or not value:
        raise OptionError(f"{source}: it must be a JSON list of objects, like " + '[{"weight": 2, "size": "512x512"}]')
    return [_profile(item, f"{source}: profile {number}") for number, item in enumerate(value, start=1)]


def _profile(value: Any, where: str) -> Profile:
    if not isinstance(value, dict):
        raise OptionError(f"{where} must be a JSON object, not {value!r:.80}")
    weight = value.pop("weight", 1)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight <= 1e9:
        raise OptionError(f"{where}: weight must be a number of more than 0 and at most 1e9, not {weight!r:.80}")
    fields = parse(value, where)
    if "timestamp" in fields:
        raise OptionError(f"{where}: a timestamp is a trace's, not a profile's")
    return Profile(weight, fields)
