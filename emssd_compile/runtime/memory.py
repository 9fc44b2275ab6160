"""What is allocated once, when a model is compiled: the KV caches above all."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from emssd_compile.errors import CapacityError
from emssd_compile.memory import available_memory
from emssd_compile.step.tensor_spec import TensorSpec

CACHES = ("k_cache_", "v_cache_")
"""How the names of the target's own KV caches begin."""

_CACHES, _STATE = "the KV caches", "the rows' own tensors"
_OWNERS = {
    **dict.fromkeys(CACHES, _CACHES),
    "drafter_": "the drafter's own tensors",
    "rule_": "the acceptance rule's own tensors",
    "policy_": "the length policy's own tensors",
    "processor_": "the logits processors' own tensors",
    "probe_": "the probes' own tensors",
}
"""Whose an input of a step is, by how its name begins; those of `StepState` begin with none of these."""

_WORTH_NAMING = 20  # who needs less than this part of all is not worth a word


def allocate(specs: dict[str, TensorSpec], device: torch.device) -> dict[str, Tensor]:
    """Zeroed tensors for `specs`. Raises CapacityError, before it allocates, if they cannot fit into memory."""
    check_room(specs, device)
    return {name: torch.zeros(spec.shape, dtype=spec.dtype, device=device) for name, spec in specs.items()}


def check_room(specs: Mapping[str, TensorSpec], device: torch.device) -> None:
    """Raises CapacityError if inputs of a step do not fit into the memory that is available on a device; says whose."""
    needed: dict[str, int] = {}
    largest: dict[str, tuple[int, str]] = {}
    for name, spec in specs.items():
        prefix = next((prefix for prefix in _OWNERS if name.startswith(prefix)), "")
        owner, size = _OWNERS.get(prefix, _STATE), math.prod(spec.shape) * spec.dtype.itemsize
        needed[owner] = needed.get(owner, 0) + size
        words = "" if owner == _CACHES else f", most of it for {name.removeprefix(prefix)!r} {list(spec.shape)}"
        largest[owner] = max(largest.get(owner, (-1, "")), (size, words))
    total = sum(needed.values())
    large = [owner for owner, size in needed.items() if size * _WORTH_NAMING >= total]
    needs = "; ".join(f"{owner} need {_gib(needed[owner])}{largest[owner][1]}" for owner in large)
    has_parts = not {_CACHES, _STATE}.issuperset(large)
    _check(needs, total, device, ", or with parts that keep less" if has_parts else "")


def check_state(rows: int, capacity: int, device: torch.device) -> None:
    """Raises CapacityError if not even the ids of so many rows and tokens fit into memory; asked before any work.

    What the KV caches need is known later, when the model has been captured.
    """
    needed = rows * capacity * torch.int64.itemsize
    _check(f"max_batch={rows} rows of max_length={capacity} tokens need {_gib(needed)}", needed, device)


def _check(needs: str, needed: int, device: torch.device, or_what: str = "") -> None:
    available = available_memory(device)
    if needed > available:
        raise CapacityError(
            f"{needs}; {device} has {_gib(available)} available: compile with a smaller max_length or "
            f"max_batch{or_what}"
        )


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
