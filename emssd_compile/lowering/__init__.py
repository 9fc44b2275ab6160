"""Lowering: from the step graph to something that runs fast. To add a backend: one function, one line in `BACKENDS`."""

from collections.abc import Callable

from torch import fx

from emssd_compile.lowering.base import Lowered
from emssd_compile.lowering.eager import lower_eager
from emssd_compile.lowering.inductor import lower_inductor

BACKENDS: dict[str, Callable[[fx.GraphModule], Lowered]] = {"eager": lower_eager, "inductor": lower_inductor}

__all__ = ["BACKENDS", "Lowered", "lower_eager", "lower_inductor"]
