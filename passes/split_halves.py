"""Cut a step in two, where its logits are read."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from emssd_compile.passes.graph import ancestors, inputs, output

SEAM = "seam_"
"""How the names of those results of a step begin at which it is to be cut."""

_CARRIED = "carried_"


@dataclass(frozen=True)
class Halves:
    """A step as two graphs: what comes before its logits are read, and what is decided by them.

    Attributes:
        forward: gives the values at the seam, and what else the second half needs of it.
        decide: takes these, `seam_logits` in whatever form they are now; gives the step's other results.
    """

    forward: fx.GraphModule
    decide: fx.GraphModule


def split_halves(graph_module: fx.GraphModule) -> Halves:
    """Cut the graph of a step whose results `seam_<name>` are what somebody wants to see, `seam_logits` to change.

        before:  step(history, ..., caches) -> {seam_logits, seam_positions, ..., history, ..., report}
        after:   forward(history, ..., caches) -> {seam_logits, seam_positions, ..., carried_0, ...}
                 decide(history, ..., caches, seam_logits, carried_0, ...) -> {history, ..., report}

    What writes memory stays on the side where it was: each half has the caches as inputs.
    """
    graph = graph_module.graph
    (results,) = output(graph).args
    assert isinstance(results, dict)
    seam = {name: node for name, node in results.items() if name.startswith(SEAM)}
    kept = {name: node for name, node in results.items() if name not in seam}
    first = _first_half(graph, [*seam.values()])
    second = {node for node in graph.nodes if node not in first and node.op != "output"}
    crossing: dict[fx.Node, str] = {node: name for name, node in seam.items()}
    waiting = [*kept.values(), *(n for node in second for n in node.all_input_nodes)]
    while waiting:
        node = waiting.pop()
        if node in second or node in crossing:
            continue
        if node.op != "placeholder" and isinstance(node.meta["val"], torch.Tensor) and node.op != "get_attr":
            crossing[node] = f"{_CARRIED}{len(crossing)}"
        else:  # inputs, weights and sizes are the same in both halves
            second.add(node)
            waiting += node.all_input_nodes
    forward = _part(graph_module, first, {}, {name: node for node, name in crossing.items()}, "Forward")
    return Halves(forward, _part(graph_module, second, crossing, kept, "Decide"))


def _first_half(graph: fx.Graph, seam: list[fx.Node]) -> set[fx.Node]:
    """What has to run before the seam: what its values are made of, and what writes memory before the last of them."""
    found = ancestors(seam)
    order = {node: index for index, node in enumerate(graph.nodes)}
    last = max(order[node] for node in found)
    return found | ancestors(node for node in graph.nodes if _writes(node) and order[node] < last)


def _writes(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _part(
    source: fx.GraphModule, nodes: set[fx.Node], given: dict[fx.Node, str], results: dict[str, fx.Node], name: str
) -> fx.GraphModule:
    """A graph of some nodes of another, in its order.

    Args:
        source: the other.
        nodes: those of it.
        given: values of it that are inputs, by name.
        results: what it returns.
        name: of its class.
    """
    graph = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    for node in inputs(source.graph):
        if node in nodes:
            values[node] = graph.node_copy(node)
    for node, called in given.items():
        values[node] = graph.placeholder(called)
        values[node].meta = {"val": node.meta["val"]}
    for node in source.graph.nodes:
        if node in nodes and node.op != "placeholder":
            values[node] = graph.node_copy(node, lambda n: values[n])
    graph.output({called: values[node] for called, node in results.items()})
    return fx.GraphModule(source, graph, class_name=name)
