"""The log, on stderr: an event is a line, as text or JSON, whatever strangers have put into it. Imports no torch."""

from __future__ import annotations

import json
import logging
import re
import sys
import time
from contextvars import ContextVar
from types import TracebackType
from typing import Any

from stepbatch.config import LogConfig

REQUEST_ID: ContextVar[str | None] = ContextVar("request_id", default=None)  # of the request that is worked on here

_PLAIN = re.compile(r"[\w./{}:+-]+", re.ASCII)
_LEVELS_ABOVE = {  # what says nothing new, or warns of what callers are told anyway
    "uvicorn.error": logging.ERROR,
    "python_multipart": logging.ERROR,
}


def set_up(config: LogConfig, process: str) -> None:
    """Have everything that this process logs written as ``config`` says, uncaught exceptions and warnings included.

    Args:
        process: What the process is called in JSON.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter(process) if config.log_format == "json" else TextFormatter())
    logging.basicConfig(level=config.log_level.upper(), handlers=[handler])
    logging.captureWarnings(True)
    sys.excepthook = _uncaught
    for name, level in _LEVELS_ABOVE.items():
        logging.getLogger(name).setLevel(logging.NOTSET if config.log_level == "debug" else level)


def event(log: logging.Logger, message: str, **fields: Any) -> None:
    """Log a message with fields: members of their own in JSON, ``name=value`` after the message in text."""
    log.info(message, extra={"fields": fields})


class JsonFormatter(logging.Formatter):
    """One JSON object, in ASCII; the traceback of an exception is a member."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self.process = process

    def format(self, record: logging.LogRecord) -> str:
        members = {
            "time": _time(record),
            "level": record.levelname,
            "logger": record.name,
            "process": self.process,
            "message": record.getMessage(),
            **_fields(record),
        }
        if record.exc_info:
            members["exception"] = self.formatException(record.exc_info)
        return json.dumps(members, default=str)


class TextFormatter(logging.Formatter):
    """One line, with what isn't printable made visible; the lines of a traceback follow, indented."""

    def format(self, record: logging.LogRecord) -> str:
        fields = "".join(f" {name}={_quoted(value)}" for name, value in _fields(record).items())
        lines = [f"{_time(record)} {record.levelname} {record.name}: {record.getMessage()}{fields}"]
        if record.exc_info:
            lines += [f"    {line}" for line in self.formatException(record.exc_info).split("\n")]
        return "\n".join(map(_visible, lines))


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    fields: dict[str, Any] = record.__dict__.get("fields", {})
    request_id = REQUEST_ID.get()
    return {"request_id": request_id, **fields} if request_id else fields


def _time(record: logging.LogRecord) -> str:
    """ISO 8601, UTC, to the millisecond."""
    seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
    return f"{seconds}.{int(record.msecs):03}Z"


def _quoted(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if _PLAIN.fullmatch(text) else json.dumps(text)


def _visible(text: str) -> str:
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _uncaught(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, traceback)
    else:
        logging.getLogger("stepbatch").critical("uncaught exception", exc_info=(kind, error, traceback))
