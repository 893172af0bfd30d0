"""Promises, each tried in a short form, and in a long one with ``--soak``, which writes the table in the document."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import TypeVar

import pytest

from . import record
from .serving import Served

FOUND: list[record.Finding] = []  # by this run

T = TypeVar("T")


@pytest.fixture(scope="session")
def soak(request: pytest.FixtureRequest) -> bool:
    """Whether the long forms are asked for."""
    return bool(request.config.getoption("--soak"))


@pytest.fixture(scope="session")
def size(soak: bool) -> Callable[[T, T], T]:
    """How much of something: first in the short form, then in the long one."""
    return lambda short, long: long if soak else short


@pytest.fixture
def note() -> Callable[[record.Finding], None]:
    """Takes down what the test found, with the seconds that the test took; call it last, once all has been asserted."""
    began = time.monotonic()

    def take(finding: record.Finding) -> None:
        seconds = round(time.monotonic() - began, 1)
        FOUND.append(record.Finding(**{**finding.__dict__, "seconds": seconds}))

    return take


@pytest.fixture
def serve() -> Iterator[Callable[..., Served]]:
    """Starts servers in processes of their own, with these flags and environment; they are killed at the end."""
    started: list[Served] = []

    def start(*flags: str, env: dict[str, str] | None = None) -> Served:
        started.append(Served(*flags, env=env))
        return started[-1]

    try:
        yield start
    finally:
        for server in started:
            server.kill()


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if exitstatus == 0 and FOUND and session.config.getoption("--soak"):
        record.save(FOUND)
        record.write_table()
