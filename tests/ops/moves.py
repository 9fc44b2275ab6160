"""Accepted paths of draft trees for the tests of `emssd::move_kv`, and the moves written to be obvious."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

NUM_KV_HEADS, KEY_SIZE, VALUE_SIZE = 2, 4, 6
RUBBISH = (-(2**62), 2**62, -1, 0, 3)


@dataclass(frozen=True)
class Moves:
    """The arguments of `emssd::move_kv`; slots that neither hold an accepted token nor get one are NaN."""

    k_cache: Tensor
    v_cache: Tensor
    starts: Tensor
    path: Tensor
    counts: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.k_cache, self.v_cache, self.starts, self.path, self.counts


def make_moves(
    rows: Sequence[tuple[int, Sequence[int]]],
    *,
    width: int | None = None,
    dtype: torch.dtype = torch.float32,
    value_size: int = VALUE_SIZE,
    spare_slots: int = 1,
) -> Moves:
    """Moves with ``rows[b] = (slot of node 0, accepted nodes)``; what a row says past its count is rubbish."""
    longest = max(len(nodes) for _, nodes in rows) if width is None else width
    capacity = max([start + nodes[-1] for start, nodes in rows if nodes], default=0) + 1 + spare_slots
    shape = (len(rows), capacity, NUM_KV_HEADS)
    k_cache, v_cache = (torch.full((*shape, size), math.nan, dtype=dtype) for size in (KEY_SIZE, value_size))
    path = torch.tensor([RUBBISH[i % len(RUBBISH)] for i in range(len(rows) * longest)], dtype=torch.int64)
    path = path.view(len(rows), longest)
    for row, (start, nodes) in enumerate(rows):
        path[row, : len(nodes)] = torch.tensor(nodes, dtype=torch.int64)
        for cache in (k_cache, v_cache):
            slots = start + path[row, : len(nodes)]
            cache[row, slots] = torch.randn(len(nodes), *cache.shape[2:]).to(dtype)
    starts = torch.tensor([start if nodes else RUBBISH[b % 2] for b, (start, nodes) in enumerate(rows)])
    return Moves(k_cache, v_cache, starts, path, torch.tensor([len(nodes) for _, nodes in rows]))


def expected_caches(moves: Moves) -> tuple[Tensor, Tensor]:
    """The caches after the moves, token by token."""
    k_cache, v_cache = moves.k_cache.clone(), moves.v_cache.clone()
    for row, (start, count) in enumerate(zip(moves.starts.tolist(), moves.counts.tolist(), strict=True)):
        for depth in range(count):
            for cache in (k_cache, v_cache):
                cache[row, start + depth] = cache[row, start + int(moves.path[row, depth])]
    return k_cache, v_cache


def same_bits(cache: Tensor, expected: Tensor) -> bool:
    """Also where they hold NaN."""
    return torch.equal(cache.contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8))
