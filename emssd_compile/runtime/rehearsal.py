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
    """Runs steps in which every row decodes, half full, so that they cost what they will cost.

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

    def seconds(self, tokens: int) -> float:
        """Seconds of a step of so many tokens: the median of some runs, behind one that is not counted."""
        rows = len(self._state["known"])
        sizes = Sizes(tokens, tokens, 2 * min(tokens, rows))
        self.step(sizes)
        return statistics.median(self._timed(sizes) for _ in range(RUNS))

    def _timed(self, sizes: Sizes) -> float:
        started = time.perf_counter()
        self.step(sizes)
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
