"""Random numbers that depend on a request's seed and a position alone, whatever the request is batched with."""

from __future__ import annotations

from torch import Tensor

_MODULUS = 2**31 - 1  # a prime; products of two residues fit int64
_FACTORS = (48271, 69621, 1583458089)  # primitive roots of it
_ROUNDS = 3


def uniforms(seeds: Tensor, positions: Tensor, stream: int = 0) -> Tensor:
    """One number in (0, 1) for each (seed, position, stream): float32, in the broadcast shape.

    Counter-based: there is no generator whose state would have to travel. Residues modulo the prime p = 2^31 - 1 are
    scrambled by x -> x^5, a permutation since 5 and p - 1 have no common divisor. Additions, products and remainders of
    integers are all it takes, so it means the same on every target.

    Args:
        seeds: int64, any shape.
        positions: int64, not negative.
        stream: tells apart several numbers for one position.
    """
    value = seeds % _MODULUS
    words: tuple[Tensor | int, ...] = (positions, stream, 1)
    for word, factor in zip(words, _FACTORS, strict=True):
        for _ in range(_ROUNDS):
            value = _fifth_power((value + word * factor + factor) % _MODULUS)
    return ((value.float() + 0.5) / _MODULUS).clamp(max=1 - 2**-24)


def _fifth_power(x: Tensor) -> Tensor:
    square = x * x % _MODULUS
    return square * square % _MODULUS * x % _MODULUS
