"""``stepbatch bench``: what each of its commands reads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import get_type_hints

from stepbatch.bench.options import (
    DatasetOptions,
    FleetOptions,
    GoalOptions,
    OfflineOptions,
    ReportOptions,
    RequestOptions,
    ServingOptions,
    SimulateOptions,
    SweepOptions,
)
from stepbatch.cli.parser import Parser, build, build_groups, dispatch
from stepbatch.config import EngineConfig
from stepbatch.errors import SetupError

USAGE = """usage: stepbatch bench COMMAND ...

Measure a server with OpenAI's image or video API under load, or the engine without one.

commands:
  serving     one load on one server, or several: throughput, latency, failures
  sweep       one load after another: where the server tips over, and what its flags bring
  compare     results of the same work, side by side
  offline     the engine without HTTP: pictures and steps a second, and its share of what the device can do
  simulate    the engine's scheduler against a predicted clock: loads, policies, widths, many machines"""

SERVING = tuple(get_type_hints(ServingOptions).values())
SWEEP = (*SERVING, SweepOptions)
OFFLINE = (DatasetOptions, RequestOptions, OfflineOptions, ReportOptions)
SIMULATE = (SimulateOptions, FleetOptions, RequestOptions, GoalOptions, ReportOptions)


def bench(arguments: Sequence[str]) -> int:
    """``stepbatch bench``: run the command that ``arguments`` begin with."""
    commands = {"serving": serving, "sweep": sweep, "compare": compare, "offline": offline, "simulate": simulate}
    return dispatch(arguments, commands, USAGE)


def serving_parser() -> Parser:
    """The flags of ``stepbatch bench serving``."""
    return _parser("serving", "[FLAG ...]", "Send a load to a server and tell how it did.", SERVING)


def serving(arguments: Sequence[str]) -> int:
    """``stepbatch bench serving``: 1 if a request failed."""
    options = build_groups(ServingOptions, serving_parser().read(arguments))
    with extra("bench"):
        from stepbatch.bench.serving import run_serving
    return run_serving(options)


def sweep_parser() -> Parser:
    """The flags of ``stepbatch bench sweep``."""
    return _parser("sweep", "[FLAG ...]", "Find where a server tips over.", SWEEP)


def sweep(arguments: Sequence[str]) -> int:
    """``stepbatch bench sweep``: 1 if a request failed other than by being too late or turned away."""
    values = sweep_parser().read(arguments)
    with extra("bench"):
        from stepbatch.bench.sweep.plan import Flags
        from stepbatch.bench.sweep.run import run_sweep
    return run_sweep(build_groups(Flags, values))


def compare_parser() -> Parser:
    """The flags of ``stepbatch bench compare``."""
    parser = _parser("compare", "A.json B.json ... [FLAG ...]", "Lay results of the same work side by side.", ())
    parser.add_argument("results", nargs="*", type=Path, metavar="FILE", help="what bench serving wrote")
    parser.add_flag("--plot", type=Path, metavar="FILE", help="a picture of the comparison, PNG")
    return parser


def compare(arguments: Sequence[str]) -> int:
    """``stepbatch bench compare``."""
    values = compare_parser().read(arguments)
    with extra("bench"):
        from stepbatch.bench.report.compare import run_compare
    return run_compare(values["results"], values["plot"])


def offline_parser() -> Parser:
    """The flags of ``stepbatch bench offline``."""
    groups = (*get_type_hints(EngineConfig).values(), *OFFLINE)
    return _parser("offline", "[FLAG ...]", "Run requests through the engine, without a server.", groups)


def offline(arguments: Sequence[str]) -> int:
    """``stepbatch bench offline``: 1 if a request failed."""
    values = offline_parser().read(arguments)
    engine = build_groups(EngineConfig, values)
    dataset, wanted = build(DatasetOptions, values), build(RequestOptions, values)
    counts, report = build(OfflineOptions, values), build(ReportOptions, values)
    with extra("bench"):
        from stepbatch.bench.offline import run_offline
    return run_offline(engine, dataset, wanted, counts, report)


def simulate_parser() -> Parser:
    """The flags of ``stepbatch bench simulate``."""
    usage = "--curve NAME|FILE [FLAG ...]"
    return _parser("simulate", usage, "Run the engine's scheduler against a predicted clock.", SIMULATE)


def simulate(arguments: Sequence[str]) -> int:
    """``stepbatch bench simulate``."""
    values = simulate_parser().read(arguments)
    with extra("bench"):
        from stepbatch.bench.simulate.plan import Flags
        from stepbatch.bench.simulate.run import run_simulate
    return run_simulate(build_groups(Flags, values))


@contextmanager
def extra(command: str) -> Iterator[None]:
    """Say what is missing where the package was installed without what the benchmarks need."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise SetupError(f"stepbatch {command} needs {error.name}: pip install 'stepbatch[bench]'") from None


def _parser(name: str, usage: str, description: str, groups: Sequence[type]) -> Parser:
    parser = Parser(f"bench {name}", f"stepbatch bench {name} {usage}", description)
    for group in groups:
        parser.add_config(group)
    return parser
