"""Fewer and larger operators for the same values: an exported graph is written op by op, as torch computes it."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from onnx_ir.passes import common
from onnxscript.rewriter import pattern, rewrite

# The rules are public by name only through `onnx_fusions.fuse`, which wants opset 23 and nothing newer.
from onnxscript.rewriter.rules.fusion._rms_normalization import fuse_rms_normalization
from onnxscript.rewriter.rules.fusion._rotary_embedding import fuse_rotary_embedding

from emssd_compile.export.onnx.naming import name_nodes, name_sizes

_VIEWS = ("Reshape", "Squeeze", "Unsqueeze")


def simplify(model: ir.Model) -> None:
    """Fuse what ONNX has one operator for, leave packed tokens as they lie, and compute nothing twice or for nothing.

    Models of Hugging Face put heads before tokens for their own attention, and so the graph takes the packed tokens of
    each layer there and back: `[1, T, H, D]` to `[1, H, T, D]`, through the rotary embedding, to `[T, H, D]`.
    """
    fuse_rms_normalization(model)
    fuse_rotary_embedding(model)
    rules: tuple[Any, ...] = (_RotateInPlace, _ThereAndBack, _BackAndThere)
    rewrite(model, [rule.rule() for rule in rules])
    _merge_views(model.graph)
    _ask_inputs(model.graph)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    common.DeduplicateInitializersPass(size_limit=1 << 13)(model)  # small weights were transposed at each use
    common.CommonSubexpressionEliminationPass()(model)  # sines and cosines, for each rotary embedding
    common.RemoveUnusedNodesPass()(model)
    name_sizes(model.graph)
    name_nodes(model.graph)
    common.ClearMetadataAndDocStringPass()(model)  # notes of source files, and what the names say by now


class _RotateInPlace(pattern.RewriteRuleClassBase):
    """Rotate heads where they lie, behind tokens, and not before them."""

    def pattern(self, op: Any, x: ir.Value, cos: ir.Value, sin: ir.Value) -> Any:
        """`x[1, T, H, D]` with heads before tokens, rotated."""
        heads_first = op.Transpose(x, perm=[0, 2, 1, 3])
        return op.RotaryEmbedding(heads_first, cos, sin, _allow_other_attributes=True, _outputs=["rotated"])

    def rewrite(self, op: Any, x: ir.Value, cos: ir.Value, sin: ir.Value, rotated: ir.Value) -> Any:
        """The operator's form for `[1, T, H * D]`, which takes the number of heads."""
        node = rotated.producer()
        assert node is not None
        assert x.shape is not None
        _, tokens, heads, size = x.shape
        flat = op.Reshape(x, op.Constant(value_ints=[0, 0, -1]))
        flat.shape, flat.type = ir.Shape([1, tokens, heads * size]), x.type
        attributes = {**{name: a.value for name, a in node.attributes.items()}, "num_heads": heads}
        flat = op.RotaryEmbedding(flat, cos, sin, **attributes)
        return op.Transpose(op.Reshape(flat, op.Constant(value_ints=[0, 0, heads, size])), perm=[0, 2, 1, 3])


class _ThereAndBack(pattern.RewriteRuleClassBase):
    """`[1, T, H, D]` to `[T, H, D]`, by way of `[1, H, T, D]`."""

    def pattern(self, op: Any, x: ir.Value, axes: ir.Value) -> Any:
        """`axes` is [0]: the other dimensions are not 1 for certain."""
        return op.Transpose(op.Squeeze(op.Transpose(x, perm=[0, 2, 1, 3]), axes), perm=[1, 0, 2])

    def rewrite(self, op: Any, x: ir.Value, axes: ir.Value) -> Any:
        """Without the way."""
        return op.Squeeze(x, axes)


class _BackAndThere(pattern.RewriteRuleClassBase):
    """`[T, H, D]` to `[1, T, H, D]`, by way of `[H, T, D]`."""

    def pattern(self, op: Any, x: ir.Value, axes: ir.Value) -> Any:
        """`axes` is [0]."""
        return op.Transpose(op.Unsqueeze(op.Transpose(x, perm=[1, 0, 2]), axes), perm=[0, 2, 1, 3])

    def rewrite(self, op: Any, x: ir.Value, axes: ir.Value) -> Any:
        """Without the way."""
        return op.Unsqueeze(x, axes)


def _merge_views(graph: ir.Graph) -> None:
    """Give memory another shape once, and not several times in a row."""
    for node in graph:
        source = _seen(node)
        if source is None or source is node.inputs[0]:
            continue
        sizes = [size if isinstance(size, int) else -1 for size in node.outputs[0].shape or (-1, -1)]
        if sizes.count(-1) > 1 or 0 in sizes:  # what a 0 means is another matter
            continue
        shape = ir.node("Constant", [], {"value_ints": sizes})
        view = ir.node("Reshape", [source, *shape.outputs])
        ir.convenience.replace_nodes_and_values(graph, node, [node], [shape, view], node.outputs, view.outputs)


def _seen(node: ir.Node) -> ir.Value | None:
    """What `node` and the views before it give another shape; None if it is no view."""
    value: ir.Value | None = None
    before: ir.Node | None = node
    while before is not None and before.op_type in _VIEWS:
        value = before.inputs[0]
        assert value is not None
        before = value.producer()
    return value


def _ask_inputs(graph: ir.Graph) -> None:
    """Take every size from the input that has it: what is computed from one can then be seen to be the same."""
    known = {
        size: (value, dim)
        for value in graph.inputs
        for dim, size in enumerate(value.shape or ())
        if isinstance(size, ir.SymbolicDim)
    }
    for node in graph:
        asked = _asked(node)
        if len(asked) == 1 and asked[0] in known:
            value, dim = known[asked[0]]
            node.replace_input_with(0, value)
            node.attributes["start"], node.attributes["end"] = ir.AttrInt64("start", dim), ir.AttrInt64("end", dim + 1)


def _asked(node: ir.Node) -> list[Any]:
    """The sizes that a `Shape` gives; none if it is another node."""
    if node.op_type != "Shape" or node.inputs[0] is None or node.inputs[0].shape is None:
        return []
    return list(node.inputs[0].shape)[node.attributes.get_int("start", 0) : node.attributes.get_int("end", None)]
