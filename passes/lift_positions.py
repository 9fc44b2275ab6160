"""Take positions from the input."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import fx

from emssd_compile.passes.graph import (
    Evaluator,
    ancestors,
    aten,
    call,
    data_dependent,
    placeholder,
    refuse,
    scalar,
    shape,
    token_dims,
    token_symbol,
)

_PROBES = (7, 13)


class LiftPositions:
    """Replace positions that the model derives from the *number* of tokens by the input `positions`.

    A model counts its own positions: `arange`, a cumulative sum of ones, a slice of a table up to T. Among packed rows
    these would number the batch, not the row. What counts as a position is found by evaluating: an integer-valued
    tensor that equals 0, 1, 2, ... plus a constant for several T, the longest row's among them, is `positions` plus
    that constant, however it was computed.

    Args:
        longest: tokens a row can hold; positions need to be right up to there, and tables to hold them.

        before:  %p = add(sub(cumsum(ones([1, T]), 1), 1), 2)      %t = slice(%table[C,H], 0, 0, T)
        after:   %p = add(%positions[1,T], 2)                      %t = index_select(%table, 0, %positions)
    """

    name = "lift_positions"

    def __init__(self, longest: int) -> None:
        self.longest = longest
        self.notes: tuple[str, ...] = ()

    def run(self, graph_module: fx.GraphModule) -> int:
        """Lift them. Raises UnsupportedModelError for a table of positions that is shorter than the longest row."""
        graph = graph_module.graph
        symbol = token_symbol(graph)
        positions = placeholder(graph, "positions")
        dependent = data_dependent(graph)
        lifted = {positions}
        changed = 0
        for node in list(graph.nodes):
            if node.op != "call_function" or node in dependent or not token_dims(node, symbol):
                continue
            if any(n in lifted for n in node.all_input_nodes):
                lifted.add(node)
                continue
            new = self._as_positions(graph_module, node, positions) or _as_lookup(graph_module, node, positions)
            if new is not None:
                node.replace_all_uses_with(new)
                lifted.add(new)
                changed += 1
        if changed:
            self.notes = (f"tested: positions up to {self.longest}",)
        _check_tables(graph_module, self.longest)
        return changed

    def _as_positions(self, graph_module: fx.GraphModule, node: fx.Node, positions: fx.Node) -> fx.Node | None:
        """`positions + c`, shaped and typed like `node`, if that is what `node` computes."""
        sizes = shape(node) or ()
        if node.meta["val"].is_complex() or len(token_dims(node, token_symbol(graph_module.graph))) != 1:
            return None
        if any(s != 1 for s in sizes if isinstance(s, int)):
            return None
        shifts = {_shift(graph_module, node, tokens) for tokens in (*_PROBES, self.longest)}
        shift_by = shifts.pop()
        if shifts or shift_by is None:
            return None
        graph = graph_module.graph
        with graph.inserting_before(node):
            new = positions
            if shift_by:
                new = call(graph, aten.add.Tensor, new, shift_by)
            if node.meta["val"].dtype != torch.int64:
                new = call(graph, aten._to_copy.default, new, dtype=node.meta["val"].dtype)
            return call(graph, aten.reshape.default, new, [s if isinstance(s, int) else -1 for s in sizes])


def _shift(graph_module: fx.GraphModule, node: fx.Node, tokens: int) -> int | None:
    """C if `node` holds c, c + 1, c + 2, ... for that many tokens; None if it holds something else."""
    try:
        value = Evaluator(graph_module, tokens)(node)
    except (IndexError, RuntimeError):  # a table that ends before
        return None
    if value.numel() != tokens:
        return None
    first = float(value.flatten()[0])
    if not first.is_integer():
        return None
    counted = torch.arange(int(first), int(first) + tokens, device=value.device)
    return int(first) if torch.equal(value.flatten(), counted.to(value.dtype)) else None


def _as_lookup(graph_module: fx.GraphModule, node: fx.Node, positions: fx.Node) -> fx.Node | None:
    """A look-up by position, if `node` is the slice of a table of constants up to T."""
    if node.target != aten.slice.Tensor:
        return None
    table, dim, start, end = (*node.args, None, None)[:4]
    if not isinstance(table, fx.Node) or not isinstance(dim, int) or not isinstance(end, fx.Node):
        return None
    if start not in (0, None) or token_dims(table, token_symbol(graph_module.graph)):
        return None
    if scalar(Evaluator(graph_module, _PROBES[0])(end)) != _PROBES[0]:
        return None
    graph = graph_module.graph
    with graph.inserting_before(node):
        flat = call(graph, aten.reshape.default, positions, [-1])
        return call(graph, aten.index_select.default, table, dim, flat)


_LOOKUPS = {aten.embedding.default: (0, 1), aten.index_select.default: (0, 2), aten.gather.default: (0, 2)}
"""Ops that look up rows of a table: which arguments are the table and the index."""


def _check_tables(graph_module: fx.GraphModule, longest: int) -> None:
    """Every look-up by position must find its row, up to the last position of the longest row."""
    graph = graph_module.graph
    dependent = data_dependent(graph)
    by_position = {placeholder(graph, "positions")}
    for node in graph.nodes:
        if node not in dependent and any(n in by_position for n in node.all_input_nodes):
            by_position.add(node)
    evaluator = Evaluator(graph_module, longest)
    for node in graph.nodes:
        for table, dim, index in _lookups(node):
            rows = (shape(table) or ())[dim]
            if index not in by_position or not isinstance(rows, int):
                continue
            missing = (evaluator(index).flatten() >= rows).nonzero()
            if len(missing):
                _refuse_table(node, table, rows, longest, int(missing[0]))


def _lookups(node: fx.Node) -> list[tuple[fx.Node, int, fx.Node]]:
    """The tables that `node` reads rows of: (table, dimension, index)."""
    if node.target == aten.index.Tensor:
        indices = node.args[1]
        assert isinstance(indices, (list, tuple))
        found: list[tuple[Any, Any, Any]] = [(node.args[0], dim, index) for dim, index in enumerate(indices)]
    elif node.target in _LOOKUPS:
        table, index = (node.args[place] for place in _LOOKUPS[node.target])
        dim = 0 if node.target == aten.embedding.default else node.args[1]
        found = [(table, dim, index)]
    else:
        return []
    return [
        (table, dim, index) for table, dim, index in found if isinstance(table, fx.Node) and isinstance(index, fx.Node)
    ]


def _refuse_table(node: fx.Node, table: fx.Node, rows: int, longest: int, limit: int) -> NoReturn:
    source = next((n for n in ancestors([table]) if n.op == "get_attr"), table)
    raise refuse(
        node,
        f"the table {source.target} holds {rows} positions, and max_length={longest} needs more of them",
        remedy=f"pass max_length={limit} or less" if limit > 1 else "",
        longest=limit if limit > 1 else None,
    )
