"""Find linear layers that were traced as matrix products."""

from __future__ import annotations

from typing import Any

from torch import fx

from emssd_compile.passes.graph import argument, aten, call, inserting_for, shape

_SWAPS: dict[Any, tuple[Any, ...]] = {
    aten.t.default: (),
    aten.permute.default: ([1, 0],),
    aten.transpose.int: (0, 1),
}
"""Ops that transpose a matrix, and how they are called then."""


class RaiseLinears:
    """Make products with a transposed weight linear layers again.

    The layers of a drafter are traced as what `linear` is made of. As layers they stream their weights as those of the
    model do (see `group_linears`).

        before:  %wt[M,N] = t(%weight[N,M]); %y[T,N] = addmm(%bias[N], %x[T,M], %wt)
        after:   %y[T,N] = linear(%x[T,M], %weight[N,M], %bias[N])

    A weight may be cast before or after it is transposed, as the integers of a quantised one are: then it is only cast.
    """

    name = "raise_linears"

    def run(self, graph_module: fx.GraphModule) -> int:
        """Replace products; returns how many."""
        replaced = 0
        for node in graph_module.graph.nodes:
            biased = node.target == aten.addmm.default and not node.kwargs
            if not biased and node.target != aten.mm.default:
                continue
            source, transposed = argument(node, biased), argument(node, 1 + biased)
            with inserting_for(node):
                weight = _turned_back(transposed)
            if weight is None:
                continue
            if biased and shape(argument(node, 0)) != (shape(weight) or ())[:1]:  # one number for all, or one a token
                continue
            node.args = (source, weight, *node.args[:biased])
            node.target = aten.linear.default
            replaced += 1
        return replaced


def _turned_back(node: fx.Node) -> fx.Node | None:
    """The weight that a node transposes, and casts as the node does; None if it does something else."""
    casts, num_swaps = list[fx.Node](), 0
    while node.op != "get_attr":
        is_swap = tuple(node.args[1:]) == _SWAPS.get(node.target)
        if not is_swap and node.target != aten._to_copy.default:
            return None
        num_swaps += is_swap
        casts += [] if is_swap else [node]
        node = argument(node, 0)
    if num_swaps != 1:
        return None
    for cast in reversed(casts):
        node = call(node.graph, aten._to_copy.default, node, **cast.kwargs)
    return node
