"""What is allocated once, when a model is compiled: the KV caches above all, as slabs, rings or a pool of blocks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from emssd_compile.errors import CapacityError, OptionError
from emssd_compile.memory import available_memory
from emssd_compile.ops._packed_kv import DTYPE as PACKED
from emssd_compile.step.paging import BLOCK_SIZE, DRAFTER, Paging, Sharing, check_kv_tokens
from emssd_compile.step.rings import Rings
from emssd_compile.step.signature import KV_ROLES, Signature
from emssd_compile.step.tensor_spec import TensorSpec

CACHES = ("k_cache_", "v_cache_")
"""How the names of the target's own KV caches begin."""

_CACHES, _STATE = "the KV caches", "the rows' own tensors"
_OWNERS = {
    **dict.fromkeys(CACHES, _CACHES),
    DRAFTER: "the drafter's own tensors",
    "rule_": "the acceptance rule's own tensors",
    "policy_": "the length policy's own tensors",
    "processor_": "the logits processors' own tensors",
    "probe_": "the probes' own tensors",
}
"""Whose an input of a step is, by how its name begins; those of `StepState` begin with none of these."""

_WORTH_NAMING = 20  # who needs less than this part of all is not worth a word
_POOL_SHARE = 2
"""A pool whose size nobody says takes one part in so many of the memory available, with what is allocated beside it."""


def plan_rings(
    reaches: Mapping[str, int],
    slabs: Mapping[str, TensorSpec],
    others: Mapping[str, TensorSpec],
    device: torch.device,
    *,
    num_new: int,
    is_asked_for: bool = False,
) -> Rings | None:
    """The caches that take less memory if they keep a window only; None if slabs are to be kept.

    On a GPU they are kept if they fit into memory: the fastest form of attention there knows nothing else.

    Args:
        reaches: how many tokens are seen of each cache whose attention sees no further.
        slabs: all caches as they are if they keep everything, `[B, C, ...]` each, or with more slots.
        others: what else is allocated beside them.
        device: where all of it is.
        num_new: the most tokens of a row in one step.
        is_asked_for: whether rings are to be had even if slabs fit.
    """
    needed = sum(map(_bytes, (*slabs.values(), *others.values())))
    if device.type != "cpu" and not is_asked_for and needed <= available_memory(device):
        return None
    every = Rings(reaches, num_new, BLOCK_SIZE)
    smaller = {name: seen for name, seen in reaches.items() if every.size(name) < slabs[name].shape[1]}
    return replace(every, reaches=smaller) if smaller else None


def plan_pool(
    slabs: Mapping[str, TensorSpec],
    others: Mapping[str, TensorSpec],
    capacity: int,
    device: torch.device,
    *,
    kv_tokens: int | None,
    is_asked_for: bool,
    sharing: Sharing,
) -> Paging | None:
    """The pool of blocks in the place of slabs; None if slabs are to be kept, since they fit into memory.

    Args:
        slabs: the caches that may be paged, `[B, C, ...]` each or with more slots, for trees of drafts.
        others: what else is allocated beside them.
        capacity: C.
        device: where all of it is.
        kv_tokens: tokens that the pool is to hold; None for a share of the memory that is available.
        is_asked_for: whether it is to be a pool even if slabs fit.
        sharing: as in `Paging`.

    Raises:
        OptionError: `kv_tokens` has no room for a single request.
        CapacityError: nor has that share.
    """
    needed = sum(map(_bytes, (*slabs.values(), *others.values())))
    if not slabs and is_asked_for:
        raise OptionError(
            'no cache of this step can be in a pool: its drafter uses them all in ways of its own; pass memory="slab"'
        )
    if not slabs or not (is_asked_for or needed > available_memory(device)):
        return None
    rows, spare = next(iter(slabs.values())).shape[0], max(spec.shape[1] for spec in slabs.values()) - capacity
    whole = Paging(0, rows, capacity, max(spare, 0), sharing, BLOCK_SIZE, tuple(slabs))
    most = rows * whole.row_blocks
    if kv_tokens is not None:
        check_kv_tokens(kv_tokens, whole.spare, BLOCK_SIZE)
        return replace(whole, num_blocks=min(-(-kv_tokens // BLOCK_SIZE), most))
    of_block = sum(_bytes(spec) // (spec.shape[0] * spec.shape[1]) for spec in slabs.values()) * BLOCK_SIZE
    room = available_memory(device) // _POOL_SHARE - sum(map(_bytes, others.values()))
    if room < whole.blocks_of(2) * of_block:
        check_room(others, device)
        raise CapacityError(
            f"the KV caches of one short request need {_gib(whole.blocks_of(2) * of_block)}, and {device} has "
            f"{_gib(max(room, 0))} to spare for them: compile with a smaller max_length or max_batch"
        )
    return replace(whole, num_blocks=min(room // of_block, most))


def describe(signature: Signature, paging: Paging | None = None, rings: Rings | None = None) -> str:
    """Where keys and values are and how much memory that takes, in a few words."""
    taken = {role: sum(map(_bytes, signature.specs(role).values())) for role in KV_ROLES}
    sizes, said = signature.sizes, []
    if paging is not None:
        pool = f"a pool of {paging.num_blocks} blocks of {paging.block_size} tokens, {paging.num_tokens} in all for "
        said.append(f"{pool}{sizes.rows} rows of up to {sizes.capacity}, {_gib(taken['pool'])}")
    if taken["cache"] or not (paging or rings):
        said.append(f"slabs of {sizes.capacity} tokens for each of {sizes.rows} rows, {_gib(taken['cache'])}")
    if rings is not None:
        slots = " or ".join(map(str, sorted({rings.size(name) for name in rings.reaches})))
        ring = f"rings of {slots} slots for each of {sizes.rows} rows in layers that see no further than a window"
        said.append(f"{ring}, {_gib(taken['ring'])}")
    text = "; and ".join(said)
    if any(spec.dtype == PACKED for spec in signature.specs(*KV_ROLES).values()):
        text += ", in 8 bits, which is lossy"
    if paging is None:
        return text
    sharing = paging.sharing
    if sharing.why_not:
        return f"{text}; texts that begin alike share nothing: {sharing.why_not}"
    return f"{text}; what is read is kept for requests to come" if sharing.keeps else text


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
        owner, size = _OWNERS.get(prefix, _STATE), _bytes(spec)
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


def _bytes(spec: TensorSpec) -> int:
    return math.prod(spec.shape) * spec.dtype.itemsize


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**29 else f"{size / 2**20:.1f} MiB"
