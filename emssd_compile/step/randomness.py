"""Random numbers that depend on a request's seed and a position alone, whatever the request is batched with."""

from __future__ import annotations

import torch
from torch import Tensor

NOISE = 1
"""The stream of the noise with which tokens are drawn, by a target and by drafters that mean to draw the same."""

DRAFTS, ACCEPTANCE, RESIDUALS = 2, 3, 4
"""The streams of drafts that are drawn independently of the target, of the tests that they have to pass, and of the
token that follows those that did. A step takes all of these at the position behind its root, told apart by index: no
two steps of a row have that in common, so what one step has decided by a number says nothing of the next."""

_WORD = 0xFFFFFFFF
_GOLDEN = 0x1E3779B1  # odd, below 2^29: spreads small counters over a word
_TO_UNIT = 2.0**-32


def uniforms(seeds: Tensor, positions: Tensor, stream: int = 0, index: Tensor | None = None) -> Tensor:
    """One number in (0, 1) for each (seed, position, stream, index): float32, in the broadcast shape.

    Counter-based: there is no generator whose state would have to travel. A key of two 32-bit words is hashed from
    seed, position and stream; each index then costs two rounds of an integer hash, about a nanosecond a number, so a
    whole vocabulary may be asked for. Words lie in int64, where products of a word and a constant below 2^31 are exact:
    products, shifts, `xor` and `and` are all it takes, and they mean the same on every target, to the bit.

    Small numbers are fine-grained (2^-32 and float32's relative precision), numbers near 1 are 2^-24 apart. What draws
    from a tail should take the lower one.

    Args:
        seeds: int64, any shape; all 64 bits count.
        positions: int64, 0 to 2^31 - 1.
        stream: tells apart several numbers for one position; 0 to 2^31 - 1.
        index: int64, 0 to 2^31 - 1: numbers of one stream, such as one for each token id. None is index 0.
    """
    key = _mixed(seeds & _WORD ^ _GOLDEN)
    key = _mixed(key ^ (seeds >> 32) & _WORD)
    key = _mixed(key + positions * _GOLDEN & _WORD)
    first = _mixed(key + stream * _GOLDEN & _WORD)
    second = _mixed(first ^ _GOLDEN)
    counter = torch.zeros_like(first) if index is None else index
    word = _mixed(_mixed(first + counter * _GOLDEN & _WORD) + second & _WORD)
    return ((word.float() + 0.5) * _TO_UNIT).clamp(max=1 - 2**-24)


def gumbels(seeds: Tensor, positions: Tensor, index: Tensor, stream: int = NOISE) -> Tensor:
    """Standard Gumbel noise of (seed, position, stream, index): float32, in the broadcast shape.

    The index of the largest of `log p + noise` is a draw from p (the Gumbel-max trick). Whoever asks for the same seed,
    position and token id is given the same noise, so a target and a drafter that draw with it mostly draw the same.

    Args:
        seeds, positions, index, stream: as for `uniforms`.
    """
    low = uniforms(seeds, positions, stream, index)  # the low ones, which are fine-grained, make large noise
    rest = 1 - low
    # -log1p(-low) of what every target has: exact to a few units in the last place where 1 - low is rounded, too
    waiting = torch.where(rest == 1, low, rest.log() * (low / (rest - 1)))  # exponentially distributed
    return -waiting.log()


def _mixed(word: Tensor) -> Tensor:
    """A permutation of 32-bit words whose output bits each depend on all input bits with next to no bias.

    Three xor-shifts and two products; the constants are those that the search of
    https://github.com/skeeto/hash-prospector ranks best for this form.
    """
    word = (word ^ word >> 16) * 0x21F0AAAD & _WORD
    word = (word ^ word >> 15) * 0x735A2D97 & _WORD
    return word ^ word >> 15
