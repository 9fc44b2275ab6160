"""How much memory decoding takes beyond the weights and the KV cache."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from emssd_compile import OptimizedModel
from emssd_compile.freshness import plain_tensors
from emssd_compile.runtime.memory import CACHES

_PROCESS = Path("/proc/self")


@dataclass(frozen=True)
class Memory:
    """Attributes are in bytes.

    Attributes:
        weights: of the model.
        kv: of the KV caches.
        peak: the most that was held at once.
    """

    weights: int
    kv: int
    peak: int

    @property
    def over_needed(self) -> float:
        """Peak over weights and KV caches; 1 is the best there is."""
        return self.peak / (self.weights + self.kv)


def weight_bytes(model: nn.Module) -> int:
    """Bytes of the parameters; of quantised ones, of the tensors that they are made of."""
    return sum(tensor.nbytes for parameter in model.parameters() for tensor in plain_tensors(parameter))


def kv_bytes(fast: OptimizedModel) -> int:
    """Bytes of the KV caches of all layers, as they are allocated: slabs or a pool."""
    return sum(held.nbytes for name, held in fast._engine.tensors.items() if name.startswith(CACHES))


def peak_memory(fast: OptimizedModel, work: Callable[[], object]) -> Memory | None:
    """Memory while `work` decodes with `fast`, which should be the only thing on its GPU; `work` runs once before.

    On CUDA the peak is what torch had allocated, CUDA graphs included. On a CPU, where a process holds much else, it is
    weights and KV cache and what the resident set grew by. `None` where the system does not tell (Linux does).
    """
    weights, kv = weight_bytes(fast.model), kv_bytes(fast)
    work()
    if fast.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(fast.device)
        work()
        return Memory(weights, kv, torch.cuda.max_memory_allocated(fast.device))
    try:
        before = start_peak()  # what the first run gave back would else not be counted again
        work()
        return Memory(weights, kv, weights + kv + max(resident("VmHWM") - before, 0))
    except (OSError, AttributeError):  # no procfs, no glibc
        return None


def start_peak() -> int:
    """Give back what is free and have the peak of the resident set start anew (proc(5)); the bytes that are left.

    Raises:
        OSError, AttributeError: the system is not Linux with glibc.
    """
    ctypes.CDLL(None).malloc_trim(0)
    (_PROCESS / "clear_refs").write_text("5")
    return resident("VmRSS")


def resident(field: str) -> int:
    """Bytes of `VmRSS`, the resident set, or `VmHWM`, its peak."""
    lines = (_PROCESS / "status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":")) * 1024
