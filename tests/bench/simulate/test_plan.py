from __future__ import annotations

import math

import pytest

from stepbatch.bench.options import FleetOptions, GoalOptions, ReportOptions, RequestOptions, SimulateOptions
from stepbatch.bench.simulate.plan import Flags, check_useful, read_loads, read_machines
from stepbatch.config import BatchingConfig
from stepbatch.errors import OptionError


def test_every_combination_is_made_and_ageing_is_srpts() -> None:
    machines = read_machines(FleetOptions(policies="fcfs,srpt", ageings="0,0.5", widths="auto,4", replicas="1,2"))
    assert len(machines) == 2 * 2 * 3
    assert {(m.policy, m.ageing) for m in machines} == {("fcfs", None), ("srpt", 0.0), ("srpt", 0.5)}


def test_a_width_that_is_given_is_the_width_whatever_pays() -> None:
    auto, fixed = read_machines(FleetOptions(widths="auto,4"))
    assert auto.limits == BatchingConfig(scheduling_policy="fcfs")
    assert fixed.limits.dynamic_batch_max_size == 4
    assert fixed.limits.max_batch_tokens is not None and fixed.limits.max_batch_tokens > 10**12


def test_loads_come_in_three_units() -> None:
    options = SimulateOptions(loads="0.5, 0.8", request_rates="3", concurrencies="4")
    assert read_loads(options) == [("load", 0.5), ("load", 0.8), ("rate", 3.0), ("concurrency", 4.0)]
    assert read_loads(SimulateOptions()) == [("load", 0.8)]
    assert read_loads(SimulateOptions(trace="x.jsonl")) == [("trace", 1.0)]


@pytest.mark.parametrize(
    ("fleet", "message"),
    [
        ({"policies": "fcfs,sjf"}, r"--policies must be of boost, fcfs, srpt, deadline; 'sjf' is not"),
        ({"routings": "random"}, r"--routings must be of round-robin, least-work, two-choices; 'random' is not"),
        ({"widths": "wide"}, r"--widths must be like 1,2,4; 'wide' is not"),
        ({"widths": "0"}, r"--dynamic-batch-max-size must be from 1"),
        ({"replicas": "10001"}, r"--replicas must be from 1 to 10000, not 10001"),
        ({"ageings": "0.1"}, r"--ageings is for srpt"),
        ({"ageings": "-1", "policies": "srpt"}, r"--ageing must be at least 0, not -1"),
    ],
)
def test_machines_that_cannot_be_are_refused(fleet: dict[str, str], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        read_machines(FleetOptions(**fleet))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("simulate", "message"),
    [
        ({"loads": "0"}, "must be over 0"),
        ({"request_rates": "nan"}, "must be over 0"),
        ({"concurrencies": "1.5"}, "--concurrencies must be whole numbers"),
        ({"loads": "much"}, "--loads must be like 1,2,4; 'much' is not"),
    ],
)
def test_loads_that_cannot_be_are_refused(simulate: dict[str, str], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        read_loads(SimulateOptions(**simulate))  # type: ignore[arg-type]


def test_flags_without_effect_are_refused() -> None:
    def flags(report: ReportOptions, fleet: FleetOptions) -> Flags:
        simulate = SimulateOptions(concurrencies="4")
        return Flags(simulate=simulate, fleet=fleet, wanted=RequestOptions(), goal=GoalOptions(), report=report)

    with pytest.raises(OptionError, match="--save-outputs has no use"):
        check_useful(flags(ReportOptions(save_outputs="x"), FleetOptions()), [("load", 0.8)])
    bounded = flags(ReportOptions(), FleetOptions(max_queue_seconds=3.0))
    with pytest.raises(OptionError, match="--max-queue-seconds goes with"):
        check_useful(bounded, [("concurrency", 4.0)])
    check_useful(bounded, [("load", 0.8)])
    assert bounded.told()["max_queue_seconds"] == 3.0 and math.isinf(FleetOptions().max_queue_seconds)
