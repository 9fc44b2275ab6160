"""Drop what does nothing."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from emssd_compile.passes.graph import argument, aten, same_size, shape

_CHECKS = frozenset(
    {
        "_assert_tensor_metadata",
        "_assert_scalar",
        "_assert_async",
        "sym_constrain_range",
        "sym_constrain_range_for_size",
    }
)
_ALWAYS = frozenset(
    {
        aten.clone.default,
        aten.alias.default,
        aten.detach.default,
        aten.lift_fresh_copy.default,
        aten.contiguous.default,
    }
)
_VIEWS = frozenset({aten.view.default, aten._unsafe_view.default, aten.reshape.default})


class DropNoops:
    """Remove what does nothing, and make every view a reshape.

    Assertions, copies, same-dtype casts, full slices, same-shape expands, transposes that undo each other: export
    leaves many behind. They hide the patterns that later passes look for, and a copy made only for its memory layout
    would be made again by whoever needs that layout. Views become reshapes because dropping a copy may change strides
    under them; -1 stands for the token dimension in all of them.

        before:  %s = slice(%x[1,T,8], 1, 0, maxint); %c = clone(%s); %v = view(%c, [1, T, 2, 4])
        after:   %v = reshape(%x[1,T,8], [1, -1, 2, 4])
    """

    name = "drop_noops"

    def run(self, graph_module: fx.GraphModule) -> int:
        """Remove what changes nothing; returns how many nodes."""
        changed = 0
        for node in list(graph_module.graph.nodes):
            if node.op != "call_function":
                continue
            if _is_check(node):
                graph_module.graph.erase_node(node)
            elif (source := _source_if_noop(node)) is not None:
                node.replace_all_uses_with(source)
                graph_module.graph.erase_node(node)
            elif not _normalise_view(node):
                continue
            changed += 1
        return changed


def _normalise_view(node: fx.Node) -> bool:
    """Make any view a reshape, to known sizes and -1 where one size alone depends on the number of tokens."""
    sizes = shape(node)
    if node.target not in _VIEWS or sizes is None:
        return False
    known: Any = [-1 if isinstance(s, torch.SymInt) else s for s in sizes]
    if known.count(-1) > 1:  # a relation of tokens to tokens: sizes stay as the model computes them
        known = node.args[1]
    if node.target == aten.reshape.default and node.args[1] == known:
        return False
    node.target = aten.reshape.default
    node.args = (node.args[0], known)
    return True


def _is_check(node: fx.Node) -> bool:
    name = getattr(node.target, "_opname", getattr(node.target, "__name__", ""))
    return name in _CHECKS and not node.users


def _source_if_noop(node: fx.Node) -> fx.Node | None:
    if not node.args or not isinstance(node.args[0], fx.Node):
        return None
    source = node.args[0]
    if node.target in _ALWAYS:
        return source
    if node.target == aten.transpose.int == source.target:
        return argument(source, 0) if _swapped(node) == _swapped(source) else None
    rule = _RULES.get(node.target)
    return source if rule is not None and rule(node, source) else None


def _swapped(node: fx.Node) -> set[int]:
    """The two dimensions that a transpose swaps."""
    rank = len(shape(node) or ())
    return {d % rank for d in node.args[1:] if isinstance(d, int)}


def _same_dtype(node: fx.Node, source: fx.Node) -> bool:
    a, b = node.meta["val"], source.meta["val"]
    return bool(a.dtype == b.dtype and a.device == b.device)


def _full_slice(node: fx.Node, source: fx.Node) -> bool:
    start = node.args[2] if len(node.args) > 2 else None
    end = node.args[3] if len(node.args) > 3 else None
    step = node.args[4] if len(node.args) > 4 else 1
    return bool(start in (None, 0) and (end is None or end == sys.maxsize) and step == 1)


def _same_shape(node: fx.Node, source: fx.Node) -> bool:
    a, b = shape(node), shape(source)
    return a is not None and b is not None and len(a) == len(b) and all(map(same_size, a, b))


def _no_dropout(node: fx.Node, source: fx.Node) -> bool:
    return bool(node.args[1] == 0.0 or node.args[2] is False)


_RULES: dict[object, Callable[[fx.Node, fx.Node], bool]] = {
    aten._to_copy.default: _same_dtype,
    aten.to.dtype: _same_dtype,
    aten.slice.Tensor: _full_slice,
    aten.expand.default: _same_shape,
    aten.reshape.default: _same_shape,
    aten.view.default: _same_shape,
    aten._unsafe_view.default: _same_shape,
    aten.dropout.default: _no_dropout,
}
