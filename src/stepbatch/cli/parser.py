"""Flags, made from the fields of the config classes."""

from __future__ import annotations

import argparse
import difflib
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, fields
from typing import Any, NoReturn, TypeVar, get_args, get_origin, get_type_hints

from stepbatch.config import choices_of
from stepbatch.demo import MODEL_PATH
from stepbatch.errors import OptionError

Config = TypeVar("Config")


class Parser(argparse.ArgumentParser):
    """Takes no abbreviations, suggests what was meant, and raises ``OptionError`` where argparse would exit."""

    def __init__(self, command: str, usage: str, description: str) -> None:
        width = min(110, shutil.get_terminal_size().columns)
        super().__init__(
            prog=f"stepbatch {command}",
            usage=usage,
            description=description,
            allow_abbrev=False,
            formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=30, width=width),
        )
        self.flags: list[str] = []

    def read(self, arguments: Sequence[str]) -> dict[str, Any]:
        """The values of all flags by name.

        Raises:
            OptionError: an unknown flag or argument, or a value of the wrong type.
        """
        values, unknown = self.parse_known_intermixed_args(arguments)
        if unknown:
            name = unknown[0].split("=")[0]
            kind = "flag" if name.startswith("-") else "argument"
            raise OptionError(f"{self.prog} has no {kind} {name}{suggestion(name, self.flags)}")
        return vars(values)

    def error(self, message: str) -> NoReturn:
        raise OptionError(message.removeprefix("argument "))

    def add_config(self, cls: type) -> None:
        """Add a flag for every field of a config class, under its docstring."""
        group = self.add_argument_group((cls.__doc__ or cls.__name__).rstrip("."))
        hints = get_type_hints(cls)
        for field in fields(cls):
            names = [f"--{name.replace('_', '-')}" for name in (field.name, *field.metadata["aliases"])]
            group.add_argument(*names, dest=field.name, **_options(field, hints[field.name]))
            self.flags.extend(names)

    def add_flag(self, *names: str, **options: Any) -> None:
        """Add a flag that is no setting."""
        self.add_argument(*names, **options)
        self.flags.extend(names)


def dispatch(arguments: Sequence[str], commands: Mapping[str, Callable[[Sequence[str]], int]], usage: str) -> int:
    """Run the command that ``arguments`` begin with, or print the usage; returns the exit status.

    Raises:
        OptionError: there is no such command.
        SetupError: it can't be done as asked.
    """
    first = arguments[0] if arguments else "--help"
    if first in ("--help", "-h"):
        print(usage, file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else 2
    if first not in commands:
        kind = "flag" if first.startswith("-") else "command"
        raise OptionError(f"there is no {kind} {first}{suggestion(first, [*commands, '--help'])}")
    return commands[first](arguments[1:])


def build(cls: type[Config], values: dict[str, Any]) -> Config:
    """The config that the flags' values make.

    Raises:
        OptionError: a value is out of range.
    """
    hints = get_type_hints(cls)
    given = {name: value for name, value in values.items() if name in hints}
    for name, value in given.items():
        if get_origin(hints[name]) is tuple:
            given[name] = tuple(value or ())
    return cls(**given)


def build_groups(cls: type[Config], values: dict[str, Any]) -> Config:
    """The config whose fields are groups of flags, made of the flags' values.

    Raises:
        OptionError: a value is out of range.
    """
    return cls(**{name: build(group, values) for name, group in get_type_hints(cls).items()})


def groups(cls: type) -> tuple[type, ...]:
    """The groups of flags that are a config's fields."""
    return tuple(get_type_hints(cls).values())


def suggestion(name: str, known: Sequence[str]) -> str:
    """The end of an error message: what may have been meant."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _bool(value: str) -> bool:
    if value.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"must be true or false, not {value}")
    return value.lower() == "true"


def _auto(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    return lambda value: None if value.lower() == "auto" else kind(value)


def _options(field: Field[Any], hint: Any) -> dict[str, Any]:
    """What argparse is told of a field."""
    options: dict[str, Any] = {"default": field.default, "help": _help(field)}
    if get_origin(hint) is tuple:  # once for each of its values
        return options | {"action": "append", "default": None, "type": get_args(hint)[0], "metavar": "TEXT"}
    choices = choices_of(field, hint)  # the config class checks them, with a suggestion
    options["type"], options["metavar"] = (str, f"{{{','.join(choices)}}}") if choices else _type(hint)
    if field.metadata["auto"]:
        options["type"], options["metavar"] = _auto(options["type"]), f"{{auto,{options['metavar']}}}"
    bare = True if hint is bool else field.metadata["bare"]
    if bare is not None:
        options |= {"nargs": "?", "const": bare}
    return options


def _type(hint: Any) -> tuple[Callable[[str], Any], str]:
    """What converts a flag's value, and what stands for it in the help."""
    if hint is bool:
        return _bool, "{true,false}"
    for kind, metavar in ((int, "INT"), (float, "NUMBER"), (str, "TEXT")):
        if hint is kind or kind in get_args(hint):
            return kind, metavar
    raise AssertionError(f"no flag can have the type {hint}")


def _help(field: Field[Any]) -> str:
    default = "the bundled model" if field.default == str(MODEL_PATH) else field.default
    default = str(default).lower() if isinstance(default, bool) else default
    if default is None and field.metadata["auto"]:
        default = "auto"
    text = str(field.metadata["help"]).replace("%", "%%")
    return text if default in (None, "", ()) else f"{text} (default: {default})"
