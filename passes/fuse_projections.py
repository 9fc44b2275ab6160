"""One product for linear layers that read the same input."""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from emssd_compile.passes.graph import argument, aten, attribute, call
from emssd_compile.passes.manager import Refusal


@dataclass(frozen=True)
class Projections:
    """Linear layers that read the same input: Q, K and V, or gate and up.

    Attributes:
        nodes: the layers, in the order of the graph.
        weights: what they multiply with, one `get_attr` each.
        biases: as many, or none.
    """

    nodes: tuple[fx.Node, ...]
    weights: tuple[fx.Node, ...]
    biases: tuple[fx.Node, ...]

    def replace(self, merged: fx.Node) -> None:
        """Have the users of each layer read its part of `merged` `[.., sum of out_i]`, which computes all of them."""
        graph, sizes = merged.graph, [n.meta["val"].shape[-1] for n in self.nodes]
        merged.meta = {**self.nodes[0].meta, **merged.meta}
        split = call(graph, aten.split_with_sizes.default, merged, sizes, -1)
        for index, node in enumerate(self.nodes):
            part = graph.call_function(operator.getitem, (split, index))
            part.meta = dict(node.meta)
            node.replace_all_uses_with(part)


def find_projections(graph_module: fx.GraphModule, refusals: list[Refusal]) -> list[Projections]:
    """All groups of two or more; what keeps a group from being one is added to `refusals`."""
    groups: dict[tuple[fx.Node, bool], list[fx.Node]] = defaultdict(list)
    for node in graph_module.graph.nodes:
        if node.target == aten.linear.default:
            groups[argument(node, 0), _has_bias(node)].append(node)
    found = []
    for (_, has_bias), nodes in groups.items():
        if len(nodes) < 2:
            continue
        reason = _objection(graph_module, nodes)
        if reason:
            refusals.append(Refusal(nodes[0].name, reason))
            continue
        biases = tuple(argument(n, 2) for n in nodes) if has_bias else ()
        found.append(Projections(tuple(nodes), tuple(argument(n, 1) for n in nodes), biases))
    return found


def _has_bias(node: fx.Node) -> bool:
    return len(node.args) > 2 and node.args[2] is not None


def _objection(graph_module: fx.GraphModule, nodes: list[fx.Node]) -> str | None:
    parameters = [p for n in nodes for p in n.args[1:] if p is not None]
    if any(not isinstance(p, fx.Node) or p.op != "get_attr" or len(p.users) != 1 for p in parameters):
        return "a weight is computed or used elsewhere"
    tensors = [attribute(graph_module, p) for p in parameters if isinstance(p, fx.Node)]
    if len({(t.dtype, t.device) for t in tensors}) != 1 or any(type(t) not in (nn.Parameter, Tensor) for t in tensors):
        return "weights differ in dtype or kind"
    return None


class FuseProjections:
    """Merge the Q/K/V and gate/up projections into one linear layer each, with weights that are copies.

    Decoding reads every weight for a handful of tokens; one wide product has less overhead than three narrow ones. The
    merged weight is as the parts are now: this pass is for targets that write weights into an artifact. A step that
    runs here shares the weights of the user's model, and those stay where they are.

        before:  %q = linear(%x, %wq); %k = linear(%x, %wk); %v = linear(%x, %wv)
        after:   %y = linear(%x, %wqkv); %q, %k, %v = split_with_sizes(%y, [256, 128, 128], -1)
    """

    name = "fuse_projections"

    def __init__(self) -> None:
        self.refusals: list[Refusal] = []

    def run(self, graph_module: fx.GraphModule) -> int:
        """Merge each group of linear layers; returns how many groups."""
        self.refusals = []
        found = find_projections(graph_module, self.refusals)
        for group in found:
            with graph_module.graph.inserting_before(group.nodes[0]):
                operands = [_merged(graph_module, parts) for parts in (group.weights, group.biases) if parts]
                source = argument(group.nodes[0], 0)
                merged = call(graph_module.graph, aten.linear.default, source, *operands)
                group.replace(merged)
        return len(found)


def _merged(graph_module: fx.GraphModule, parts: Sequence[fx.Node]) -> fx.Node:
    """A new attribute that holds the parts behind each other."""
    merged = torch.cat([attribute(graph_module, part).detach() for part in parts])
    name = f"{parts[0].target}_fused"
    graph_module.register_buffer(name, merged, persistent=False)
    new = graph_module.graph.get_attr(name)
    new.meta["val"] = parts[0].meta["val"].fake_mode.from_tensor(merged, static_shapes=True)
    return new
