"""CUDA graphs and copies behind the host's back, played on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

HOST_READS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default}


class TapeDevice:
    """What `GraphLauncher` needs of a device, at its worst: it reads and writes fixed addresses, and copies late.

    Attributes:
        captures: how often something was captured.
        replays: how often a capture was replayed.
        reports: how many reports were sent to the host; the test may reset it.
    """

    def __init__(self) -> None:
        self.captures = self.replays = self.reports = 0

    def capture(self, work: Callable[[], object]) -> Callable[[], object]:
        """Run `work`, then record its ops on the very tensors they read and wrote."""
        work()
        tape = _Tape()
        with tape:
            work()
        tape.undo()
        self.captures += 1

        def replay() -> None:
            self.replays += 1
            tape.replay()

        return replay

    def upload(self, value: Tensor) -> Tensor:
        """A copy."""
        return value.clone()

    def download(self, value: Tensor) -> tuple[Tensor, Callable[[], object]]:
        """A copy that is made no sooner than the host waits for it."""
        self.reports += 1
        assert self.reports < 1000, "the steps do not get anywhere"
        host = torch.full(value.shape, -1, dtype=value.dtype)
        return host, lambda: host.copy_(value)


class _Tape(TorchDispatchMode):
    """The ops that were called, with the tensors they took and gave."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Callable[..., object], tuple[Any, ...], dict[str, Any], object]] = []
        self._made: set[int] = set()
        self._before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func not in HOST_READS, f"{func} cannot be captured"
        kwargs = kwargs or {}
        for storage in _storages((args, kwargs)):
            if storage.data_ptr() not in self._made and storage.data_ptr() not in self._before:
                self._before[storage.data_ptr()] = (storage, storage.clone())
        result = func(*args, **kwargs)
        self._made.update(s.data_ptr() for s in _storages(result) if s.data_ptr() not in self._before)
        self._calls.append((func, args, kwargs, result))
        return result

    def undo(self) -> None:
        """Recording runs nothing: put what lay outside back to what it was."""
        for storage, before in self._before.values():
            storage.copy_(before)

    @torch.no_grad()
    def replay(self) -> None:
        """Do it again, on the same memory."""
        for func, args, kwargs, recorded in self._calls:
            for old, new in zip(tree_leaves(recorded), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, Tensor) and old.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():
                    old.copy_(new)


def _storages(values: object) -> Iterator[torch.UntypedStorage]:
    return (leaf.untyped_storage() for leaf in tree_leaves(values) if isinstance(leaf, Tensor))
