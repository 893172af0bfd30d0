"""What a sweep's flags come to: which loads are measured, on which servers, and how long each time."""

from __future__ import annotations

import itertools
import math
import re
import shlex
from dataclasses import dataclass
from typing import Any

from stepbatch.bench.options import ServingOptions, SweepOptions
from stepbatch.bench.sweep.tipping import Unit
from stepbatch.errors import OptionError

SECONDS_BY_RATE = 30.0  # of a run, where nothing is said
REQUESTS_PER_SLOT = 4  # likewise, by concurrency
LEAST_BY_RATE = LEAST_BY_CONCURRENCY = 16  # requests of a run, whatever its duration

_SECRET_FLAG = re.compile(r"(key|token|secret|password)$", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Flags(ServingOptions):
    """All that the command line says."""

    sweep: SweepOptions

    def told(self) -> dict[str, Any]:
        """Every flag by name; of secrets, those in the server's command too, only whether there was any."""
        command = shlex.join(_without_secrets(shlex.split(self.sweep.server_command)))
        return super().told() | {"server_command": command}


@dataclass(frozen=True)
class Axis:
    """A kind of load, and which ones are measured."""

    unit: Unit
    loads: tuple[float, ...]  # empty: they are searched for


@dataclass(frozen=True)
class Variant:
    """What a server's command ends with."""

    name: str = ""
    flags: tuple[str, ...] = ()


def read_axes(flags: Flags) -> list[Axis]:
    """The loads; without any flag for them, the rate at which the server tips over is searched for.

    Raises:
        OptionError: a load is none, or is given by two flags.
    """
    sweep, load, dataset = flags.sweep, flags.load, flags.dataset
    if sweep.duration and dataset.num_prompts:
        raise OptionError("--duration and --num-prompts both say how many requests a run has; give one of them")
    rates = sweep.request_rates or ("" if sweep.concurrencies else "auto")
    axes = []
    if sweep.concurrencies:
        if load.max_concurrency:
            raise OptionError("--max-concurrency and --concurrencies both bound what is in flight; give one of them")
        axes.append(Axis("concurrency", _loads("--concurrencies", sweep.concurrencies, whole=True)))
    if rates:
        if math.isfinite(load.request_rate):
            raise OptionError("bench sweep takes --request-rates, not --request-rate")
        axes.append(Axis("rate", _loads("--request-rates", rates, whole=False)))
    return axes


def _loads(flag: str, text: str, whole: bool) -> tuple[float, ...]:
    if text.strip() == "auto":
        return ()
    kind = "a whole number" if whole else "a number"
    loads = []
    for word in text.split(","):
        try:
            load = float(int(word)) if whole else float(word)
        except ValueError:
            raise OptionError(f"{flag} must be auto or like 1,2,4,8; {word.strip()!r} is not {kind}") from None
        if not (math.isfinite(load) and load > 0):
            raise OptionError(f"{flag} must be over 0, not {word.strip()}")
        loads.append(load)
    return tuple(dict.fromkeys(loads))


def read_variants(sweep: SweepOptions) -> list[Variant]:
    """Every combination of the values of ``--server-flag``; one without any where there is none.

    Raises:
        OptionError: it isn't NAME=VALUE,..., or there is no server to start.
    """
    if not sweep.server_command:
        for flag, given in (("--server-flag", sweep.server_flag), ("--servers", sweep.servers > 1)):
            if given:
                raise OptionError(f"{flag} is for servers that are started here; give --server-command too")
    choices: dict[str, list[str]] = {}
    for text in sweep.server_flag:
        name, equals, values = text.partition("=")
        name = name.strip().lstrip("-")
        if not (name and equals and values):
            raise OptionError(f"--server-flag must be NAME=VALUE,VALUE,..., not {text!r}")
        choices.setdefault(name, []).extend(values.split(","))
    variants = []
    for values_ in itertools.product(*choices.values()):
        pairs = list(zip(choices, values_, strict=True))
        flags = (word for name, value in pairs for word in (f"--{name}", value))
        variants.append(Variant(", ".join(f"{name}={value}" for name, value in pairs), tuple(flags)))
    return variants


def read_command(flags: Flags) -> list[str]:
    """The words of ``--server-command``.

    Raises:
        OptionError: its quotes don't match, or there are other numbers of servers and of their addresses.
    """
    try:
        command = shlex.split(flags.sweep.server_command)
    except ValueError as error:
        raise OptionError(f"--server-command can't be read: {str(error).lower()}") from error
    addresses = len(flags.target.base_url)
    if command and addresses not in (0, flags.sweep.servers):
        raise OptionError(f"--servers is {flags.sweep.servers}, but --base-url is given {addresses} times")
    return command


def requests_of(flags: Flags, unit: Unit, load: float, throughput: float) -> int:
    """How many requests a run at this load has.

    Args:
        flags: ``--num-prompts``, or else the ``--duration`` that it should last.
        unit: Of the load.
        load: Requests a second, or requests in flight.
        throughput: Requests a second that were done at the load before; 0 if that is unknown.
    """
    if flags.dataset.num_prompts:
        return flags.dataset.num_prompts
    if unit == "rate":
        return max(LEAST_BY_RATE, round(load * (flags.sweep.duration or SECONDS_BY_RATE)))
    return max(LEAST_BY_CONCURRENCY, round(REQUESTS_PER_SLOT * load), round(throughput * flags.sweep.duration))


def _without_secrets(command: list[str]) -> list[str]:
    words = []
    hide = False
    for word in command:
        name, equals, _ = word.partition("=")
        secret = bool(_SECRET_FLAG.search(name))
        words.append("..." if hide else f"{name}=..." if secret and equals else word)
        hide = secret and not equals and word.startswith("-")
    return words
