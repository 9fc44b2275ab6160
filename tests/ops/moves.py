"""Accepted paths of draft trees for the tests of `emssd::move_kv`, and the moves written to be obvious."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

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
    block_table: Tensor | None = None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        given = self.k_cache, self.v_cache, self.starts, self.path, self.counts
        return given if self.block_table is None else (*given, self.block_table)


def in_blocks(moves: Moves, size: int) -> Moves:
    """The same moves in a pool of blocks of `size` slots; a row that moves nothing has no blocks at all."""
    rows, capacity = moves.k_cache.shape[:2]
    columns = -(-capacity // size)
    table = torch.randperm(rows * columns).to(torch.int32).view(rows, columns)
    table[moves.counts == 0] = -1

    def pool(cache: Tensor) -> Tensor:
        filled = torch.full((rows, columns * size, *cache.shape[2:]), math.nan, dtype=cache.dtype)
        filled[:, :capacity] = cache
        blocks = torch.full((rows * columns, size, *cache.shape[2:]), math.nan, dtype=cache.dtype)
        owned = table >= 0
        blocks[table[owned]] = filled.unflatten(1, (columns, size))[owned]
        return blocks

    return replace(moves, k_cache=pool(moves.k_cache), v_cache=pool(moves.v_cache), block_table=table)


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
    size = k_cache.shape[1]

    def place(row: int, slot: int) -> tuple[int, int]:
        return (row, slot) if moves.block_table is None else (int(moves.block_table[row, slot // size]), slot % size)

    for row, (start, count) in enumerate(zip(moves.starts.tolist(), moves.counts.tolist(), strict=True)):
        for depth in range(count):
            for cache in (k_cache, v_cache):
                cache[place(row, start + depth)] = cache[place(row, start + int(moves.path[row, depth]))]
    return k_cache, v_cache


def same_bits(cache: Tensor, expected: Tensor) -> bool:
    """Also where they hold NaN."""
    return torch.equal(cache.contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8))
