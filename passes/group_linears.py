"""Multiply the few tokens of a step on a CPU."""

from __future__ import annotations

import torch
from torch import fx

from emssd_compile.ops import grouped_linear
from emssd_compile.passes.fuse_projections import find_projections
from emssd_compile.passes.graph import argument, aten, attribute, call
from emssd_compile.passes.manager import Refusal


class GroupLinears:
    """Have a kernel of our own stream the weights of linear layers, those of one input in one product.

    The few tokens of a decoding step make a matrix product as fast as its weight streams in, and what torch multiplies
    with is made for many tokens. The Q/K/V and the gate/up projections are one product, which has less overhead than
    three. The weights stay where they are (see `emssd::grouped_linear`).

        before:  %y[T,N] = linear(%x[T,M], %weight[N,M], %bias)
        after:   %y[T,N] = emssd.grouped_linear(%x[T,M], [%weight[N,M], %bias], 1)

        before:  %q = linear(%x, %wq); %k = linear(%x, %wk); %v = linear(%x, %wv)
        after:   %y = emssd.grouped_linear(%x, [%wq, %wk, %wv], 3); %q, %k, %v = split_with_sizes(%y, [...], -1)

    Integers of 8 bits stay integers until they are in a register:

        before:  %y = linear(%x, _to_copy(%integers[N,M], float32))
        after:   %y = emssd.grouped_linear(%x, [%integers[N,M]], 1)
    """

    name = "group_linears"

    def __init__(self) -> None:
        self.refusals: list[Refusal] = []

    def run(self, graph_module: fx.GraphModule) -> int:
        """Replace linear layers; returns how many."""
        self.refusals = []
        graph = graph_module.graph
        sites = [node for node in graph.nodes if node.target == aten.linear.default]
        for node in sites:
            _take_integers(node)
        found = {node: None for node in sites if self._is_fit(graph_module, node)}
        for group in find_projections(graph_module, self.refusals):
            if all(node in found for node in group.nodes):
                parameters = [*group.weights, *group.biases]
                for parameter in parameters:
                    group.nodes[0].prepend(parameter)  # those of a drafter are named where they are used
                with graph.inserting_before(group.nodes[0]):
                    source = argument(group.nodes[0], 0)
                    group.replace(call(graph, grouped_linear, source, parameters, len(group.weights)))
                for node in group.nodes:
                    del found[node]
                    graph.erase_node(node)
        for node in found:
            source, weight, bias = (*node.args, None)[:3]
            node.target, node.args = grouped_linear, (source, [weight] if bias is None else [weight, bias], 1)
        return len(sites) - len([n for n in graph.nodes if n.target == aten.linear.default])

    def _is_fit(self, graph_module: fx.GraphModule, node: fx.Node) -> bool:
        source = node.args[1]
        if not isinstance(source, fx.Node) or source.op != "get_attr":
            return self._refuse(node, "its weight is computed")
        weight = attribute(graph_module, source)
        if weight.device.type != "cpu":
            return self._refuse(node, f"its weight is on {weight.device.type}")
        if weight.dtype not in (torch.float32, torch.bfloat16, torch.int8) or weight.dim() != 2:
            return self._refuse(node, f"a weight of {weight.dtype} {list(weight.shape)} is left to torch")
        return True

    def _refuse(self, node: fx.Node, reason: str) -> bool:
        self.refusals.append(Refusal(node.name, reason))
        return False


def _take_integers(node: fx.Node) -> None:
    """Have a layer whose weight is cast from integers of 8 bits take the integers."""
    cast = node.args[1]
    if not isinstance(cast, fx.Node) or cast.target != aten._to_copy.default or argument(cast, 0).op != "get_attr":
        return
    is_known = cast.meta["val"].dtype == node.meta["val"].dtype in (torch.float32, torch.bfloat16)
    if is_known and cast.meta["val"].device.type == "cpu" and argument(cast, 0).meta["val"].dtype == torch.int8:
        node.replace_input_with(cast, argument(cast, 0))
        if not cast.users:
            node.graph.erase_node(cast)
