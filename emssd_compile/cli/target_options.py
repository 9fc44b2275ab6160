"""Options of export targets on the command line: each target declares its own (`export.target.option`)."""

from __future__ import annotations

import argparse
from typing import Any

import emssd_compile.export as targets
from emssd_compile.errors import OptionError


def add_target_options(parser: argparse.ArgumentParser) -> None:
    """A group of options for each target that has some."""
    for name in targets.TARGETS:
        flags = targets.find_target(name).flags
        if flags:
            group = parser.add_argument_group(f"options of --to {name}")
            for flag, field in flags.items():
                argument: dict[str, Any] = field.metadata["argument"]
                group.add_argument(flag, dest=_place(name, field.name), default=argparse.SUPPRESS, **argument)


def target_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options that were given, by the names they have in Python.

    Raises:
        OptionError: one is for another target than `--to`.
    """
    given = vars(arguments)
    options = {}
    for name in targets.TARGETS:
        for flag, field in targets.find_target(name).flags.items():
            place = _place(name, field.name)
            if place in given and name != arguments.to:
                raise OptionError(f"{flag} is for --to {name}, not for --to {arguments.to}")
            if place in given:
                options[field.name] = given[place]
    return options


def _place(target: str, name: str) -> str:
    return f"{target}.{name}"
