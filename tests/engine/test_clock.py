import time

import pytest
import torch

from stepbatch.engine.clock import DeviceClock, between, cpu_name

CPU = torch.device("cpu")


def test_a_clock_tells_the_time_between_its_marks() -> None:
    clock = DeviceClock(CPU)
    marks = []
    for pause in (0.0, 0.02, 0.05):
        time.sleep(pause)
        marks.append(clock.mark())
    first, second = clock.seconds(marks)
    assert first >= 0.02 and second >= 0.05
    assert clock.seconds(marks[:1]) == []


def test_a_clock_times_each_call() -> None:
    pauses = iter((0.03, 0.0))
    first, second = DeviceClock(CPU).time(lambda: time.sleep(next(pauses)), 2)
    assert first >= 0.03 > second


def test_on_the_host_a_moment_has_passed_when_it_is_marked() -> None:
    clock = DeviceClock()
    before = clock.mark()
    assert clock.passed(before)
    assert between(before, clock.mark()) >= 0


def test_a_clock_of_the_hosts_times_has_the_name_of_what_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"card {device.index}")
    clock = DeviceClock(torch.device("cuda", 1), waits=True)
    assert clock.name == "card 1"
    assert not clock.runs_behind and isinstance(clock.mark(), float)
    assert DeviceClock(CPU, waits=True).name == DeviceClock().name == cpu_name()
