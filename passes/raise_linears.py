"""Find linear layers that were traced as matrix products."""

from __future__ import annotations

from torch import fx

from emssd_compile.passes.graph import argument, aten, shape


class RaiseLinears:
    """Make products with a transposed weight linear layers again.

    The layers of a drafter are traced as what `linear` is made of. As layers they stream their weights as those of the
    model do (see `group_linears`).

        before:  %wt[M,N] = t(%weight[N,M]); %y[T,N] = addmm(%bias[N], %x[T,M], %wt)
        after:   %y[T,N] = linear(%x[T,M], %weight[N,M], %bias[N])
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
            if not _is_transposed_weight(transposed):
                continue
            weight = argument(transposed, 0)
            if biased and shape(argument(node, 0)) != (shape(weight) or ())[:1]:  # one number for all, or one a token
                continue
            node.args = (source, weight, *node.args[:biased])
            node.target = aten.linear.default
            replaced += 1
        return replaced


def _is_transposed_weight(node: fx.Node) -> bool:
    swaps = {aten.t.default: (), aten.permute.default: ([1, 0],), aten.transpose.int: (0, 1)}
    if node.target not in swaps or argument(node, 0).op != "get_attr":
        return False
    return tuple(node.args[1:]) == swaps[node.target]
