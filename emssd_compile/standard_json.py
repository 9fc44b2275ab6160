"""JSON as the standard has it: Python also reads and writes NaN and infinity, which other programs cannot read."""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn


def read_json(text: str) -> Any:
    """What a text of JSON holds; every number in it is finite, so it can be written again.

    Raises:
        ValueError: it is no JSON, is nested too deeply, or has a number too large for a float.
    """
    text = text.rstrip()  # where it breaks off is in its last line
    try:
        return json.loads(text, parse_float=_finite, parse_constant=_refuse)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if "\n" in text else ""  # a line of a file has a number of its own
        raise ValueError(f"{error.msg}, at {line}column {error.colno}") from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is more than a float can be; write a smaller number, or a string")
    return value


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"JSON has no {name}; write null, or a string")
