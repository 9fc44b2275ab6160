"""Put an engine together from a lowered step and what its signature says."""

from __future__ import annotations

import torch
from torch import Tensor

from emssd_compile.layouts import PackedLayout
from emssd_compile.lowering import StepFunction
from emssd_compile.ops.triton.selection import standard_forms
from emssd_compile.runtime.buckets import StepSizes
from emssd_compile.runtime.engine import Engine
from emssd_compile.runtime.launch import make_launcher
from emssd_compile.runtime.memory import allocate
from emssd_compile.step.signature import Signature
from emssd_compile.step.state import StepState


def assemble(
    step: StepFunction,
    signature: Signature,
    device: torch.device,
    layout: PackedLayout,
    *,
    prefill_chunk: int,
    deterministic: bool = False,
    buckets: tuple[StepSizes, ...] = (),
) -> Engine:
    """An engine that drives `step`, with all tensors that travel from step to step allocated on `device`.

    Args:
        step: runs a step.
        signature: its bindings.
        device: where it runs.
        layout: how much room a step gives to drafts.
        prefill_chunk: most packed tokens of a step.
        deterministic: whether the sizes of steps, and the kernels that run them, depend on nothing but the requests.
        buckets: sizes that are captured, where the device captures any.

    Raises:
        CapacityError: the KV caches, or what a part keeps, do not fit into memory.
    """
    tensors = allocate(own_tensors(signature), device)  # first: the caches may not fit
    state = StepState.empty(signature.sizes, device)
    names = [binding.name for binding in signature.inputs]
    run = _without_clock(step) if deterministic else step
    launcher = make_launcher(run, names, {**state.tensors(), **tensors}, buckets)
    lag = 0 if device.type == "cpu" else 1
    return Engine(
        launcher,
        signature,
        layout,
        prefill_chunk=prefill_chunk,
        lag=lag,
        deterministic=deterministic,
    )


def _without_clock(step: StepFunction) -> StepFunction:
    def run(*inputs: Tensor) -> dict[str, Tensor]:
        with standard_forms():
            return step(*inputs)

    return run
