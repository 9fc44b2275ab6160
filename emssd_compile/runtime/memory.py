"""What is allocated once, when a model is compiled: the KV caches above all."""

from __future__ import annotations

import math
import os
from pathlib import Path

import torch
from torch import Tensor

from emssd_compile.errors import CapacityError
from emssd_compile.step.drafting import TensorSpec


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
    needed = sum(math.prod(spec.shape) * spec.dtype.itemsize for spec in specs.values())
    if device.type == "cuda":
        held = torch.cuda.mem_get_info(device)[0]
    else:
        held = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > held:
        raise CapacityError(
            f"the KV caches need {needed / 2**30:.1f} GiB and {device} has {held / 2**30:.1f} GiB; compile with a "
            "smaller max_length or max_batch"
        )
    return {name: torch.zeros(spec.shape, dtype=spec.dtype, device=device) for name, spec in specs.items()}
