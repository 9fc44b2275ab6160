"""Lower the step graph through `torch.compile` and Inductor."""

from collections.abc import Callable

import torch
from torch import Tensor, fx

from emssd_compile.ops import source_hash

_SLOTS = ("token_slots", "logit_slots", "draft_slots")


def lower_inductor(graph_module: fx.GraphModule) -> Callable[..., dict[str, Tensor]]:
    """Compile the whole step as one graph, once for all sizes.

    Only the lengths of the slot inputs vary. They are marked unbacked, not just dynamic: the compiler then may assume
    nothing about them, so a length of 1, or two lengths that happen to be equal, does not compile anything anew.
    """
    names = [str(n.target) for n in graph_module.graph.nodes if n.op == "placeholder"]
    slots = [names.index(name) for name in _SLOTS]
    compiled = torch.compile(graph_module, fullgraph=True)
    # Inductor's cache on disk does not look into custom ops: it would serve a graph compiled for an older form of ours.
    cache_tag = f"emssd-{source_hash()}"

    def step(*inputs: Tensor) -> dict[str, Tensor]:
        for index in slots:
            if not hasattr(inputs[index], "_dynamo_unbacked_indices"):
                torch._dynamo.decorators.mark_unbacked(inputs[index], 0)
        with torch.compiler.config.patch(cache_key_tag=cache_tag):  # type: ignore[attr-defined]  # added at run time
            result: dict[str, Tensor] = compiled(*inputs)
        return result

    return step
