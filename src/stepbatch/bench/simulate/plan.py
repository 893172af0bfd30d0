"""What a simulation's flags come to: which loads, on which machines."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import product
from typing import Any, TypeVar

from stepbatch.bench.options import (
    FleetOptions,
    GoalOptions,
    ReportOptions,
    RequestOptions,
    SimulateOptions,
    told,
)
from stepbatch.bench.simulate.results import LoadUnit, Setting
from stepbatch.bench.simulate.routing import ROUTERS
from stepbatch.config import BatchingConfig
from stepbatch.engine.policies import POLICIES
from stepbatch.errors import OptionError

MOST_REPLICAS = 10_000
UNBOUNDED = 2**62  # tokens: a width that is given is the width, whatever pays

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Flags:
    """All that the command line says."""

    simulate: SimulateOptions
    fleet: FleetOptions
    wanted: RequestOptions
    goal: GoalOptions
    report: ReportOptions

    def told(self) -> dict[str, Any]:
        """Every flag by name."""
        return told(*vars(self).values())


@dataclass(frozen=True)
class Machines:
    """What is varied but for the load."""

    policy: str
    ageing: float | None
    width: int | None
    replicas: int
    routing: str

    @property
    def limits(self) -> BatchingConfig:
        ageing = {} if self.ageing is None else {"ageing": self.ageing}
        bound = {} if self.width is None else {"dynamic_batch_max_size": self.width, "max_batch_tokens": UNBOUNDED}
        return BatchingConfig(scheduling_policy=self.policy, **ageing, **bound)  # type: ignore[arg-type]

    def at(self, unit: LoadUnit, amount: float) -> Setting:
        """These machines under a load."""
        return Setting(unit=unit, amount=amount, **{f.name: getattr(self, f.name) for f in fields(self)})


def read_loads(options: SimulateOptions) -> list[tuple[LoadUnit, float]]:
    """The loads that the flags ask for.

    Raises:
        OptionError: there is none, or one of them is no number.
    """
    asked: tuple[tuple[LoadUnit, str, str], ...] = (
        ("load", "--loads", options.loads),
        ("rate", "--request-rates", options.request_rates),
        ("concurrency", "--concurrencies", options.concurrencies),
    )
    found = [(unit, load) for unit, flag, text in asked for load in _numbers(flag, text) if text]
    if found and not all(math.isfinite(load) and load > 0 for _, load in found):
        raise OptionError("--loads, --request-rates and --concurrencies must be over 0")
    if any(unit == "concurrency" and load != int(load) for unit, load in found):
        raise OptionError(f"--concurrencies must be whole numbers, not {options.concurrencies}")
    if not found and options.trace:
        return [("trace", 1.0)]
    return found or [("load", 0.8)]


def read_machines(options: FleetOptions) -> list[Machines]:
    """Every combination that the flags ask for.

    Raises:
        OptionError: one of them says what can't be.
    """
    policies = _choices("--policies", options.policies, POLICIES)
    routings = _choices("--routings", options.routings, ROUTERS)
    widths = _list("--widths", options.widths, lambda word: None if word == "auto" else int(word))
    replicas = _list("--replicas", options.replicas, int)
    ageings = _numbers("--ageings", options.ageings) or [BatchingConfig().ageing]
    if any(not 1 <= count <= MOST_REPLICAS for count in replicas):
        raise OptionError(f"--replicas must be from 1 to {MOST_REPLICAS}, not {options.replicas}")
    if options.ageings and "srpt" not in policies:
        raise OptionError("--ageings is for srpt, which is none of --policies")
    ordered = [(policy, ageing) for policy in policies for ageing in (ageings if policy == "srpt" else [None])]
    machines = [
        Machines(policy, ageing, width, count, routing)
        for routing, count, width, (policy, ageing) in product(routings, replicas, widths, ordered)
    ]
    for each in machines:
        _ = each.limits  # raises for what is out of range
    return machines


def settings(flags: Flags) -> Iterator[tuple[Machines, Setting]]:
    """Every run: of each load, all machines.

    Raises:
        OptionError: a flag says what can't be.
    """
    for unit, amount in read_loads(flags.simulate):
        for machines in read_machines(flags.fleet):
            yield machines, machines.at(unit, amount)


def _choices(flag: str, text: str, known: dict[str, Any]) -> list[str]:
    def choose(word: str) -> str:
        if word not in known:
            raise ValueError(word)
        return word

    return _list(flag, text, choose, f"of {', '.join(known)}")


def _numbers(flag: str, text: str) -> list[float]:
    return _list(flag, text, float) if text else []


def _list(flag: str, text: str, read: Callable[[str], T], like: str = "like 1,2,4") -> list[T]:
    found: list[T] = []
    for word in text.split(","):
        try:
            value = read(word.strip())
        except ValueError:
            raise OptionError(f"{flag} must be {like}; {word.strip()!r} is not") from None
        if value not in found:
            found.append(value)
    return found


def check_useful(flags: Flags, loads: Sequence[tuple[LoadUnit, float]]) -> None:
    """Refuse flags that would have no effect.

    Raises:
        OptionError: there is one.
    """
    if flags.report.save_outputs:
        raise OptionError("--save-outputs has no use: nothing is made in a simulation")
    if math.isfinite(flags.fleet.max_queue_seconds) and any(unit == "concurrency" for unit, _ in loads):
        raise OptionError("--max-queue-seconds goes with requests that come by themselves, not with --concurrencies")
