"""Values of a request's fields: of the right type, and in range."""

from __future__ import annotations

from stepbatch.errors import InvalidValue

MAX_PROMPT_CHARACTERS = 32_000  # as OpenAI has it; the model's own limit is in tokens


def check_text(name: str, value: object) -> None:
    """Raise ``InvalidValue`` for what is no text, or too long."""
    if not isinstance(value, str):
        raise InvalidValue(f"{name} must be a string", name)
    if len(value) > MAX_PROMPT_CHARACTERS:
        raise InvalidValue(f"{name} must have at most {MAX_PROMPT_CHARACTERS} characters", name)
    if any("\ud800" <= c <= "\udfff" for c in value):
        raise InvalidValue(f"{name} must be valid Unicode", name)


def check_int(name: str, value: object, low: int, high: int, optional: bool = True) -> None:
    """Raise ``InvalidValue`` for what is no whole number from ``low`` to ``high``."""
    if value is None and optional:
        return
    if not isinstance(value, int) or isinstance(value, bool):
        raise InvalidValue(f"{name} must be an integer", name)
    if not low <= value <= high:
        raise InvalidValue(f"{name} must be from {low} to {high}", name)  # a huge value can't even be printed


def check_float(name: str, value: object, high: float) -> float | None:
    """The number, from 0 to ``high``; raises ``InvalidValue`` for anything else."""
    if value is None:
        return None
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise InvalidValue(f"{name} must be a number", name)
    if not 0 <= value <= high:  # NaN isn't either
        raise InvalidValue(f"{name} must be a finite number from 0 to {high:g}", name)
    return float(value)
