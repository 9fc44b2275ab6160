"""Steps that decode for nobody: to compile, to capture and to measure."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import partial

import torch

from emssd_compile.runtime.buckets import StepSizes, decode_sizes
from emssd_compile.runtime.kv_memory import KVMemory
from emssd_compile.runtime.launch import Launcher

CONTEXT = 1024  # tokens that each row holds, if it has room for twice as many
ROUNDS = 2, 4  # fewest and most
ENOUGH_SECONDS = 0.5  # after which there are no more than the fewest: what disturbs a step is little beside a long one


class DryRun:
    """Runs steps in which every row that memory has room for decodes, half full, or none does.

    Args:
        launcher: its tensors are given back as they were, all but the KV caches.
        memory: where rows keep keys and values.
        num_draft_tokens: K.
        max_depth: D, where drafts are trees; None for chains.
    """

    def __init__(self, launcher: Launcher, memory: KVMemory, num_draft_tokens: int, max_depth: int | None) -> None:
        self._launcher = launcher
        rows, _ = launcher.tensors["history"].shape
        self._sizes = partial(decode_sizes, num_rows=rows, num_draft_tokens=num_draft_tokens, max_depth=max_depth)
        given = memory.rehearsal()
        context = min(CONTEXT, given.tokens // 2)
        values = {
            "lengths": context,
            "known": context + 1,
            "draft_lengths": max(min(num_draft_tokens, given.tokens - context - 1), 0),
            "limits": given.tokens,
        }
        state = {name: torch.full((rows,), value) for name, value in values.items()}
        state |= {"active": torch.arange(rows) < given.rows, **given.tensors}
        self._state = {name: launcher.upload(value) for name, value in state.items()}

    def decode(self, tokens: int) -> None:
        """Run one step of so many packed tokens, and wait until it is done."""
        self.step(self._sizes(tokens))

    def step(self, sizes: StepSizes) -> None:
        """Run one step, and wait until it is done."""
        for name, value in self._state.items():
            self._launcher.assign(name, value)
        self._launcher.launch(sizes).read()

    def idle_seconds(self, tokens: Collection[int]) -> dict[int, float]:
        """Seconds of steps of so many tokens that belong to no row, by the number of tokens.

        No context is read, so they depend on the number of tokens alone. Sizes take turns and the least time counts:
        what disturbs a step only makes it longer. The first round is left out.
        """
        active = self._launcher.tensors["active"]
        self._launcher.assign("active", torch.zeros_like(active))
        sizes = {count: self._sizes(count) for count in tokens}
        fewest, most = ROUNDS
        rounds: list[dict[int, float]] = []
        started = time.perf_counter()
        while len(rounds) <= fewest or (len(rounds) <= most and time.perf_counter() - started < ENOUGH_SECONDS):
            rounds.append({count: self._timed(size) for count, size in sizes.items()})
        return {count: min(seconds[count] for seconds in rounds[1:]) for count in sizes}

    def _timed(self, sizes: StepSizes) -> float:
        started = time.perf_counter()
        self._launcher.launch(sizes).read()
        return time.perf_counter() - started


@contextmanager
def dry_run(
    launcher: Launcher, memory: KVMemory, kept: Collection[str], num_draft_tokens: int, max_depth: int | None
) -> Iterator[DryRun]:
    """A dry run, after which the `kept` tensors are as they were before."""
    before = {name: launcher.tensors[name].clone() for name in kept}
    launcher.rows_in_use = len(launcher.tensors["history"])
    try:
        yield DryRun(launcher, memory, num_draft_tokens, max_depth)
    finally:
        for name, value in before.items():
            launcher.assign(name, value)
