"""An exported forward as a graph of functional ATen ops: what export leaves, without tracing it a second time."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch.export import ExportedProgram

aten = torch.ops.aten

_READ = frozenset({aten.reshape.default, aten.contiguous.default, aten.dropout.default})
"""Ops that are made of others, may return what they are given, and that passes read as they are."""
_FRESH = frozenset({aten.linear.default, aten.matmul.default})
"""Ops that are made of others, and return memory of their own."""
_CASTS = frozenset({aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten.to.other, aten.type_as.default})
_RESHAPES = frozenset({aten.flatten.using_ints, aten.unflatten.int, aten.reshape_as.default, aten.view_as.default})
ON_SIZES = frozenset({torch.sym_float, torch.sym_int, torch.sym_max, torch.sym_min, torch.sym_not, torch.sym_sqrt})
"""Functions that a graph calls on sizes, beside operators."""


def argument(node: fx.Node, index: int) -> fx.Node:
    """The positional argument `index` of `node`, which must be a node."""
    value = node.args[index]
    assert isinstance(value, fx.Node), f"argument {index} of %{node.name} is {value!r}"
    return value


def functional(program: ExportedProgram) -> ExportedProgram:
    """The program without ops that write, and without those that passes do not read.

    In most forwards each of these can be replaced by itself, which is done in place. Of any other forward torch traces
    all again (`run_decompositions`), which takes longer than the first time.
    """
    graph = program.graph
    if not all(map(_is_plain, graph.nodes)):
        again: ExportedProgram = program.run_decompositions({})
        return again
    for node in list(graph.nodes):
        if node.target in _REWRITES:
            _REWRITES[node.target](node)
        elif _writes(node):
            node.target = _without_writing(node)
    graph.eliminate_dead_code()
    return program


def _is_plain(node: fx.Node) -> bool:
    """Whether the node is what passes read, or becomes it by a rewrite."""
    if node.op != "call_function":
        return node.op != "get_attr"  # a part of the forward that is called as a graph of its own
    op = node.target
    if not isinstance(op, OpOverload):
        return op in ON_SIZES or getattr(op, "__module__", "") == "_operator"
    if op in _RESHAPES:
        return sum(isinstance(size, torch.SymInt) for size in node.meta["val"].shape) < 2
    if op == aten.chunk.default:
        return isinstance(_size_of_chunks(node), int)
    if op in _READ or op in _REWRITES:
        return True
    if _writes(node):
        return _without_writing(node) is not None and _keeps_dtype(node) and _writes_unseen(node)
    return not (_is_view(op) and _is_composite(op))


def _writes(node: fx.Node) -> bool:
    return isinstance(node.target, OpOverload) and node.target._schema.is_mutable


def _without_writing(node: fx.Node) -> Any:
    """`add` of `add_`; None if there is no such op."""
    op: Any = node.target
    packet = getattr(aten, op._opname.removesuffix("_"), None) if op._opname.endswith("_") else None
    return getattr(packet, op._overloadname, None)


def _keeps_dtype(node: fx.Node) -> bool:
    """Whether the op gives what it is written into, not what its arguments together would be promoted to."""
    values = [node.meta["val"], *(source.meta["val"] for source in node.all_input_nodes)]
    dtypes = [value.dtype for value in values if isinstance(value, Tensor)]
    return all(torch.promote_types(dtypes[0], dtype) == dtypes[0] for dtype in dtypes)


def _writes_unseen(node: fx.Node) -> bool:
    """Whether what a node writes into is memory of its own, and read before only: what reads it later, reads `node`."""
    source = argument(node, 0)
    readers = [reader for reader in source.users if reader is not node]
    return _is_own(source) and not any(node < reader or not _is_own(reader) for reader in readers)


def _is_own(node: fx.Node) -> bool:
    """Whether what a node returns shares no memory with what it was given."""
    if node.target is operator.getitem:
        return _is_own(argument(node, 0))
    op = node.target
    if not isinstance(op, OpOverload):
        return False
    if op in _CASTS:
        return bool(_cast_to(node))
    if _writes(node):
        return _is_plain(node)
    return op in _FRESH or not (_is_view(op) or _is_composite(op))


def _is_view(op: OpOverload) -> bool:
    return any(returned.alias_info is not None for returned in op._schema.returns)


def _is_composite(op: OpOverload) -> bool:
    """Whether torch makes the op of others."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), "CompositeImplicitAutograd")


def _cast_to(node: fx.Node) -> dict[str, Any]:
    """The dtype and the device that a node casts to, as far as they are others than before."""
    before, after = argument(node, 0).meta["val"], node.meta["val"]
    return {name: getattr(after, name) for name in ("dtype", "device") if getattr(before, name) != getattr(after, name)}


def _cast(node: fx.Node) -> None:
    """`to(x, ...)`: a copy in another dtype or on another device, or `x` itself."""
    if _cast_to(node):
        _replace(node, aten._to_copy.default, (argument(node, 0),), _cast_to(node))
    else:
        _drop(node)


def _drop(node: fx.Node) -> None:
    """`x.detach_()`, where nothing has a gradient."""
    node.replace_all_uses_with(argument(node, 0))
    node.graph.erase_node(node)


def _reshape(node: fx.Node) -> None:
    """A view that says its sizes, of which one at most depends on the number of tokens, in other words."""
    sizes = [-1 if isinstance(size, torch.SymInt) else size for size in node.meta["val"].shape]
    _replace(node, aten.reshape.default, (argument(node, 0), sizes))


def _split(node: fx.Node) -> None:
    """`chunk(x, n, dim)` by the size of its chunks."""
    _replace(node, aten.split.Tensor, (argument(node, 0), _size_of_chunks(node), *node.args[2:]))


def _size_of_chunks(node: fx.Node) -> int | torch.SymInt:
    dim: Any = node.args[2] if len(node.args) > 2 else 0
    size: int | torch.SymInt = node.meta["val"][0].shape[dim]
    return size


def _transpose_all(node: fx.Node) -> None:
    """`x.T`."""
    _replace(node, aten.permute.default, (argument(node, 0), [*reversed(range(node.meta["val"].dim()))]))


def _replace(node: fx.Node, op: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
    node.target, node.args, node.kwargs = op, args, kwargs or {}


_REWRITES: dict[Any, Callable[[fx.Node], None]] = {
    **dict.fromkeys(_CASTS, _cast),
    **dict.fromkeys(_RESHAPES, _reshape),
    aten.detach_.default: _drop,
    aten.chunk.default: _split,
    aten.numpy_T.default: _transpose_all,
}
