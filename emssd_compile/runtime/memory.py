"""What is allocated once, when a model is compiled: the KV caches above all."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from emssd_compile.errors import CapacityError
from emssd_compile.memory import available_memory
from emssd_compile.step.tensor_spec import TensorSpec


def allocate(specs: dict[str, TensorSpec], device: torch.device) -> dict[str, Tensor]:
    """Zeroed tensors for `specs`. Raises CapacityError, before it allocates, if they cannot fit into memory."""
    check_room(specs.values(), device)
    return {name: torch.zeros(spec.shape, dtype=spec.dtype, device=device) for name, spec in specs.items()}


def check_room(specs: Iterable[TensorSpec], device: torch.device) -> None:
    """Raises CapacityError if tensors of these shapes do not fit into the memory that is available on a device."""
    _check("the KV caches need", sum(math.prod(spec.shape) * spec.dtype.itemsize for spec in specs), device)


def check_state(rows: int, capacity: int, device: torch.device) -> None:
    """Raises CapacityError if not even the ids of so many rows and tokens fit into memory; asked before any work.

    What the KV caches need is known later, when the model has been captured.
    """
    _check(
        f"max_batch={rows} rows of max_length={capacity} tokens need", rows * capacity * torch.int64.itemsize, device
    )


def _check(what: str, needed: int, device: torch.device) -> None:
    available = available_memory(device)
    if needed > available:
        raise CapacityError(
            f"{what} {needed / 2**30:.1f} GiB and {device} has {available / 2**30:.1f} GiB available; compile with a "
            "smaller max_length or max_batch"
        )
