"""Where the keys and values of a step lie."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from emssd_compile.errors import OptionError
from emssd_compile.options import CompileOptions
from emssd_compile.runtime.memory import plan_pool, plan_rings
from emssd_compile.step.paging import DRAFTER, Paging, own_reading, sharing_of
from emssd_compile.step.rings import Rings

if TYPE_CHECKING:
    from emssd_compile.compiler import CompiledStep

_HELD = ("row", "memory", "host", "option", "state", "setting")
"""Roles of what is allocated beside keys and values."""


@dataclass(frozen=True)
class Placement:
    """The caches that are not slabs, and what all hold.

    Attributes:
        rings: those that keep a window.
        paging: those that lie in a pool.
        is_packed: whether keys and values are in 8 bits.
    """

    rings: Rings | None = None
    paging: Paging | None = None
    is_packed: bool = False

    def of(self, step: CompiledStep) -> CompiledStep:
        """The step as it finds keys and values where they are."""
        return (step.packed() if self.is_packed else step).placed(self.rings, self.paging)


def place(
    step: CompiledStep, options: CompileOptions, device: torch.device, before: Placement | None = None
) -> Placement:
    """Find where the caches of a step shall lie.

    Args:
        step: with slabs.
        options: what is asked for.
        device: where they will be.
        before: where they are, if they are there already. Slabs then stay slabs, as they take the memory that would be
            found missing, and a pool stays as large as it is.

    Raises:
        OptionError: prefixes shall be cached, and the drafter's cannot be; or the pool holds no row.
        MemoryError: as `runtime.memory.plan_pool`.
    """
    was, is_packed = before or Placement(), options.kv_dtype is not None
    step = step.packed() if is_packed else step
    rings = _rings(step, options, device, was) if before is None or was.rings else None
    paging = _pool(step.placed(rings), options, device, was, rings) if before is None or was.paging else None
    return Placement(rings, paging, is_packed)


def _rings(step: CompiledStep, options: CompileOptions, device: torch.device, was: Placement) -> Rings | None:
    """The caches that keep a window; None if none does, as where all is asked to be in slabs or in a pool."""
    if options.memory != "auto" or options.asks_for_pool:
        return None
    signature = step.signature(step.graph_module.graph)
    return plan_rings(
        step.reaches(),
        signature.specs("cache"),
        signature.specs(*_HELD),
        device,
        num_new=options.chunk(step.drafter.num_draft_tokens),
        is_asked_for=was.rings is not None,
    )


def _pool(
    step: CompiledStep, options: CompileOptions, device: torch.device, was: Placement, rings: Rings | None
) -> Paging | None:
    """The pool that keys and values are in, but for rings; None if each row has a slab."""
    if options.memory == "slab":
        return None
    signature, drafter = step.signature(step.graph_module.graph), step.drafter
    held = signature.specs("cache", "ring", *_HELD)
    # A drafter that reads by itself would write to blocks that are shared: it reads into slabs.
    stays = options.prefix_cache and own_reading(drafter)
    slabs = {name: held.pop(name) for name in step.pageable() if not (stays and name.startswith(DRAFTER))}
    stay = [name for name in signature.with_role("cache") if name not in slabs]
    keeps, has_rings = options.prefix_cache, rings is not None
    sharing = sharing_of(drafter, signature.sizes.depth, slabs, stay, keeps=keeps, has_rings=has_rings)
    if options.prefix_cache and sharing.why_not:
        raise OptionError(f"prefix_cache=True: {sharing.why_not}; leave it out, or use another drafter")
    if was.paging is not None:
        return replace(was.paging, caches=(*slabs,), sharing=sharing)
    return plan_pool(
        slabs,
        held,
        options.max_length,
        device,
        kv_tokens=options.kv_tokens,
        is_asked_for=options.asks_for_pool,
        sharing=sharing,
    )
