"""``stepbatch bench simulate``: every load on every kind of machines, and how they went."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stepbatch.bench.environment import environment, now
from stepbatch.bench.results import save
from stepbatch.bench.serving import check_output_file
from stepbatch.bench.simulate.cluster import Fleet, Simulation
from stepbatch.bench.simulate.curves import Curve, read_curve, shipped
from stepbatch.bench.simulate.kinds import capacity, pace
from stepbatch.bench.simulate.plan import Flags, Machines, check_useful, read_loads, settings
from stepbatch.bench.simulate.report import said_of, show
from stepbatch.bench.simulate.results import Outcome, Setting, SimulationResult, summed
from stepbatch.bench.simulate.workload import Workload, read_workload


def run_simulate(flags: Flags) -> int:
    """Simulate every combination, print tables, and keep and draw what came.

    Raises:
        OptionError: a flag says what can't be.
        SetupError: a file can't be read or written.
    """
    if flags.simulate.curve == "list":
        for name in shipped():
            curve = read_curve(name)
            print(f"{name}: {curve.name}\n    {curve.note}")
        return 0
    check_output_file(flags.report)
    result = simulate_all(flags)
    show(result)
    if flags.report.output_file:
        from stepbatch.bench.simulate.picture import draw_simulation  # here, for it takes a second to import

        path = Path(flags.report.output_file)
        save(result, path)
        draw_simulation(result, path.with_suffix(".png"))
        print(f"{path}\n{path.with_suffix('.png')}")
    return 0


def simulate_all(flags: Flags) -> SimulationResult:
    """Every combination's outcome.

    Raises:
        OptionError: a flag says what can't be.
        SetupError: a file can't be read.
    """
    runs, curve = list(settings(flags)), read_curve(flags.simulate.curve)
    check_useful(flags, read_loads(flags.simulate))
    most = max(machines.replicas for machines, _ in runs)
    workload = read_workload(flags.simulate, flags.wanted, flags.goal, curve, flags.fleet.timeout, most)
    result = SimulationResult(
        created=now(),
        environment=environment(("numpy",)),
        options=flags.told(),
        curve=curve.name,
        note=curve.note,
        capacity=capacity(*workload.mixture, curve.costs),
    )
    for machines, setting in runs:
        outcome = simulate(workload, curve, machines, setting, flags)
        result.outcomes.append(outcome)
        if sys.stderr.isatty() and not flags.report.disable_tqdm:
            print(f"stepbatch: {said_of(outcome)}", file=sys.stderr)
    return result


def simulate(workload: Workload, curve: Curve, machines: Machines, setting: Setting, flags: Flags) -> Outcome:
    """One run."""
    began, options = time.monotonic(), flags.simulate
    times = None
    if setting.unit != "concurrency":
        full = capacity(*workload.mixture, curve.costs) * setting.replicas
        rates = {"load": setting.amount * full, "rate": setting.amount}
        times = workload.times(rates.get(setting.unit), options.burstiness, options.seed)
    fleet = Fleet(
        limits=machines.limits,
        pace=pace(*workload.mixture, curve.costs, machines.width),
        replicas=machines.replicas,
        routing=machines.routing,
        max_queue_seconds=flags.fleet.max_queue_seconds,
    )
    places = int(setting.amount) if times is None else 0
    with _undisturbed():
        course = Simulation(workload.kinds, times, curve.costs, fleet, concurrency=places, seed=options.seed).run()
    return summed(course, workload.kinds, setting, time.monotonic() - began)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """No search for circles of garbage, of which there are none, among a million requests."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()
