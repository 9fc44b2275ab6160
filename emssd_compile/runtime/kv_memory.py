"""Where rows keep keys and values, seen from the host: slabs, or blocks of a pool. A kind of memory is a class here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from emssd_compile.errors import CapacityError
from emssd_compile.runtime.blocks import BlockPool
from emssd_compile.runtime.launch import Launcher
from emssd_compile.runtime.requests import Request
from emssd_compile.step.paging import BLOCK_TABLE, Paging
from emssd_compile.step.signature import Signature


@dataclass(frozen=True)
class Rehearsal:
    """What a dry run may use.

    Attributes:
        rows: so many of the first rows may decode.
        tokens: that each of them may hold.
        tensors: inputs of the step by name, as they are to be in it.
    """

    rows: int
    tokens: int
    tensors: Mapping[str, Tensor] = field(default_factory=dict)


class KVMemory(Protocol):
    """What the engine asks of a kind of memory. It tells which rows start, what they may hold, and which have ended."""

    def check(self, request: Request) -> None:
        """Raises CapacityError if the request could never start, however long it waits."""

    def fits(self, request: Request, source: int | None) -> bool:
        """Whether the request can start now and go on to its end.

        Args:
            request: which.
            source: a row whose cache holds all of its prompt; None without.
        """
        ...

    def start(self, launcher: Launcher, row: int, request: Request, source: int | None, num_read: int) -> None:
        """A request that fits starts in a free row; of a `source`, it is given the first `num_read` tokens."""

    def prepare(self, launcher: Launcher, tokens: Mapping[int, int]) -> None:
        """A step is launched next; `tokens` is how many each busy row may hold behind it, at most."""

    def release(self, row: int) -> None:
        """A row has ended, or all busy ones have."""

    def rehearsal(self) -> Rehearsal:
        """What a dry run may use, while no row is busy."""
        ...

    def take_counts(self) -> dict[str, int]:
        """Counts for `Stats` since the last call."""
        ...


class Slabs:
    """A slab of C tokens for each row: nothing to keep account of.

    Args:
        signature: of the step.
    """

    def __init__(self, signature: Signature) -> None:
        self._signature = signature

    def check(self, request: Request) -> None:
        """Whatever fits a row fits."""

    def fits(self, request: Request, source: int | None) -> bool:
        """Always."""
        return True

    def start(self, launcher: Launcher, row: int, request: Request, source: int | None, num_read: int) -> None:
        """Copy what the source has read."""
        if source is not None:
            launcher.copy_row(self._signature.with_role("cache"), source, row, num_read)

    def prepare(self, launcher: Launcher, tokens: Mapping[int, int]) -> None:
        """Nothing."""

    def release(self, row: int) -> None:
        """Nothing."""

    def rehearsal(self) -> Rehearsal:
        """All rows, to the full."""
        return Rehearsal(self._signature.sizes.rows, self._signature.sizes.capacity)

    def take_counts(self) -> dict[str, int]:
        """None."""
        return {}


@dataclass
class _Held:
    """What a busy row has.

    Attributes:
        blocks: its own and shared ones, in the order of its slots.
        promised: how many more it may take.
        limit: tokens that it holds at most.
    """

    blocks: list[int]
    promised: int
    limit: int


class Pages:
    """Blocks of a pool, taken as rows grow and given back when they end.

    A request starts when the pool can promise it all the blocks it may come to need, so no row ever runs dry. Rows of
    one prompt have its full blocks in common: nobody writes to them again, since a row writes behind what it has read.

    Args:
        paging: the pool.
        signature: of the step.
    """

    def __init__(self, paging: Paging, signature: Signature) -> None:
        self._paging, self._signature = paging, signature
        self._pool = BlockPool(paging.num_blocks)
        self._held: dict[int, _Held] = {}  # by row
        self._table = self._empty_table()
        self._is_new = True  # whether the step has yet to see the table as it is
        self._num_shared = 0

    def check(self, request: Request) -> None:
        """Raises CapacityError if the whole pool is too small for it."""
        needed, paging = self._needed(request), self._paging
        if needed <= paging.num_blocks:
            return
        room = paging.num_tokens - paging.spare - len(request.prompt)
        fewer = f"pass max_new_tokens={room} or less, or " if room > 0 else ""
        raise CapacityError(
            f"request {request.index}: {len(request.prompt)} prompt tokens and {request.max_new_tokens} new ones take "
            f"{needed} blocks of {paging.block_size} tokens, and the pool has {paging.num_blocks}, {paging.num_tokens} "
            f"tokens for all rows; {fewer}compile with optimize(model, kv_tokens={needed * paging.block_size}) or more"
        )

    def fits(self, request: Request, source: int | None) -> bool:
        """Whether all the blocks that it may need can be promised; those that it shares are there."""
        num_shared = len(self._in_common(source, len(request.prompt) - 1))
        return self._needed(request) - num_shared <= self._pool.num_open

    def start(self, launcher: Launcher, row: int, request: Request, source: int | None, num_read: int) -> None:
        """Share the source's full blocks of what is read, and copy the rest."""
        shared, size = self._in_common(source, num_read), self._paging.block_size
        self._pool.share(shared)
        self._num_shared += len(shared)
        promised = self._needed(request) - len(shared)
        self._pool.promise(promised)
        self._held[row] = _Held([*shared], promised, len(request.prompt) + request.max_new_tokens)
        self._grow(row, len(request.prompt))
        if source is None:
            return
        own, others = self._held[row].blocks, self._held[source].blocks
        for place in range(len(shared), -(-num_read // size)):
            count = min(size, num_read - place * size)
            launcher.copy_row(self._signature.with_role("pool"), others[place], own[place], count)
        launcher.copy_row(self._signature.with_role("cache"), source, row, num_read)

    def prepare(self, launcher: Launcher, tokens: Mapping[int, int]) -> None:
        """Take the blocks that rows may write to, and tell the step."""
        for row, count in tokens.items():
            self._grow(row, count)
        if self._is_new:
            launcher.assign(BLOCK_TABLE, launcher.upload(self._table.clone()))
            self._is_new = False

    def release(self, row: int) -> None:
        """Give its blocks back."""
        held = self._held.pop(row)
        self._pool.free(held.blocks)
        self._pool.withdraw(held.promised)
        self._table[row] = -1
        self._is_new = True

    def rehearsal(self) -> Rehearsal:
        """As many rows as the pool has blocks for, and to each the same part of it."""
        paging = self._paging
        each = min(max(paging.num_blocks // paging.rows, paging.blocks_of(2)), paging.row_blocks)
        rows = min(paging.num_blocks // each, paging.rows)
        table = self._empty_table()
        table[:rows, :each] = torch.arange(rows * each, dtype=torch.int32).view(rows, each)
        tokens = min(each * paging.block_size - paging.spare, paging.capacity)
        return Rehearsal(rows, tokens, {BLOCK_TABLE: table})

    def take_counts(self) -> dict[str, int]:
        """Blocks that rows had in common with others."""
        counts, self._num_shared = {"num_shared_blocks": self._num_shared}, 0
        return counts

    def _needed(self, request: Request) -> int:
        return self._paging.blocks_of(len(request.prompt) + request.max_new_tokens)

    def _in_common(self, source: int | None, num_read: int) -> list[int]:
        """The full blocks of a row's first tokens, if another row may have them, too."""
        if source is None or not self._paging.shares:
            return []
        return self._held[source].blocks[: num_read // self._paging.block_size]

    def _grow(self, row: int, tokens: int) -> None:
        """Let a row have the blocks for so many tokens, or for as many as it may come to hold."""
        held = self._held[row]
        missing = self._paging.blocks_of(min(tokens, held.limit)) - len(held.blocks)
        if missing > 0:
            held.blocks += self._pool.take(missing)
            held.promised -= missing
            self._table[row, : len(held.blocks)] = torch.tensor(held.blocks, dtype=torch.int32)
            self._is_new = True

    def _empty_table(self) -> Tensor:
        return torch.full((self._paging.rows, self._paging.row_blocks), -1, dtype=torch.int32)
