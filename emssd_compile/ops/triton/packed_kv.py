"""Packed keys and values (`emssd_compile.ops._packed_kv`) in kernels: integers, and behind them the bytes of a scale.

The bytes are put together one by one, so a vector may lie at any address: a GPU reads no float at an odd one. Where
vectors lie at multiples of `ALIGNMENT`, four bytes at a time are read all the same.
"""

import triton
import triton.language as tl
from torch import Tensor

from emssd_compile.ops._packed_kv import DTYPE, LARGEST, LEAST, SCALE_BYTES

ALIGNMENT = 4
"""Bytes. Triton learns of strides by itself whether they are multiples of 16, which those of packed vectors are not."""

_SCALE_BYTES = tl.constexpr(SCALE_BYTES)
_ALIGNMENT = tl.constexpr(ALIGNMENT)
_LARGEST = tl.constexpr(float(LARGEST))
_LEAST = tl.constexpr(LEAST)
_ROUNDING = tl.constexpr(1.5 * 2**23)
"""Added to and taken from a float32 of less than 2^22, it leaves the nearest integer, the even one of two."""


def is_aligned(cache: Tensor) -> bool:
    """Whether packed vectors of `cache` lie at multiples of `ALIGNMENT`."""
    return cache.dtype == DTYPE and all(step % ALIGNMENT == 0 for step in (cache.data_ptr(), *cache.stride()[:-1]))


@triton.jit
def aligned(strides):
    """The strides of a cache that `is_aligned`, in a form that shows it to the compiler."""
    return (
        strides[0] // _ALIGNMENT * _ALIGNMENT,
        strides[1] // _ALIGNMENT * _ALIGNMENT,
        strides[2] // _ALIGNMENT * _ALIGNMENT,
        strides[3],
    )


@triton.jit
def load_scales(scales, mask):
    """Scales, float32 of the shape of `scales`, which point to their first bytes; 0 where `mask` is not set."""
    byte = tl.arange(0, _SCALE_BYTES)
    read = tl.load(scales[:, None] + byte[None, :], mask=mask[:, None], other=0)
    bits = tl.sum((read.to(tl.int32) & 255) << (8 * byte)[None, :], 1)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def store_packed(line, vector, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Write a packed vector to `line`, of `SIZE` components; further ones of `vector`, `[BLOCK]`, are 0."""
    wide = vector.to(tl.float32)
    largest = tl.max(tl.abs(wide), 0)
    is_finite = tl.min((tl.abs(wide) < float("inf")).to(tl.int32), 0) == 1
    scale = tl.where(is_finite, tl.maximum(largest, _LEAST) / _LARGEST, float("nan"))
    integers = tl.div_rn(wide, tl.where(is_finite, scale, 1.0)) + _ROUNDING - _ROUNDING
    dims, byte = tl.arange(0, BLOCK), tl.arange(0, _SCALE_BYTES)
    tl.store(line + dims, tl.where(is_finite, integers, 0.0).to(tl.int8), mask=dims < SIZE)
    tl.store(line + SIZE + byte, (scale.to(tl.int32, bitcast=True) >> (8 * byte)).to(tl.int8))
