"""Pools of small blocks, watched: whoever reads what is not his reads NaN."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest

from emssd_compile.optimized_model import OptimizedModel
from emssd_compile.runtime import memory
from emssd_compile.runtime.blocks import BlockPool
from emssd_compile.runtime.pages import Pages
from tests.exactness.compiled import CAPACITY


@contextmanager
def watched_pools(monkeypatch: pytest.MonkeyPatch, block_size: int) -> Iterator[None]:
    """Blocks are small; what is given back, or out again, is NaN at once, so that whoever still reads it shows.

    All is given back in the end.
    """
    monkeypatch.setattr(memory, "BLOCK_SIZE", block_size)
    pools: list[tuple[Pages, BlockPool]] = []
    begin, prepare, release, evict = Pages.__init__, Pages.prepare, Pages.release, BlockPool._evict

    def watch(self, *arguments) -> None:
        begin(self, *arguments)
        pools.append((self, self._pool))
        self.tensors = {}

    def look(self, launcher, tokens) -> None:
        prepare(self, launcher, tokens)
        self.tensors = {name: launcher.tensors[name] for name in self._signature.with_role("pool")}

    def poison(self, row: int) -> None:
        held = self._held[row].blocks
        release(self, row)
        for block in held:
            if self._pool.owners(block) == 0 and block not in self._pool._keys:
                spoil(self, block)

    def poison_evicted(self) -> int:
        block = evict(self)
        spoil(next(pages for pages, pool in pools if pool is self), block)
        return block

    def spoil(pages, block: int) -> None:
        for pool in pages.tensors.values():
            pool[block] = math.nan

    for name, method in (("__init__", watch), ("prepare", look), ("release", poison)):
        monkeypatch.setattr(Pages, name, method)
    monkeypatch.setattr(BlockPool, "_evict", poison_evicted)
    yield
    for pages, pool in pools:
        assert pool.num_free == pool.num_open == pool.num_blocks
        assert pages._table.eq(-1).all()


def paged(fast: OptimizedModel, kv_tokens: int | None = None, *, prefix_cache: bool = False) -> OptimizedModel:
    """The same step on a pool of blocks: for so many tokens, else for as many as rows can hold."""
    kv_tokens = kv_tokens or fast.options.max_batch * (CAPACITY + 128)
    options = replace(fast.options, memory="paged", kv_tokens=kv_tokens, prefix_cache=prefix_cache)
    return OptimizedModel(fast.model, fast._step, options)
