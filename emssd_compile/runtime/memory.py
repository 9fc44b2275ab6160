"""What is allocated once, when a model is compiled: the KV caches above all."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from emssd_compile.errors import CapacityError
from emssd_compile.memory import available_memory
from emssd_compile.step.drafting import TensorSpec


def allocate(specs: dict[str, TensorSpec], device: torch.device) -> dict[str, Tensor]:
    """Zeroed tensors for `specs`. Raises CapacityError, before it allocates, if they cannot fit into memory."""
    check_room(specs.values(), device)
    return {name: torch.zeros(spec.shape, dtype=spec.dtype, device=device) for name, spec in specs.items()}


def check_room(specs: Iterable[TensorSpec], device: torch.device) -> None:
    """Raises CapacityError if tensors of these shapes do not fit into the memory that is available on a device."""
    needed = sum(math.prod(spec.shape) * spec.dtype.itemsize for spec in specs)
    available = available_memory(device)
    if needed > available:
        raise CapacityError(
            f"the KV caches need {needed / 2**30:.1f} GiB and {device} has {available / 2**30:.1f} GiB available; "
            "compile with a smaller max_length or max_batch"
        )
