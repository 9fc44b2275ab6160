"""One product for linear layers that read the same input."""

from __future__ import annotations

import operator
from collections import defaultdict

import torch
from torch import Tensor, fx, nn

from emssd_compile.passes.graph import argument, aten, attribute, call
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
        for (source, _), nodes in groups.items():
            if len(nodes) < 2:
                continue
            reason = _objection(graph_module, nodes)
            if reason:
                self.refusals.append(Refusal(nodes[0].name, reason))
                continue
            _merge(graph_module, source, nodes)
            changed += 1
        return changed


def _objection(graph_module: fx.GraphModule, nodes: list[fx.Node]) -> str | None:
    parameters = [p for n in nodes for p in n.args[1:] if p is not None]
    if any(not isinstance(p, fx.Node) or p.op != "get_attr" or len(p.users) != 1 for p in parameters):
        return "a weight is computed or used elsewhere"
    tensors = [attribute(graph_module, p) for p in parameters if isinstance(p, fx.Node)]
    if len({(t.dtype, t.device) for t in tensors}) != 1 or any(type(t) not in (nn.Parameter, Tensor) for t in tensors):
        return "weights differ in dtype or kind"
    owns_storage = all(t.is_contiguous() and t.untyped_storage().nbytes() == t.nbytes for t in tensors)
    if not owns_storage and any(_adjacent(_parts(graph_module, nodes, i)) is None for i in _operands(nodes)):
        return "a weight is a view of, or shares storage with, something else"
    return None


def _operands(nodes: list[fx.Node]) -> tuple[int, ...]:
    """Which arguments of the linear layers are weights."""
    return (1, 2) if len(nodes[0].args) > 2 and nodes[0].args[2] is not None else (1,)


def _parts(graph_module: fx.GraphModule, nodes: list[fx.Node], index: int) -> list[Tensor]:
    return [attribute(graph_module, argument(n, index)).detach() for n in nodes]


def _adjacent(parts: list[Tensor]) -> Tensor | None:
    """One view over all `parts` if they lie behind each other in one storage: merged by an earlier `optimize`."""
    first, place = parts[0], parts[0].storage_offset()
    for part in parts:
        same = part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not (same and part.is_contiguous() and part.storage_offset() == place):
            return None
        place += part.numel()
    return first.as_strided((sum(len(p) for p in parts), *first.shape[1:]), first.stride())


def _merge(graph_module: fx.GraphModule, source: fx.Node, nodes: list[fx.Node]) -> None:
    graph = graph_module.graph
    sizes = [n.meta["val"].shape[-1] for n in nodes]
    with graph.inserting_before(nodes[0]):
        weights = [_merged(graph_module, nodes, index) for index in _operands(nodes)]
        merged = call(graph, aten.linear.default, source, *weights)
        merged.meta = {**nodes[0].meta, **merged.meta}
        split = call(graph, aten.split_with_sizes.default, merged, sizes, -1)
        for index, node in enumerate(nodes):
            part = graph.call_function(operator.getitem, (split, index))
            part.meta = dict(node.meta)
            node.replace_all_uses_with(part)


def _merged(graph_module: fx.GraphModule, nodes: list[fx.Node], index: int) -> fx.Node:
    """A new attribute holding the concatenation of an operand; the parts become views into it."""
    parts = _parts(graph_module, nodes, index)
    merged = _adjacent(parts)
    if merged is None:
        merged = torch.cat(parts)
        for node, view in zip(nodes, merged.split([len(p) for p in parts]), strict=True):
            attribute(graph_module, argument(node, index)).data = view
    name = f"{argument(nodes[0], index).target}_fused"
    graph_module.register_buffer(name, merged, persistent=False)
    new = graph_module.graph.get_attr(name)
    new.meta["val"] = argument(nodes[0], index).meta["val"].fake_mode.from_tensor(merged, static_shapes=True)
    return new
