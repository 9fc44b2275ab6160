"""Put an engine together from a lowered step and what its signature says."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from emssd_compile.layouts import PackedLayout
from emssd_compile.lowering import StepFunction
from emssd_compile.ops.triton.selection import standard_forms
from emssd_compile.runtime.buckets import StepSizes
from emssd_compile.runtime.engine import Engine
from emssd_compile.runtime.host_parts import HostParts
from emssd_compile.runtime.kv_memory import KVMemory, Slabs
from emssd_compile.runtime.launch import Variant, make_launcher
from emssd_compile.runtime.memory import allocate
from emssd_compile.runtime.pages import Pages
from emssd_compile.runtime.windows import Windows
from emssd_compile.step.paging import Paging
from emssd_compile.step.parts import Part
from emssd_compile.step.rings import Rings
from emssd_compile.step.signature import KV_ROLES, Signature
from emssd_compile.step.state import StepState
from emssd_compile.step.tensor_spec import TensorSpec


def assemble(
    variant: Variant,
    device: torch.device,
    layout: PackedLayout,
    *,
    prefill_chunk: int,
    deterministic: bool = False,
    buckets: tuple[StepSizes, ...] = (),
    parts: Mapping[str, Part] = MappingProxyType({}),
    paging: Paging | None = None,
    rings: Rings | None = None,
) -> Engine:
    """An engine that drives `step`, with all tensors that travel from step to step allocated on `device`.

    Args:
        variant: the step.
        device: where it runs.
        layout: how much room a step gives to drafts.
        prefill_chunk: most packed tokens of a step.
        deterministic: whether the sizes of steps, and the kernels that run them, depend on nothing but the requests.
        buckets: sizes that are captured, where the device captures any.
        parts: those of the step, by what the names of their inputs begin with; an artifact has none.
        paging: the pool of blocks that the step was made for; None where each row has a slab.
        rings: the caches that the step was made for to keep a window of; None without any.

    Raises:
        CapacityError: the KV caches, or what a part keeps, do not fit into memory.
    """
    tensors = allocate(_own(variant.signature), device)  # first: the caches may not fit
    state = StepState.empty(variant.signature.sizes, device)
    launcher = make_launcher(variant, {**state.tensors(), **tensors}, buckets)
    lag = 0 if device.type == "cpu" else 1
    told = HostParts(launcher, parts)
    memory: KVMemory = Pages(paging, variant.signature) if paging else Slabs(variant.signature)
    if rings:
        memory = Windows(memory, rings)
    return Engine(launcher, memory, layout, told, prefill_chunk=prefill_chunk, lag=lag, deterministic=deterministic)


def make_variant(
    step: StepFunction,
    signature: Signature,
    *,
    deterministic: bool,
    is_capturable: bool = True,
    plain: Variant | None = None,
    drafts: bool = True,
    drafter_remembers: bool = False,
) -> Variant:
    """One form of a step, as launchers run it; the arguments are those of `assemble` and of `Variant`."""
    function = _without_clock(step) if deterministic else step
    return Variant(function, signature, is_capturable, plain, drafts, drafter_remembers)


def switch(engine: Engine, variant: Variant) -> None:
    """Let the engine drive another form of its step, which shares its tensors.

    Raises:
        CapacityError: what only this form has does not fit into memory.
    """
    every = _own(variant.signature, "state")  # of the state, too: a form may hold what drafts are drawn from
    own = {name: spec for name, spec in every.items() if name not in engine.tensors}
    engine.use(variant, allocate(own, engine.tensors["history"].device))


def _own(signature: Signature, *more: str) -> dict[str, TensorSpec]:
    """What is allocated beside `StepState`, and the inputs that have one of more roles."""
    return signature.specs(*KV_ROLES, "table", "row", "memory", "host", "option", *more)


def _without_clock(step: StepFunction) -> StepFunction:
    def run(*inputs: Tensor) -> dict[str, Tensor]:
        with standard_forms():
            return step(*inputs)

    return run
