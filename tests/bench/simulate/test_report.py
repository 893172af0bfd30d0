from __future__ import annotations

import msgspec
import pytest
from rich.console import Console
from tests.bench.simulate.test_results import setting

from stepbatch.bench.simulate.report import against_fcfs, by_load, name, render
from stepbatch.bench.simulate.results import Outcome, Setting


def outcome(of: Setting, mean: float = 2.0, p99: float = 8.0, **fields: object) -> Outcome:
    made = Outcome(
        setting=of,
        rate=1.0,
        requests=100,
        finished=100,
        refused=0,
        dropped=0,
        duration=100.0,
        throughput=1.0,
        mean=mean,
        p50=mean,
        p99=p99,
        attainment=None,
        goodput=None,
        utilisation=0.8,
        width_mean=1.5,
        widths={1: 50, 2: 50},
        steady=True,
    )
    return msgspec.structs.replace(made, **fields)


def text(*outcomes: Outcome) -> str:
    console = Console(width=200)
    with console.capture() as captured:
        console.print(render(outcomes, "made"))
    return captured.get()


def test_policies_are_set_against_first_come_first_served_on_the_same_machines() -> None:
    runs = [
        outcome(setting(), 4.0, 10.0),
        outcome(setting(policy="srpt", ageing=0.1), 3.0, 12.0),
        outcome(setting(policy="srpt", ageing=0.1, width=4), 1.0, 1.0),
    ]
    assert [ratios for _, ratios in against_fcfs(runs)] == [(0.75, 1.2)]
    assert "/ fcfs" in text(*runs) and "0.750" in text(*runs)


def test_machines_are_called_by_what_differs() -> None:
    among = [setting(), setting(policy="srpt", ageing=0.1, width=4), setting(replicas=2)]
    assert [name(each, among) for each in among] == [
        "fcfs, width auto, 1 replica",
        "srpt 0.1, width 4, 1 replica",
        "fcfs, width auto, 2 replicas",
    ]
    assert name(among[0], among[:1]) == ""


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"refused": 7}, "7%"),
        ({"dropped": 9}, "9%"),
        ({"attainment": 0.5, "goodput": 0.51}, "50%"),
        ({"steady": False}, "falls behind"),
    ],
)
def test_what_happened_is_said_and_what_did_not_is_left_out(fields: dict[str, object], said: str) -> None:
    assert said in text(outcome(setting(), **fields)) and said not in text(outcome(setting()))


def test_loads_have_a_table_each() -> None:
    runs = [outcome(setting(amount=amount, policy=policy)) for amount in (0.5, 0.8) for policy in ("fcfs", "deadline")]
    assert [[o.setting.amount for o in group] for group in by_load(runs)] == [[0.5, 0.5], [0.8, 0.8]]
