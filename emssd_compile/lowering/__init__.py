"""Lowering: from the step graph to something that runs fast. To add a backend: one function, one line in `BACKENDS`."""

from collections.abc import Callable

from torch import Tensor, fx

from emssd_compile.lowering.eager import lower_eager
from emssd_compile.lowering.inductor import lower_inductor

BACKENDS: dict[str, Callable[[fx.GraphModule], Callable[..., dict[str, Tensor]]]] = {
    "eager": lower_eager,
    "inductor": lower_inductor,
}
"""Each takes a step graph and returns what runs it: inputs in order, outputs by name."""

__all__ = ["BACKENDS", "lower_eager", "lower_inductor"]
