"""Lowering: from the step graph to something that runs fast. To add a backend: one file, one line in `BACKENDS`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx

from emssd_compile.lowering import eager, inductor

if TYPE_CHECKING:
    from emssd_compile.passes.manager import Pass

StepFunction = Callable[..., dict[str, Tensor]]
"""What runs a step: inputs in the order of the graph's placeholders, results by name."""


@dataclass(frozen=True)
class Backend:
    """A way to run the step graph.

    Attributes:
        require: raises BackendError if something is missing here that the backend needs for a device; asked before any
            work.
        passes: the rewrites that suit this backend on a device, applied to the step graph.
        lower: `lower(graph_module, deterministic) -> step`, from the rewritten graph to what runs it; if deterministic,
            with kernels that are chosen without a clock.
        is_captured: whether decode steps become one launch each where the device can capture them (CUDA graphs).
    """

    require: Callable[[torch.device], None]
    passes: Callable[[torch.device], tuple[Pass, ...]]
    lower: Callable[[fx.GraphModule, bool], StepFunction]
    is_captured: bool = True


BACKENDS = {
    "eager": Backend(eager.require, eager.passes, eager.lower, is_captured=False),
    "inductor": Backend(inductor.require, inductor.passes, inductor.lower),
}

__all__ = ["BACKENDS", "Backend", "StepFunction"]
