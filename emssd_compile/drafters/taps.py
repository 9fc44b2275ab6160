"""Which layers of the target a draft head reads."""

from __future__ import annotations

from collections.abc import Sequence

from emssd_compile.errors import OptionError
from emssd_compile.numeric import integer, shown


def choose_taps(
    name: str, said: Sequence[int] | None, option: Sequence[int] | None, count: int, advice: str
) -> tuple[int, ...]:
    """The numbers of the layers, from 0 on.

    Args:
        name: of the kind of head.
        said: by the head's configuration; None if it says nothing.
        option: what the caller wants instead; None for nothing.
        count: how many the head reads.
        advice: what to do where nothing says it.

    Raises:
        OptionError: there are none at all, or not as many as the head reads, or one is not a number from 0 on.
    """
    chosen = said if option is None else tuple(option)
    if chosen is None:
        raise OptionError(f"nothing says which layers of the target this {name} reads; {advice}")
    if len(chosen) != count:
        raise OptionError(f"taps={shown(chosen)}: this {name} reads {count} layers of the target")
    return tuple(integer(f"{name} taps[{index}]", tap, least=0) for index, tap in enumerate(chosen))
