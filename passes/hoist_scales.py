"""Multiply results instead of weights."""

from __future__ import annotations

from itertools import permutations

import torch
from torch import fx

from emssd_compile.passes.graph import argument, aten, call, inserting_for, shape


class HoistScales:
    """Have what quantised weights are scaled by scale what is computed with them.

    A matrix of integers with a scale for each row, or one for all, is written out anew for each step where the product
    is one with scaled weights. Of scaled products it is not, and they are the same up to rounding.

        before:  %y[T,N] = linear(%x[T,M], mul(_to_copy(%weight[N,M], float32), %scale[N,1]), %bias[N])
        after:   %y[T,N] = add(mul(linear(%x[T,M], _to_copy(%weight[N,M], float32)), reshape(%scale, [N])), %bias[N])
    """

    name = "hoist_scales"

    def run(self, graph_module: fx.GraphModule) -> int:
        """Scale results; returns of how many layers."""
        graph, changed = graph_module.graph, 0
        for node in graph.find_nodes(op="call_function", target=aten.linear.default):
            weight = argument(node, 1)
            parts = _integers_and_scale(weight) if weight.target == aten.mul.Tensor else None
            if parts is None:
                continue
            integers, scale = parts
            with inserting_for(node):
                result = call(graph, aten.linear.default, argument(node, 0), integers)
                result = call(graph, aten.mul.Tensor, result, call(graph, aten.reshape.default, scale, [-1]))
                if len(node.args) > 2 and node.args[2] is not None:
                    result = call(graph, aten.add.Tensor, result, node.args[2])
            node.replace_all_uses_with(result)
            graph.erase_node(node)
            changed += 1
        return changed


def _integers_and_scale(product: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """Integers `[N, M]`, cast to what they are multiplied in, and their scale, `[N, 1]` or of one element."""
    size, dtype = product.meta["val"].shape, product.meta["val"].dtype
    for integers, scale in permutations(argument(product, index) for index in (0, 1)):
        is_cast = isinstance(integers, fx.Node) and integers.target == aten._to_copy.default
        if not is_cast or argument(integers, 0).meta["val"].dtype != torch.int8 or shape(integers) != size:
            continue
        fits = isinstance(scale, fx.Node) and scale.meta["val"].dtype == integers.meta["val"].dtype == dtype
        if fits and shape(scale) in {(size[0], 1), (1, 1), (1,), ()}:
            return integers, scale
    return None
