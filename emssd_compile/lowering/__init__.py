"""Lowering: from the step graph to something that runs fast. To add a backend: one function, one line in `BACKENDS`."""

from collections.abc import Callable

from torch import Tensor, fx

from emssd_compile.lowering.eager import lower_eager
from emssd_compile.lowering.inductor import lower_inductor

Step = Callable[..., dict[str, Tensor]]
"""A lowered step: takes the graph's inputs in order, returns its outputs by name."""

BACKENDS: dict[str, Callable[[fx.GraphModule], Step]] = {"eager": lower_eager, "inductor": lower_inductor}

__all__ = ["BACKENDS", "Step", "lower_eager", "lower_inductor"]
