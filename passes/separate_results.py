"""Give every result of a graph a value of its own."""

from __future__ import annotations

from typing import Any

from torch import fx

from emssd_compile.passes.graph import aten, call, inputs, output, refuse


class SeparateResults:
    """Copy what is returned twice, and inputs that are returned as they came.

    Runtimes that bind memory to inputs and results by name know no result that is an input, and none with two names.

        before:  return {asked: %asked, again: %draft, draft: %draft}
        after:   %clone[B] = clone(%asked); %clone_1 = clone(%draft)
                 return {asked: %clone, again: %clone_1, draft: %draft}
    """

    name = "separate_results"

    def run(self, graph_module: fx.GraphModule) -> int:
        """Copy results that share memory; returns how many.

        Raises:
            UnsupportedModelError: the graph returns no dict of tensors.
        """
        graph = graph_module.graph
        results = output(graph).args[0]
        if not isinstance(results, dict):
            raise refuse(output(graph), "the graph must return its results by name")
        separate: dict[str, fx.Node] = {}
        for name, node in results.items():
            if node.op == "placeholder" or node in separate.values():
                with graph.inserting_before(output(graph)):
                    node = call(graph, aten.clone.default, node)
            separate[name] = node
        changed = sum(separate[name] is not node for name, node in results.items())
        output(graph).args = (separate,)
        return changed

    def ensures(self, graph_module: fx.GraphModule) -> None:
        """No result is an input, and none is another result."""
        seen = set(inputs(graph_module.graph))
        results: Any = output(graph_module.graph).args[0]
        for name, node in results.items():
            if node in seen:
                raise refuse(node, f"the result {name!r} has no value of its own")
            seen.add(node)
