"""Numbers and switches that callers give as options: each is read here, so all of them refuse the same things.

A number may be Python's, numpy's, or a tensor of one element; it is given back as Python's. A bool is no number, since
`max_new_tokens=True` is a mistake. NaN is never meant, and what int64 cannot hold fits no tensor.
"""

from __future__ import annotations

import operator
import reprlib
from numbers import Integral, Real

import numpy as np
from torch import Tensor

from emssd_compile.errors import OptionError

INT64_MIN, INT64_MAX = -(1 << 63), (1 << 63) - 1


def integer(name: str, value: object, *, least: int = INT64_MIN, most: int = INT64_MAX) -> int:
    """`value` as an int from `least` to `most`. Raises OptionError naming the option if it is none."""
    value = plain(value)
    if isinstance(value, bool):
        raise OptionError(f"{name}={value} is a bool; pass an integer")
    try:
        number = operator.index(value)  # type: ignore[arg-type]  # that is what is being asked
    except (TypeError, RuntimeError):  # a tensor without values raises the latter
        raise OptionError(f"{name}={shown(value)} is not an integer") from None
    if not least <= number <= most:
        bound = f"at least {least}" if number < least else f"at most {most}"
        raise OptionError(f"{name}={shown(number)} is out of range; pass {bound}")
    return number


def seconds(name: str, value: object) -> float:
    """`value` as a duration in seconds, at least 0 and perhaps infinite. Raises OptionError if it is none."""
    value = plain(value)
    if isinstance(value, bool) or not isinstance(value, Real):
        raise OptionError(f"{name}={shown(value)} is not a number of seconds")
    if isinstance(value, Integral):
        return float(integer(name, value, least=0))
    duration = float(value)
    if not duration >= 0:  # NaN is not, either
        raise OptionError(f"{name}={duration} is out of range; pass at least 0 seconds, or None for no limit")
    return duration


def number(name: str, value: object) -> float:
    """`value` as a float that may be infinite, or as the int that it is. Raises OptionError if it is no number."""
    value = plain(value)
    if isinstance(value, bool) or not isinstance(value, Real) or value != value:
        raise OptionError(f"{name}={shown(value)} is not a number")
    return integer(name, value) if isinstance(value, Integral) else float(value)


def flag(name: str, value: object) -> bool:
    """`value` as a bool. Raises OptionError if it is none: "no" would count as true."""
    value = plain(value)
    if not isinstance(value, bool):
        raise OptionError(f"{name}={shown(value)} is not True or False")
    return value


def plain(value: object) -> object:
    """A scalar of numpy, or a tensor or array of one element and no dimension, as what Python has for it."""
    is_scalar = isinstance(value, np.generic) or (isinstance(value, (Tensor, np.ndarray)) and value.ndim == 0)
    if isinstance(value, Tensor) and value.is_meta:
        return value  # holds no number
    return value.item() if is_scalar else value  # type: ignore[attr-defined]  # checked just above


def shown(value: object) -> str:
    """`value` as it is written, cut short; Python itself refuses to write out integers of thousands of digits."""
    if isinstance(value, int) and value.bit_length() >= 256:
        return f"(an integer of {value.bit_length()} bits)"
    try:
        return reprlib.repr(value)
    except ValueError:
        return f"(a {type(value).__name__})"
