"""Take positions from the input."""

from __future__ import annotations

import torch
from torch import fx

from emssd_compile.passes.graph import (
    Evaluator,
    aten,
    call,
    data_dependent,
    placeholder,
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
    tensor that equals 0, 1, 2, ... plus a constant for several T is `positions` plus that constant, however it was
    computed.

        before:  %p = add(sub(cumsum(ones([1, T]), 1), 1), 2)      %t = slice(%table[C,H], 0, 0, T)
        after:   %p = add(%positions[1,T], 2)                      %t = index_select(%table, 0, %positions)
    """

    name = "lift_positions"

    def run(self, graph_module: fx.GraphModule) -> int:
        """See the class."""
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
            new = _as_positions(graph_module, node, positions) or _as_lookup(graph_module, node, positions)
            if new is not None:
                node.replace_all_uses_with(new)
                lifted.add(new)
                changed += 1
        return changed


def _as_positions(graph_module: fx.GraphModule, node: fx.Node, positions: fx.Node) -> fx.Node | None:
    """`positions + c`, shaped and typed like `node`, if that is what `node` computes."""
    sizes = shape(node) or ()
    if node.meta["val"].is_complex() or len(token_dims(node, token_symbol(graph_module.graph))) != 1:
        return None
    if any(s != 1 for s in sizes if isinstance(s, int)):
        return None
    shifts = set()
    for tokens in _PROBES:
        value = Evaluator(graph_module, tokens)(node)
        if value.numel() != tokens:
            return None
        shift = value.flatten() - torch.arange(tokens, device=value.device)
        if not bool((shift == shift[0]).all()):
            return None
        shifts.add(float(shift[0]))
    if len(shifts) != 1 or not next(iter(shifts)).is_integer():
        return None
    graph, shift_by = graph_module.graph, int(shifts.pop())
    with graph.inserting_before(node):
        new = positions
        if shift_by:
            new = call(graph, aten.add.Tensor, new, shift_by)
        if node.meta["val"].dtype != torch.int64:
            new = call(graph, aten._to_copy.default, new, dtype=node.meta["val"].dtype)
        return call(graph, aten.reshape.default, new, [s if isinstance(s, int) else -1 for s in sizes])


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
