"""What is allocated once, when a model is compiled: the KV caches above all."""

from __future__ import annotations

import math
import os
from pathlib import Path

import torch
from torch import Tensor

from emssd_compile.errors import CapacityError
from emssd_compile.step.tensor_spec import TensorSpec


def available(device: torch.device) -> int:
    """Bytes of memory that can be taken now, without what others hold."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        with Path("/proc/meminfo").open() as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):  # not Linux
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def allocate(specs: dict[str, TensorSpec], device: torch.device) -> dict[str, Tensor]:
    """Zeroed tensors for `specs`. Raises CapacityError, before it allocates, if they cannot fit into memory."""
    _check("the KV caches need", sum(math.prod(spec.shape) * spec.dtype.itemsize for spec in specs.values()), device)
    return {name: torch.zeros(spec.shape, dtype=spec.dtype, device=device) for name, spec in specs.items()}


def check_state(rows: int, capacity: int, device: torch.device) -> None:
    """Raises CapacityError if not even the ids of so many rows and tokens fit into memory; asked before any work.

    What the KV caches need is known later, when the model has been captured.
    """
    _check(
        f"max_batch={rows} rows of max_length={capacity} tokens need", rows * capacity * torch.int64.itemsize, device
    )


def _check(what: str, needed: int, device: torch.device) -> None:
    if device.type == "cuda":
        held = torch.cuda.mem_get_info(device)[0]
    else:
        held = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > held:
        raise CapacityError(
            f"{what} {needed / 2**30:.1f} GiB and {device} has {held / 2**30:.1f} GiB; compile with a "
            "smaller max_length or max_batch"
        )
