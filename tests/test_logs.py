from __future__ import annotations

import io
import json
import logging
import sys
from collections.abc import Callable, Iterator

import pytest

from stepbatch import logs
from stepbatch.config import LogConfig

HOSTILE = 'a\r\n2026-01-01 CRITICAL forged: \x1b[31mred\x1b[0m \x00 \x9b \u2028 \u202e \ud800 "'
Lines = Callable[..., list[str]]


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> Iterator[Lines]:
    """What is written when these are the settings and something is done; the root logger is as it was afterwards."""
    root, level, handlers = logging.getLogger(), logging.getLogger().level, logging.getLogger().handlers[:]
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)

    def written(do: Callable[[logging.Logger], object], **settings: str) -> list[str]:
        stream = io.StringIO()
        with monkeypatch.context() as patch:
            patch.setattr(root, "handlers", [])
            patch.setattr(sys, "stderr", stream)
            logs.set_up(LogConfig(**settings), "server")  # type: ignore[arg-type]
            do(logging.getLogger("stepbatch.x"))
        return stream.getvalue().removesuffix("\n").split("\n")

    yield written
    logging.captureWarnings(False)
    root.setLevel(level)
    root.handlers[:] = handlers
    for name in ("uvicorn.error", "python_multipart"):
        logging.getLogger(name).setLevel(logging.NOTSET)


def fail(message: str) -> None:
    raise ValueError(message)


def test_an_event_is_one_json_object_whatever_is_in_it(lines: Lines) -> None:
    (line,) = lines(lambda log: logs.event(log, HOSTILE, prompt=HOSTILE * 20_000, n=2), log_format="json")
    assert line.isascii()
    assert line.isprintable()
    members = json.loads(line)
    assert members.pop("time").endswith("Z")
    kept = {"level": "INFO", "logger": "stepbatch.x", "process": "server", "message": HOSTILE}
    assert members == {**kept, "prompt": HOSTILE * 20_000, "n": 2}


def test_an_event_is_one_line_of_text_with_escapes_made_visible(lines: Lines) -> None:
    (line,) = lines(lambda log: logs.event(log, HOSTILE, prompt=HOSTILE, path="/v1/{id}", timings={"a": 0.5}))
    assert line.isprintable()
    assert r"INFO stepbatch.x: a\r\n2026-01-01 CRITICAL forged: \x1b[31mred" in line
    assert line.endswith(r' \ud800 \"" path=/v1/{id} timings="{\"a\": 0.5}"')


def test_an_exception_is_a_member_and_in_text_its_lines_are_indented(lines: Lines) -> None:
    def do(log: logging.Logger) -> None:
        try:
            fail(HOSTILE)
        except ValueError:
            log.exception("it failed")

    (line,) = lines(do, log_format="json")
    assert "ValueError: a\r\n2026" in json.loads(line)["exception"]
    first, *traceback = lines(do)
    assert first.endswith("ERROR stepbatch.x: it failed")
    assert all(line.startswith("    ") and line.isprintable() for line in traceback)


def test_what_nobody_caught_is_logged_too(lines: Lines) -> None:
    def do(log: logging.Logger) -> None:
        try:
            fail("oh")
        except ValueError as error:
            sys.excepthook(type(error), error, error.__traceback__)

    (line,) = lines(do, log_format="json")
    assert json.loads(line)["level"] == "CRITICAL"
    assert "ValueError: oh" in json.loads(line)["exception"]


def test_a_line_has_the_id_of_the_request_that_is_worked_on(lines: Lines) -> None:
    token = logs.REQUEST_ID.set("r 1")
    try:
        (line,) = lines(lambda log: log.warning("now"), log_format="json")
        assert json.loads(line)["request_id"] == "r 1"
        assert lines(lambda log: log.warning("now"))[0].endswith('WARNING stepbatch.x: now request_id="r 1"')
    finally:
        logs.REQUEST_ID.reset(token)


def test_levels(lines: Lines, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("uvicorn", "uvicorn.error"):  # as they are where no other server has set up the log
        monkeypatch.setattr(logging.getLogger(name), "propagate", True)
        monkeypatch.setattr(logging.getLogger(name), "handlers", [])

    def do(log: logging.Logger) -> None:
        log.debug("a")
        log.info("b")
        logging.getLogger("uvicorn.error").warning("c")

    assert lines(do, log_level="warning") == [""]
    assert len(lines(do, log_level="info")) == 1
    assert len(lines(do, log_level="debug")) == 3
