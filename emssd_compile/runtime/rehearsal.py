"""Steps that decode for nobody: to compile, to capture and to measure."""

from __future__ import annotations

import statistics
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch

from emssd_compile.runtime.buckets import Sizes
from emssd_compile.runtime.launch import Launcher

CONTEXT = 1024  # tokens that each row holds, if it has room for twice as many
RUNS = 3


class Rehearsal:
    """Runs steps in which every row decodes, half full, or none does.

    Args:
        launcher: its tensors are given back as they were, all but the KV caches.
        num_draft_tokens: K.
    """

    def __init__(self, launcher: Launcher, num_draft_tokens: int) -> None:
        self._launcher = launcher
        rows, capacity = launcher.tensors["history"].shape
        context = min(CONTEXT, capacity // 2)
        self._state = {
            name: launcher.upload(torch.full((rows,), value))
            for name, value in {
                "lengths": context,
                "known": context + 1,
                "draft_lengths": max(min(num_draft_tokens, capacity - context - 1), 0),
                "active": True,
                "limits": capacity,
            }.items()
        }

    def step(self, sizes: Sizes) -> None:
        """Run one step, and wait until it is done."""
        for name, value in self._state.items():
            self._launcher.assign(name, value)
        self._launcher.launch(sizes).read()

    def idle_seconds(self, tokens: int) -> float:
        """Seconds of a step of so many tokens that belong to no row: the median of some runs, the first left out.

        No context is read, so what is measured depends on the number of tokens alone.
        """
        active = self._launcher.tensors["active"]
        self._launcher.assign("active", torch.zeros_like(active))
        sizes = Sizes(tokens, tokens, 2 * min(tokens, len(active)))
        return statistics.median([self._timed(sizes) for _ in range(RUNS + 1)][1:])

    def _timed(self, sizes: Sizes) -> float:
        started = time.perf_counter()
        self._launcher.launch(sizes).read()
        return time.perf_counter() - started


@contextmanager
def rehearse(launcher: Launcher, kept: Collection[str], num_draft_tokens: int) -> Iterator[Rehearsal]:
    """A rehearsal, after which the `kept` tensors are as they were before."""
    before = {name: launcher.tensors[name].clone() for name in kept}
    try:
        yield Rehearsal(launcher, num_draft_tokens)
    finally:
        for name, value in before.items():
            launcher.assign(name, value)
