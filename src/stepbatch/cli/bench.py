"""``stepbatch bench``: what each of its commands reads."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stepbatch.bench.options import (
    DatasetOptions,
    GoalOptions,
    LoadOptions,
    OfflineOptions,
    ReportOptions,
    RequestOptions,
    SweepOptions,
    TargetOptions,
)
from stepbatch.cli.parser import Parser, build, suggestion
from stepbatch.config import BatchingConfig, DefaultsConfig, EngineConfig, MemoryConfig, ModelConfig
from stepbatch.errors import OptionError, SetupError

USAGE = """usage: stepbatch bench COMMAND ...

Measure a server with OpenAI's image or video API under load, or the engine without one.

commands:
  serving     one load on one server, or several: throughput, latency, failures
  sweep       one load after another: where the server tips over, and what its flags bring
  compare     results of the same work, side by side
  offline     the engine without HTTP: pictures and steps a second, and its share of what the device can do"""

SERVING = (TargetOptions, DatasetOptions, RequestOptions, LoadOptions, GoalOptions, ReportOptions)


def bench(arguments: Sequence[str]) -> int:
    """``stepbatch bench``: run the command that ``arguments`` begin with."""
    commands: dict[str, Callable[[Sequence[str]], int]] = {
        "serving": serving,
        "sweep": sweep,
        "compare": compare,
        "offline": offline,
    }
    first = arguments[0] if arguments else "--help"
    if first in ("--help", "-h"):
        print(USAGE, file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else 2
    if first not in commands:
        raise OptionError(f"stepbatch bench has no command {first}{suggestion(first, list(commands))}")
    return commands[first](arguments[1:])


def serving_parser() -> Parser:
    """The flags of ``stepbatch bench serving``."""
    return _parser("serving", "[FLAG ...]", "Send a load to a server and tell how it did.", SERVING)


def serving(arguments: Sequence[str]) -> int:
    """``stepbatch bench serving``: 1 if a request failed."""
    groups = _groups(serving_parser().read(arguments), SERVING)
    with _extra():
        from stepbatch.bench.serving import run_serving
    return run_serving(*groups)


def sweep_parser() -> Parser:
    """The flags of ``stepbatch bench sweep``."""
    return _parser("sweep", "[FLAG ...]", "Find where a server tips over.", (*SERVING, SweepOptions))


def sweep(arguments: Sequence[str]) -> int:
    """``stepbatch bench sweep``: 1 if a request failed other than by being too late or turned away."""
    groups = _groups(sweep_parser().read(arguments), (*SERVING, SweepOptions))
    with _extra():
        from stepbatch.bench.sweep.run import run_sweep
    return run_sweep(*groups)


def compare_parser() -> Parser:
    """The flags of ``stepbatch bench compare``."""
    parser = _parser("compare", "A.json B.json ... [FLAG ...]", "Lay results of the same work side by side.", ())
    parser.add_argument("results", nargs="*", type=Path, metavar="FILE", help="what bench serving wrote")
    parser.add_flag("--plot", type=Path, metavar="FILE", help="a picture of the comparison, PNG")
    return parser


def compare(arguments: Sequence[str]) -> int:
    """``stepbatch bench compare``."""
    values = compare_parser().read(arguments)
    with _extra():
        from stepbatch.bench.report.compare import run_compare
    return run_compare(values["results"], values["plot"])


OFFLINE = (
    ModelConfig,
    BatchingConfig,
    MemoryConfig,
    DefaultsConfig,
    DatasetOptions,
    RequestOptions,
    OfflineOptions,
    ReportOptions,
)


def offline_parser() -> Parser:
    """The flags of ``stepbatch bench offline``."""
    return _parser("offline", "[FLAG ...]", "Run requests through the engine, without a server.", OFFLINE)


def offline(arguments: Sequence[str]) -> int:
    """``stepbatch bench offline``: 1 if a request failed."""
    model, batching, memory, defaults, *groups = _groups(offline_parser().read(arguments), OFFLINE)
    engine = EngineConfig(model=model, batching=batching, memory=memory, defaults=defaults)
    with _extra():
        from stepbatch.bench.offline import run_offline
    return run_offline(engine, *groups)


@contextmanager
def _extra() -> Iterator[None]:
    """Say what is missing where the package was installed without what the benchmarks need."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise SetupError(f"stepbatch bench needs {error.name}: pip install 'stepbatch[bench]'") from None


def _parser(name: str, usage: str, description: str, groups: Sequence[type]) -> Parser:
    parser = Parser(f"bench {name}", f"stepbatch bench {name} {usage}", description)
    for group in groups:
        parser.add_config(group)
    return parser


def _groups(values: dict[str, Any], groups: Sequence[type]) -> list[Any]:
    return [build(group, values) for group in groups]
