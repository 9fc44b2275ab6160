"""Errors name options as they are called in Python; on the command line they are flags."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable
from typing import Any

_VALUE = r"\[[^\]]*\]|'[^']*'|[^\s,;:()\[\]]+"


class Noted(argparse.Action):
    """Stores what a flag is given, and notes in `given` that it was: with its default, too."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option_string: Any = None
    ) -> None:
        """Called where the flag stands."""
        setattr(namespace, self.dest, values)
        namespace.given = {*namespace.given, self.dest}


class NotedTrue(Noted):
    """The same of a flag without a value."""

    def __init__(self, option_strings: list[str], dest: str, **options: Any) -> None:
        super().__init__(option_strings, dest, nargs=0, **{"default": False, **options})

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, *others: Any) -> None:
        """Called where the flag stands."""
        super().__call__(parser, namespace, True)


def in_flags(message: str, names: Iterable[str]) -> str:
    """The message with flags for what has one: `--max-length 64` for `max_length=64`.

    Args:
        message: of an error.
        names: the options that are flags of the command, as in Python. One that is a plain word, such as `layout`, is
            an option only where it is given a value.
    """
    for name in names:
        flag = "--" + name.replace("_", "-")
        message = re.sub(rf"(?<![\w./(-]){name}=True\b", flag, message)
        message = re.sub(rf"\boptimize\((?:model, )?{name}=({_VALUE})\)", rf"{flag} \1", message)
        message = re.sub(rf"(?<![\w./(-]){name}=({_VALUE})", rf"{flag} \1", message)
        if "_" in name:
            message = re.sub(rf"(?<![\w./-]){name}(?![\w/=(-]|\.\w)", flag, message)
    return message
