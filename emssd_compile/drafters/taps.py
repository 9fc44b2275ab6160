"""Which layers of the target a draft head reads."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from emssd_compile.errors import OptionError
from emssd_compile.numeric import integer, shown


def listed(name: str, layers: object) -> tuple[int, ...]:
    """Numbers of layers that are given. Raises OptionError if they are no list, or one is not a number from 0 on."""
    if isinstance(layers, str) or not isinstance(layers, Iterable):
        raise OptionError(f"{name}={shown(layers)} is no list of layers; pass their numbers, as in (1, 9)")
    return tuple(integer(f"{name}[{index}]", layer, least=0) for index, layer in enumerate(layers))


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
        OptionError: there are none at all, or not as many as the head reads, or the option is none of `listed`.
    """
    given = said if option is None else option
    if given is None:
        raise OptionError(f"nothing says which layers of the target this {name} reads; {advice}")
    chosen = listed(f"{name} taps", given)
    if len(chosen) != count:
        raise OptionError(f"taps={shown(chosen)}: this {name} reads {count} layers of the target")
    return chosen
