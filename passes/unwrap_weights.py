"""Read what a wrapped weight consists of."""

from __future__ import annotations

from torch import Tensor, fx

from emssd_compile.passes.graph import argument

_ACCESS = "export.access_subclass_inner_tensor.default"
"""Its op, by name: older versions of torch do not have it."""


class UnwrapWeights:
    """Have a graph hold the plain tensors of a weight that is a tensor subclass, such as a quantised one's.

    Compilers and exports know tensors, not everybody's subclasses. The tensors are those of the model itself, so what
    is written into them is seen.

        before:  %q = access_subclass_inner_tensor(%weight, "qdata")
        after:   %q = weight.qdata, an attribute of the graph
    """

    name = "unwrap_weights"

    def run(self, graph_module: fx.GraphModule) -> int:
        """Replace each access; returns how many."""
        accesses = [node for node in graph_module.graph.nodes if str(node.target) == _ACCESS]
        for node in accesses:  # in order: what is within a tensor may be wrapped, too
            weight, part = argument(node, 0), str(node.args[1])
            tensor = getattr(getattr(graph_module, str(weight.target)), part)
            assert isinstance(tensor, Tensor)
            name = f"{weight.target}_{part}"
            while getattr(graph_module, name, tensor) is not tensor:
                name += "_"
            if not hasattr(graph_module, name):
                graph_module.register_buffer(name, tensor, persistent=False)
            with graph_module.graph.inserting_before(node):
                plain = graph_module.graph.get_attr(name)
            plain.meta = dict(node.meta)
            node.replace_all_uses_with(plain)
            graph_module.graph.erase_node(node)
        return len(accesses)
