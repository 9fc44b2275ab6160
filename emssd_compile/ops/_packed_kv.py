"""Keys and values in 8 bits: integers, and behind them the bytes of the scale that they share.

A packed vector is one line of bytes, so whatever moves, shares or rolls back tokens need not know of it. Each vector
has a scale of its own: what one token keeps does not depend on any other.
"""

from __future__ import annotations

import torch
from torch import Tensor

DTYPE = torch.int8
"""Of caches that hold packed vectors."""
SCALE_BYTES = torch.float32.itemsize
LARGEST = 127
"""Of the integers."""
LEAST = 1e-30
"""Of what the largest component counts as."""


def pack_kv(vectors: Tensor) -> Tensor:
    """The nearest packed vectors, int8 ``[..., D + 4]``.

    A component is off by at most a 254th of the largest one of its vector. What is not finite is unpacked as NaN, with
    all of its vector.

    Args:
        vectors: float ``[..., D]``.
    """
    wide = vectors.to(torch.float32)
    scale = wide.abs().amax(-1, keepdim=True).clamp(min=LEAST) / LARGEST  # [..., 1]
    integers = (wide / scale).round().nan_to_num().to(DTYPE)  # [..., D]
    return torch.cat((integers, scale.view(DTYPE)), -1)


def unpack_kv(packed: Tensor, dtype: torch.dtype) -> Tensor:
    """Vectors ``[..., D]`` of packed ones ``[..., D + 4]``."""
    integers, scale = packed.split((packed.shape[-1] - SCALE_BYTES, SCALE_BYTES), -1)
    unpacked: Tensor = integers.to(dtype) * scale.contiguous().view(torch.float32).to(dtype)
    return unpacked


def vector_size(cache: Tensor) -> int:
    """D, components of the vectors that a cache ``[..., D]`` or ``[..., D + 4]`` holds."""
    return cache.shape[-1] - (SCALE_BYTES if cache.dtype == DTYPE else 0)
