"""Keys and values in blocks of a pool: which row has which, and what they have in common."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from emssd_compile.errors import CapacityError
from emssd_compile.runtime.block_keys import BlockKeys
from emssd_compile.runtime.blocks import BlockPool
from emssd_compile.runtime.kv_memory import Beginning, Rehearsal
from emssd_compile.runtime.launch import Launcher
from emssd_compile.runtime.requests import Request
from emssd_compile.step.paging import BLOCK_TABLE, Paging
from emssd_compile.step.signature import Signature


@dataclass
class _Held:
    """What a busy row has.

    Attributes:
        request: what it decodes.
        blocks: its own and shared ones, in the order of its slots.
        promised: how many more it may take.
        num_kept: how many of the first are found by their keys, or others that hold the same.
    """

    request: Request
    blocks: list[int] = field(default_factory=list)
    promised: int = 0
    num_kept: int = 0

    @property
    def limit(self) -> int:
        """Tokens that it holds at most."""
        return len(self.request.prompt) + self.request.max_new_tokens


class Pages:
    """Blocks of a pool, taken as rows grow and given back when they end.

    A request starts when the pool can promise it all the blocks it may come to need, so no row ever runs dry. Rows of
    one prompt have its full blocks in common: nobody writes to them again, since a row writes behind what it has read.
    So do requests of one scope whose texts begin alike: full blocks that have been read are found by the tokens in them
    and before them, also when the row that read them has ended, until the pool needs them for others.

    Args:
        paging: the pool.
        signature: of the step.
    """

    def __init__(self, paging: Paging, signature: Signature) -> None:
        self._paging, self._signature = paging, signature
        self._pool = BlockPool(paging.num_blocks)
        self._held: dict[int, _Held] = {}  # by row
        self._readers: dict[bytes, set[int]] = {}  # rows that have yet to read a block of a prompt, by its key
        self._table = self._empty_table()
        self._is_new = True  # whether the step has yet to see the table as it is
        self._counts = Counter[str]()

    @property
    def block_size(self) -> int:
        """P, tokens of a block."""
        return self._paging.block_size

    @property
    def num_kept(self) -> int:
        """Blocks that requests to come may find."""
        return self._pool.num_kept

    @property
    def capacity(self) -> int:
        """C, or what the whole pool has room for."""
        return min(self._paging.capacity, self._paging.num_tokens - self._paging.spare)

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

    def is_being_read(self, request: Request) -> bool:
        """Whether a busy row reads the first block that is not there yet.

        Asked of all that wait, before each step: who waited for a block, and for whom it is still read, waits on.
        """
        known = request.block_keys
        if known is not None and known.awaited in self._readers and not self._pool.find([known.awaited]):
            return True
        keys = self._keys(request)
        (missing,) = keys[len(self._pool.find(keys)) :][:1] or [b""]
        if request.block_keys is not None:
            request.block_keys.awaited = missing
        return missing in self._readers

    def plan(self, request: Request, sources: Sequence[int]) -> Beginning | None:
        """Whether all the blocks that it may need can be promised, beside those that it shares."""
        size, num_read = self._paging.block_size, len(request.prompt) - 1
        source = next(iter(sources), None)
        if source is None:
            shared = self._pool.find(self._keys(request))
            num_read = len(shared) * size or request.num_read
        else:
            shared = self._held[source].blocks[: num_read // size] if self._paging.sharing.prompts else []
        needed = self._needed(request) - len(shared) + self._pool.num_idle(shared)
        return Beginning(request, num_read, source, (*shared,)) if needed <= self._pool.num_open else None

    def start(self, launcher: Launcher, row: int, beginning: Beginning) -> None:
        """Share what is shared, and copy what else the source has read."""
        request, shared, source = beginning.request, beginning.blocks, beginning.source
        held = self._held[row] = _Held(request)
        for key in self._keys(request):
            self._readers.setdefault(key, set()).add(row)
        self._pool.share(shared)
        held.blocks += shared
        promised = self._needed(request) - len(shared)
        self._pool.promise(promised)
        held.promised = promised
        self._grow(row, len(request.prompt))
        self._counts["num_shared_blocks"] += len(shared)
        if source is None:
            if request.scope is not None and self._paging.sharing.lookahead is not None:
                request.num_cached_tokens = len(shared) * self._paging.block_size
                self._counts["prefix_cache_queries"] += len(request.prompt)
                self._counts["prefix_cache_hits"] += request.num_cached_tokens
            return
        size, num_read = self._paging.block_size, beginning.num_read
        own, others = held.blocks, self._held[source].blocks
        for place in range(len(shared), -(-num_read // size)):
            count = min(size, num_read - place * size)
            launcher.copy_row(self._signature.with_role("pool"), others[place], own[place], count)
        launcher.copy_row(self._signature.with_role("cache"), source, row, num_read)

    def note_read(self, row: int, num_read: int) -> None:
        """Let full blocks be found from now on."""
        held, lookahead = self._held[row], self._paging.sharing.lookahead
        keys = held.request.block_keys
        if keys is None or lookahead is None:
            return
        most = (num_read - lookahead) // self._paging.block_size
        if most <= held.num_kept:
            return
        keys.extend(torch.cat([held.request.prompt, torch.tensor(held.request.output, dtype=torch.int64)]))
        for place in range(held.num_kept, most):
            self._pool.keep(held.blocks[place], keys.keys[place])
            self._reads_no_more(row, keys.keys[place])
        held.num_kept = most

    def prepare(self, launcher: Launcher, tokens: Mapping[int, int]) -> None:
        """Take the blocks that rows may write to, and tell the step."""
        for row, count in tokens.items():
            self._grow(row, count)
        if self._is_new:
            launcher.assign(BLOCK_TABLE, launcher.upload(self._table.clone()))
            self._is_new = False

    def release(self, row: int) -> None:
        """Give its blocks back."""
        if (held := self._held.pop(row, None)) is not None:  # else its request failed before it had any
            self._pool.free(held.blocks)
            self._pool.withdraw(held.promised)
            for key in self._keys(held.request)[held.num_kept :]:
                self._reads_no_more(row, key)
        self._table[row] = -1
        self._is_new = True

    def end_run(self) -> None:
        """Forget what was read, unless it is kept from call to call."""
        if not self._paging.sharing.keeps:
            self.forget()

    def forget(self) -> None:
        """Let no block be found any more."""
        self._pool.forget()

    def rehearsal(self) -> Rehearsal:
        """As many rows as the pool has blocks for, and to each the same part of it; what is in them is lost."""
        self.forget()
        paging = self._paging
        each = min(max(paging.num_blocks // paging.rows, paging.blocks_of(2)), paging.row_blocks)
        rows = min(paging.num_blocks // each, paging.rows)
        table = self._empty_table()
        table[:rows, :each] = torch.arange(rows * each, dtype=torch.int32).view(rows, each)
        tokens = min(each * paging.block_size - paging.spare, paging.capacity)
        return Rehearsal(rows, tokens, {BLOCK_TABLE: table})

    def take_counts(self) -> dict[str, int]:
        """Blocks that rows had in common with others, and tokens of prompts that were looked for, and found."""
        counts, self._counts = self._counts, Counter()
        return dict(counts)

    def _needed(self, request: Request) -> int:
        return self._paging.blocks_of(len(request.prompt) + request.max_new_tokens)

    def _keys(self, request: Request) -> list[bytes]:
        """Those of the blocks of its prompt that it may share: its last token is fed by each."""
        if request.scope is None or self._paging.sharing.lookahead is None:
            return []
        if request.block_keys is None:
            request.block_keys = BlockKeys(request.scope, self._paging.block_size, self._paging.sharing.lookahead)
            request.block_keys.extend(request.prompt)
        return request.block_keys.keys[: (len(request.prompt) - 1) // self._paging.block_size]

    def _reads_no_more(self, row: int, key: bytes) -> None:
        if readers := self._readers.get(key):  # what follows the prompt is read by nobody else
            readers.discard(row)
            if not readers:
                del self._readers[key]

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
