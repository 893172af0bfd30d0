"""The requests of a simulation, and when they come: of the same flags as those of ``bench serving``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice
from typing import Any

import msgspec

from stepbatch.bench.options import DatasetOptions, GoalOptions, LoadOptions, RequestOptions, SimulateOptions
from stepbatch.bench.simulate.curves import Curve
from stepbatch.bench.simulate.kinds import Kind, make_kind
from stepbatch.bench.workload.arrivals import schedule
from stepbatch.bench.workload.goals import goals, kind
from stepbatch.bench.workload.profiles import Profile, draw, read_profiles
from stepbatch.bench.workload.work import FLAGS, WorkItem, build
from stepbatch.errors import InvalidValue, OptionError
from stepbatch.request import MODEL_FIELDS, GenerationRequest

REQUESTS = 20_000  # where nothing is said
PER_REPLICA = 100  # likewise, at least
EXTRA = ("priority", "timeout", "user", *MODEL_FIELDS)  # fields that may be laid over a request


@dataclass(frozen=True, eq=False)
class Workload:
    """Requests in the order in which they come."""

    items: Sequence[WorkItem]
    kinds: Sequence[Kind]  # of each

    @property
    def mixture(self) -> tuple[list[Kind], list[float]]:
        """The different kinds, and how many there are of each."""
        counts: dict[int, float] = {}
        found: dict[int, Kind] = {}
        for one in self.kinds:
            found[id(one)] = one
            counts[id(one)] = counts.get(id(one), 0.0) + 1
        return list(found.values()), list(counts.values())

    def times(self, rate: float | None, burstiness: float, seed: int) -> list[float] | None:
        """When each comes, at a rate (requests a second) or, without, as a trace says, if it does."""
        load = (
            LoadOptions(burstiness=burstiness)
            if rate is None
            else LoadOptions(request_rate=rate, burstiness=burstiness)
        )
        return schedule(self.items, load, seed)


def read_workload(
    options: SimulateOptions, wanted: RequestOptions, goal: GoalOptions, curve: Curve, timeout: float | None, most: int
) -> Workload:
    """The requests that the flags ask for.

    Args:
        options: How many, and whether a trace says which.
        wanted: What each asks for.
        goal: What latency is asked of each; relative to what it takes by itself.
        curve: Says what a request gets where it says nothing.
        timeout: Of each, seconds.
        most: Replicas.

    Raises:
        OptionError: a flag, a file or a line of it says what can't be, or what is not simulated.
    """
    if wanted.task.startswith("image") or wanted.extra_body:
        raise OptionError("bench simulate knows requests of prompts alone: no --task with images, no --extra-body")
    profiles = read_profiles(wanted.random_request_config)
    count = options.num_requests or max(REQUESTS, PER_REPLICA * most)
    task = "text-to-video" if curve.model.makes_videos else wanted.task
    plain = replace(wanted, random_request_config="", task=task)
    if options.trace:
        dataset = DatasetOptions(dataset="trace", dataset_path=options.trace, num_prompts=options.num_requests)
        base = build(dataset, plain)
        count = len(base)
    else:
        base = build(DatasetOptions(dataset="random", num_prompts=1), plain)
    drawn: Sequence[Profile | None] = draw(profiles, count, options.seed) if profiles else [None] * count
    known: dict[tuple[int, int], tuple[WorkItem, Kind]] = {}
    chosen = []
    for item, profile in zip(islice(cycle(base), count), drawn, strict=True):
        key = id(item), id(profile)
        if key not in known:
            whole = _laid_over(item, profile)
            known[key] = whole, _kind(whole, curve, goal, timeout)
        chosen.append(known[key])
    return Workload([item for item, _ in chosen], _alike([one for _, one in chosen]))


def _laid_over(item: WorkItem, profile: Profile | None) -> WorkItem:
    fields: dict[str, Any] = dict(profile.fields) if profile else {}
    if "images" in fields or item.images or str(fields.get("task")).startswith("image"):
        raise OptionError("bench simulate knows requests of prompts alone, and there is one with images")
    fields["extra"] = {**item.extra, **fields.get("extra", {})}
    whole = msgspec.structs.replace(item, **fields)
    if unknown := set(whole.extra) - set(EXTRA):
        raise OptionError(f"bench simulate doesn't know what {', '.join(sorted(unknown))} does to a request")
    return whole


def _kind(item: WorkItem, curve: Curve, goal: GoalOptions, timeout: float | None) -> Kind:
    if item.is_video != curve.model.makes_videos:
        makes = "videos" if curve.model.makes_videos else "pictures"
        raise OptionError(f"a request's task is {item.task}, but {curve.name}, the model of --curve, makes {makes}")
    fields = {name: getattr(item, name) for name in ("prompt", "n", *FLAGS)}
    try:
        made = make_kind(GenerationRequest(**{**fields, "seed": 0, "timeout": timeout, **item.extra}), curve)
    except InvalidValue as error:
        raise OptionError(error.message) from None
    asked = goals([item], goal, {kind(item): made.alone(curve.costs)})[0]
    return replace(made, goal=asked)


def _alike(kinds: Sequence[Kind]) -> list[Kind]:
    """One object for all that are equal: a trace's lines may ask for the same."""
    first: dict[tuple[object, ...], Kind] = {}
    shared: dict[int, Kind] = {}
    for one in kinds:
        if id(one) not in shared:
            r = one.request
            name = r.size, r.frames, r.steps, r.n, r.priority, r.timeout, r.user, one.lengths, one.goal
            shared[id(one)] = first.setdefault(name, one)
    return [shared[id(one)] for one in kinds]
