"""One product for linear layers that read the same input."""

from __future__ import annotations

import operator
from collections import defaultdict

import torch
from torch import Tensor, fx, nn

from emssd_compile.passes.graph import aten, attribute, call
from emssd_compile.passes.manager import Refusal


class FuseProjections:
    """Merge the Q/K/V and gate/up projections into one linear layer each.

    Decoding reads every weight for a handful of tokens; one wide product has less overhead than three narrow ones. The
    merged weight *replaces* the storage of the model's own parameters, which become views into it: nothing is held
    twice and the user's model goes on working.

        before:  %q = linear(%x, %wq); %k = linear(%x, %wk); %v = linear(%x, %wv)
        after:   %y = linear(%x, %wqkv); %q, %k, %v = split_with_sizes(%y, [256, 128, 128], -1)
    """

    name = "fuse_projections"

    def __init__(self) -> None:
        self.refusals: list[Refusal] = []

    def run(self, graph_module: fx.GraphModule) -> int:
        """See the class."""
        self.refusals = []
        groups: dict[tuple[fx.Node, bool], list[fx.Node]] = defaultdict(list)
        for node in graph_module.graph.nodes:
            if node.target == aten.linear.default:
                groups[node.args[0], len(node.args) > 2 and node.args[2] is not None].append(node)
        changed = 0
        for (source, biased), nodes in groups.items():
            if len(nodes) < 2:
                continue
            reason = _objection(graph_module, nodes)
            if reason:
                self.refusals.append(Refusal(nodes[0].name, reason))
                continue
            _merge(graph_module, source, nodes, biased)
            changed += 1
        return changed


def _objection(graph_module: fx.GraphModule, nodes: list[fx.Node]) -> str | None:
    parameters = [p for n in nodes for p in n.args[1:] if p is not None]
    if any(not isinstance(p, fx.Node) or p.op != "get_attr" or len(p.users) != 1 for p in parameters):
        return "a weight is computed or used elsewhere"
    tensors = [attribute(graph_module, p) for p in parameters if isinstance(p, fx.Node)]
    if len({(t.dtype, t.device) for t in tensors}) != 1 or any(type(t) not in (nn.Parameter, Tensor) for t in tensors):
        return "weights differ in dtype or kind"
    if any(not t.is_contiguous() or t.untyped_storage().nbytes() != t.nbytes for t in tensors):
        return "a weight is a view of, or shares storage with, something else"
    return None


def _merge(graph_module: fx.GraphModule, source: fx.Node, nodes: list[fx.Node], biased: bool) -> None:
    graph = graph_module.graph
    sizes = [n.meta["val"].shape[-1] for n in nodes]
    with graph.inserting_before(nodes[0]):
        weights = [_merged(graph_module, [n.args[i] for n in nodes]) for i in ((1, 2) if biased else (1,))]  # type: ignore[misc]
        merged = call(graph, aten.linear.default, source, *weights)
        merged.meta = {**nodes[0].meta, **merged.meta}
        split = call(graph, aten.split_with_sizes.default, merged, sizes, -1)
        for index, node in enumerate(nodes):
            part = graph.call_function(operator.getitem, (split, index))
            part.meta = dict(node.meta)
            node.replace_all_uses_with(part)


def _merged(graph_module: fx.GraphModule, nodes: list[fx.Node]) -> fx.Node:
    """A new attribute holding the concatenation; the parts become views into it."""
    parts = [attribute(graph_module, n) for n in nodes]
    merged = torch.cat([p.detach() for p in parts])
    for part, view in zip(parts, merged.split([len(p) for p in parts]), strict=True):
        part.data = view
    name = f"{nodes[0].target}_fused"
    graph_module.register_buffer(name, merged, persistent=False)
    new = graph_module.graph.get_attr(name)
    new.meta["val"] = nodes[0].meta["val"].fake_mode.from_tensor(merged, static_shapes=True)
    return new
