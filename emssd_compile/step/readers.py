"""How the values of options are read that are more than a number in a range: token ids, lists and dicts of them.

A reader turns what a request sets into a number, or into a line of the option's table. An option names its reader, and
so does the manifest of an artifact. Tokens are right-aligned in a line; `NO_TOKEN` stands where there is none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from emssd_compile.errors import OptionError
from emssd_compile.numeric import integer, number, plain, shown


class Reader(NamedTuple):
    """What reads the values of an option.

    Attributes:
        read: (name of the option, value, shape of a line, V) -> a number, or the line; raises OptionError for what
            makes no sense.
        dims: dimensions of a line; 0 for a number.
    """

    read: Callable[[str, object, tuple[int, ...], int], int | Tensor]
    dims: int


NO_TOKEN = -1

_MOST_IN_FLOAT32 = 1 << 24  # integers up to here are exact


def token_id(name: str, value: object, shape: tuple[int, ...], vocabulary: int) -> int:
    """One id of the vocabulary."""
    token = integer(name, value)
    if not 0 <= token < vocabulary:
        raise OptionError(f"{name}: {shown(token)} is no id of the vocabulary; pass ids from 0 to {vocabulary - 1}")
    return token


def token_ids(name: str, value: object, shape: tuple[int, ...], vocabulary: int) -> Tensor:
    """`[M]`: ids, in a list, a set, a tensor of one dimension, or one alone."""
    several = _listed(value)
    tokens = dict.fromkeys(token_id(name, each, (), vocabulary) for each in ([value] if several is None else several))
    _check_room(name, len(tokens), shape[0], "ids")
    return torch.tensor(_aligned(tokens, shape[0]))


def token_sequences(name: str, value: object, shape: tuple[int, ...], vocabulary: int) -> Tensor:
    """`[S, L]`: a list of lists of ids, none of them empty."""
    several = _listed(value)
    if several is None:
        raise OptionError(f"{name}={shown(value)} is no list of lists of token ids")
    most, longest = shape
    found = dict.fromkeys(_sequence(name, each, longest, vocabulary) for each in several)
    _check_room(name, len(found), most, "sequences")
    lines = [_aligned(each, longest) for each in found]
    return torch.tensor([*lines, *[[NO_TOKEN] * longest] * (most - len(lines))])


def biased_sequences(name: str, value: object, shape: tuple[int, ...], vocabulary: int) -> Tensor:
    """float32 `[S, L + 1]`: a dict of biases by tuples of ids, or a list of pairs of both; the bias stands last."""
    most, longest = shape[0], shape[1] - 1
    pairs = _pairs(name, value, "{(5, 7): -1.5}")
    found = {_sequence(name, ids, longest, vocabulary): number(name, bias) for ids, bias in pairs}
    return _biased(name, found, most, longest, vocabulary)


def biased_tokens(name: str, value: object, shape: tuple[int, ...], vocabulary: int) -> Tensor:
    """float32 `[M, 2]`: a dict of biases by ids, or a list of pairs of both; the bias stands last."""
    pairs = _pairs(name, value, "{5: -1.5}")
    found: dict[tuple[int, ...], float]
    found = {(token_id(name, token, (), vocabulary),): number(name, bias) for token, bias in pairs}
    return _biased(name, found, shape[0], 1, vocabulary)


def start_and_factor(name: str, value: object, shape: tuple[int, ...], vocabulary: int) -> Tensor:
    """float32 `[2]`: a number of tokens, at least 0, and a factor, above 0."""
    pair = _listed(value)
    if pair is None or len(pair) != 2:
        raise OptionError(f"{name}={shown(value)} is no pair; pass (start, factor)")
    start, factor = integer(name, pair[0], least=0, most=_MOST_IN_FLOAT32), number(name, pair[1])
    if not 0 < factor < float("inf"):
        raise OptionError(f"{name}: the factor {shown(factor)} is out of range; pass a finite one above 0")
    return torch.tensor([start, factor], dtype=torch.float32)


READERS = {
    "token_id": Reader(token_id, 0),
    "token_ids": Reader(token_ids, 1),
    "token_sequences": Reader(token_sequences, 2),
    "biased_sequences": Reader(biased_sequences, 2),
    "biased_tokens": Reader(biased_tokens, 2),
    "start_and_factor": Reader(start_and_factor, 1),
}
"""By the names that options, and manifests, give them."""


def can_read(reader: object, shape: tuple[int, ...]) -> bool:
    """Whether a reader of this name gives lines of such a shape; without a name, there is a number to be read."""
    dims = 0 if reader == "" else READERS[reader].dims if isinstance(reader, str) and reader in READERS else None
    return dims == len(shape)


def _listed(value: object) -> list[Any] | None:
    """The elements of a list of any kind; None if it is none."""
    if isinstance(value, (Tensor, np.ndarray)) and value.ndim > 0 and not (isinstance(value, Tensor) and value.is_meta):
        listed: list[Any] = value.tolist()
        return listed
    value = plain(value)
    return list(value) if isinstance(value, (list, tuple, set, frozenset)) else None


def _pairs(name: str, value: object, example: str) -> list[tuple[Any, Any]]:
    listed = [*value.items()] if isinstance(value, Mapping) else _listed(value)
    pairs = None if listed is None else [_listed(each) for each in listed]
    if pairs is None or not all(pair is not None and len(pair) == 2 for pair in pairs):
        raise OptionError(f"{name}={shown(value)} is no dict and no list of pairs; pass {example}")
    return [(pair[0], pair[1]) for pair in pairs if pair is not None]


def _sequence(name: str, value: object, longest: int, vocabulary: int) -> tuple[int, ...]:
    ids = _listed(value)
    if not ids:
        raise OptionError(f"{name}: {shown(value)} is no sequence of token ids; pass at least one id in each")
    if len(ids) > longest:
        raise OptionError(f"{name}: a sequence has {len(ids)} ids; pass at most {longest} in each")
    return tuple(token_id(name, each, (), vocabulary) for each in ids)


def _biased(name: str, found: Mapping[tuple[int, ...], float], most: int, longest: int, vocabulary: int) -> Tensor:
    if vocabulary > _MOST_IN_FLOAT32:
        raise OptionError(f"{name}: ids of a vocabulary of {vocabulary} are not exact in float32; leave it out")
    _check_room(name, len(found), most, "sequences" if longest > 1 else "ids")
    lines = [[*_aligned(ids, longest), bias] for ids, bias in found.items()]
    return torch.tensor([*lines, *[[NO_TOKEN] * (longest + 1)] * (most - len(lines))], dtype=torch.float32)


def _check_room(name: str, count: int, most: int, what: str) -> None:
    if count > most:
        raise OptionError(f"{name} has {count} {what}; a row has room for {most}")


def _aligned(tokens: Iterable[int], size: int) -> list[int]:
    """Tokens at the end of a line."""
    listed = [*tokens]
    return [NO_TOKEN] * (size - len(listed)) + listed
