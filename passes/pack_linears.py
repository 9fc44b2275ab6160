"""Multiply with packed weights on a CPU."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, fx

from emssd_compile.memory import available_memory
from emssd_compile.ops import packed_linear
from emssd_compile.passes.fuse_projections import find_projections
from emssd_compile.passes.graph import argument, aten, attribute, call
from emssd_compile.passes.manager import Refusal


class PackLinears:
    """Have oneDNN multiply with weights in the blocked layout that suits the machine, those of one input as one.

    The few tokens of a decoding step make a matrix product as fast as its weight streams in, and a row-major weight
    streams badly. The packed weight is a second copy, made when the step first runs (see `emssd::packed_linear`). As it
    is a copy anyway, it holds the Q/K/V and the gate/up projections side by side: one product has less overhead than
    three. The weights themselves stay where they are.

        before:  %y[T,N] = linear(%x[T,M], %weight[N,M], %bias)
        after:   %y[T,N] = emssd.packed_linear(%x[T,M], [%weight[N,M], %bias], 1)

        before:  %q = linear(%x, %wq); %k = linear(%x, %wk); %v = linear(%x, %wv)
        after:   %y = emssd.packed_linear(%x, [%wq, %wk, %wv], 3); %q, %k, %v = split_with_sizes(%y, [...], -1)
    """

    name = "pack_linears"

    def __init__(self) -> None:
        self.refusals: list[Refusal] = []

    def run(self, graph_module: fx.GraphModule) -> int:
        """Replace linear layers by packed ones; returns how many.

        None are, if the copies would take more than half of the memory available.
        """
        self.refusals = []
        graph = graph_module.graph
        sites = [node for node in graph.nodes if node.target == aten.linear.default]
        packable = {node: None for node in sites if self._is_packable(graph_module, node)}
        needed = _bytes(attribute(graph_module, argument(node, 1)) for node in packable)
        if packable and needed > available_memory(torch.device("cpu")) // 2:
            site = next(iter(packable))
            self._refuse(site, f"packed copies need {needed >> 20} MiB, more than half of what is available")
            return 0
        for group in find_projections(graph_module, self.refusals):
            if all(node in packable for node in group.nodes):
                with graph.inserting_before(group.nodes[0]):
                    source = argument(group.nodes[0], 0)
                    parameters = [*group.weights, *group.biases]
                    group.replace(call(graph, packed_linear, source, parameters, len(group.weights)))
                for node in group.nodes:
                    del packable[node]
                    graph.erase_node(node)
        for node in packable:
            source, weight, bias = (*node.args, None)[:3]
            node.target, node.args = packed_linear, (source, [weight] if bias is None else [weight, bias], 1)
        return len(sites) - len([n for n in graph.nodes if n.target == aten.linear.default])

    def _is_packable(self, graph_module: fx.GraphModule, node: fx.Node) -> bool:
        source = node.args[1]
        if not isinstance(source, fx.Node) or source.op != "get_attr":
            return self._refuse(node, "its weight is computed")
        weight = attribute(graph_module, source)
        if weight.device.type != "cpu":
            return self._refuse(node, f"its weight is on {weight.device.type}")
        if weight.dtype not in _packable_dtypes() or weight.dim() != 2:
            return self._refuse(node, f"a weight of {weight.dtype} {list(weight.shape)} is not packed")
        return True

    def _refuse(self, node: fx.Node, reason: str) -> bool:
        self.refusals.append(Refusal(node.name, reason))
        return False


def _packable_dtypes() -> tuple[torch.dtype, ...]:
    """What oneDNN multiplies on this machine."""
    return (torch.float32, torch.bfloat16) if torch.ops.mkldnn._is_mkldnn_bf16_supported() else (torch.float32,)


def _bytes(weights: Iterable[Tensor]) -> int:
    """What copies of the weights take; a weight that is used twice is packed once."""
    return sum({w.data_ptr(): w.numel() * w.element_size() for w in weights}.values())
