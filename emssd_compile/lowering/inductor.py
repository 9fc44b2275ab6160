"""Lower the step graph through `torch.compile` and Inductor."""

import torch
from torch import Tensor, fx

from emssd_compile.lowering.base import Lowered
from emssd_compile.ops import load_cpu_kernels

_SLOTS = ("token_slots", "logit_slots", "draft_slots")


def lower_inductor(graph_module: fx.GraphModule) -> Lowered:
    """Compile the whole step as one graph, once for all sizes: only the lengths of the slot inputs are symbolic."""
    load_cpu_kernels()
    names = [str(n.target) for n in graph_module.graph.nodes if n.op == "placeholder"]
    dynamic = [names.index(name) for name in _SLOTS]
    compiled = torch.compile(graph_module, fullgraph=True)
    marked = False

    def run(*inputs: Tensor) -> dict[str, Tensor]:
        nonlocal marked
        if not marked:
            for index in dynamic:
                torch._dynamo.mark_dynamic(inputs[index], 0)
            marked = True
        result: dict[str, Tensor] = compiled(*inputs)
        return result

    return Lowered(run, fit=lambda size: max(size, 2))  # compilers specialise on a size of 1
