"""Errors name options as they are called in Python; on the command line they are flags."""

from __future__ import annotations

import re
from collections.abc import Iterable

_VALUE = r"\[[^\]]*\]|'[^']*'|[^\s,;:()\[\]]+"


def in_flags(message: str, names: Iterable[str]) -> str:
    """The message with flags for what has one: `--max-length 64` for `max_length=64`.

    Args:
        message: of an error.
        names: the options that are flags of the command, as in Python. One that is a plain word, such as `layout`, is
            an option only where it is given a value.
    """
    for name in names:
        flag = "--" + name.replace("_", "-")
        message = re.sub(rf"\boptimize\((?:model, )?{name}=({_VALUE})\)", rf"{flag} \1", message)
        message = re.sub(rf"(?<![\w./(-]){name}=({_VALUE})", rf"{flag} \1", message)
        if "_" in name:
            message = re.sub(rf"(?<![\w./-]){name}(?![\w/=(-]|\.\w)", flag, message)
    return message
