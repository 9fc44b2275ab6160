"""Run the step graph op by op."""

from torch import fx

from emssd_compile.lowering.base import Lowered
from emssd_compile.ops import load_cpu_kernels


def lower_eager(graph_module: fx.GraphModule) -> Lowered:
    """The graph as it is: nothing to wait for, and what every other backend is compared with."""
    load_cpu_kernels()
    return Lowered(graph_module, fit=lambda size: size)
