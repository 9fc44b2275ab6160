"""Find the matrices that turn token ids into vectors, and vectors into logits."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor, fx

from emssd_compile.passes.graph import argument, aten, attribute, placeholder, results
from emssd_compile.passes.select_logits import find_head
from emssd_compile.step.drafting import TokenTables


@dataclass(frozen=True, eq=False)
class GraphTables:
    """Finds the tables of an L2 graph anew with each call, since weights of a graph may be replaced.

    Two that find the same tensors are equal.
    """

    graph_module: fx.GraphModule

    def __call__(self) -> TokenTables:
        """The tables."""
        return token_tables(self.graph_module)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, GraphTables):
            return NotImplemented
        pairs = ((getattr(self(), field.name), getattr(other(), field.name)) for field in fields(TokenTables))
        return all(own is others for own, others in pairs)

    __hash__ = None  # type: ignore[assignment]


_PRODUCTS = frozenset({aten.linear.default, aten.matmul.default, aten.mm.default, aten.addmm.default})
_TURNED = frozenset({aten.t.default, aten.permute.default, aten.transpose.int})


def token_tables(graph_module: fx.GraphModule) -> TokenTables:
    """Those of an L2 graph; what is not a weight as it stands is None.

    A model may look token ids up in several tables, such as one for each layer; then it is not said which one it is.
    """
    graph = graph_module.graph
    lookups = [node for node in _followed(placeholder(graph, "input_ids")) if node.target == aten.embedding.default]
    tables = {argument(node, 0) for node in lookups}
    embedding = _read(graph_module, *tables) if len(tables) == 1 else None
    weight, bias = _of_head(find_head(graph, results(graph)[1])[1])
    return TokenTables(embedding, _read(graph_module, weight), _read(graph_module, bias))


def _of_head(nodes: list[fx.Node]) -> tuple[object, object]:
    """What an LM head multiplies with, `[V, H]`, and its bias; None each if it is something else."""
    products = [node for node in nodes if node.target in _PRODUCTS]
    if len(products) != 1:
        return None, None
    (head,) = products
    if head.target == aten.linear.default:
        return head.args[1], head.args[2] if len(head.args) > 2 else None
    bias, factor = (head.args[0], argument(head, 2)) if head.target == aten.addmm.default else (None, argument(head, 1))
    return factor.args[0] if factor.target in _TURNED else None, bias


def _followed(ids: fx.Node) -> list[fx.Node]:
    """What reads token ids, as they are or in another shape."""
    users, found = [*ids.users], list[fx.Node]()
    while users:
        node = users.pop()
        found.append(node)
        if isinstance(value := node.meta.get("val"), Tensor) and value.dtype == torch.int64:
            users += node.users
    return found


def _read(graph_module: fx.GraphModule, node: object) -> Tensor | None:
    """The weight that a node reads; None if it is computed."""
    return attribute(graph_module, node) if isinstance(node, fx.Node) and node.op == "get_attr" else None
