"""Value numbering: which nodes of a graph are computed alike."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from types import MappingProxyType

import torch
from torch import fx
from torch._ops import OpOverload

from emssd_compile.passes.graph import SHAPE_ONLY, argument


class ValueNumbers:
    """Numbers of nodes: equal ones are computed by the same ops of the same inputs and attributes.

    Layers are alike, and many models compute a mask in each of them. What was found of one then holds for all.

    Args:
        given: what some nodes stand for, instead of being computed.
        table: the number of each way to be computed; shared by those whose numbers are to be compared.
    """

    def __init__(
        self, given: Mapping[fx.Node, Hashable] = MappingProxyType({}), table: dict[Hashable, int] | None = None
    ) -> None:
        self._table: dict[Hashable, int] = {} if table is None else table
        self._numbers = {node: self._number(("given", said)) for node, said in given.items()}

    def where(self, given: Mapping[fx.Node, Hashable]) -> ValueNumbers:
        """Numbers to be compared with these, where some nodes stand for something else."""
        return ValueNumbers(given, self._table)

    def __call__(self, node: fx.Node) -> int:
        """The number of `node`."""
        stack = [node]
        while stack:
            waiting = [source for source in _sources(stack[-1]) if source not in self._numbers]
            if waiting:
                stack += waiting
            else:
                current = stack.pop()
                self._numbers[current] = self._number(self._computed(current))
        return self._numbers[node]

    def _number(self, way: Hashable) -> int:
        return self._table.setdefault(way, len(self._table))

    def _computed(self, node: fx.Node) -> Hashable:
        """How a node is computed. What is of no op, or of one that draws or writes, is like no other."""
        if node.op == "get_attr":
            return "attribute", node.target
        if node.op != "call_function" or not _repeats(node.target):
            return node
        args = (_form(argument(node, 0)), *node.args[1:]) if node.target in SHAPE_ONLY else node.args
        of = fx.node.map_arg((args, node.kwargs), lambda source: f"%{self._numbers[source]}")
        return node.target, repr(of)


def _sources(node: fx.Node) -> list[fx.Node]:
    """The nodes whose values a node is computed of."""
    found = node.args[1:] if node.target in SHAPE_ONLY else node.args
    return [source for source in node.all_input_nodes if source not in node.args or source in found]


def _form(node: fx.Node) -> str:
    value = node.meta["val"]
    return f"{value.dtype} {value.device} {value.shape}"


def _repeats(target: object) -> bool:
    """Whether a call gives the same whenever it is made."""
    if isinstance(target, OpOverload):
        return not target._schema.is_mutable and torch.Tag.nondeterministic_seeded not in target.tags
    return not isinstance(target, torch._ops.HigherOrderOperator)


__all__ = ["ValueNumbers"]
