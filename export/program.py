"""From one of our graphs to a `torch.export.ExportedProgram`, which exporters take."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim, ExportedProgram
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from emssd_compile.errors import UnsupportedModelError
from emssd_compile.passes.graph import aten, inputs, shape

_HINT = 61
"""Length of the first dynamic dimension while tracing; the next ones are longer, since no two may look alike."""


def exported_program(graph_module: fx.GraphModule) -> ExportedProgram:
    """Export a graph of level L2 or L3, or what a target's passes made of one.

    Inputs keep their order and names, results their names where the graph returns a dict. A dimension that is a symbol
    in the inputs' fake values may be of any size, 0 and 1 included; two that are the same symbol are one dimension, two
    that are not may differ or agree. Weights are shared with the graph.

    Raises:
        UnsupportedModelError: an op of the graph decides something by a size.
    """
    args, shapes = _examples(inputs(graph_module.graph))
    oblivious = torch.fx.experimental._config.patch(backed_size_oblivious=True)  # type: ignore[attr-defined]
    try:
        with torch.no_grad(), oblivious:
            return torch.export.export(_without_reshape(graph_module), args, dynamic_shapes=shapes, strict=False)
    except RuntimeError as error:
        found = " ".join(line.strip(" -") for line in str(error).strip().splitlines()[:2])
        raise UnsupportedModelError(f"the graph cannot be exported for all sizes: {found}") from error


def _examples(nodes: Iterable[fx.Node]) -> tuple[tuple[Tensor, ...], tuple[dict[int, Dim] | None, ...]]:
    """An example of each input, without memory behind it, and its dynamic dimensions."""
    fake_mode = FakeTensorMode(shape_env=ShapeEnv(tracked_fakes=[]), allow_non_fake_inputs=True)
    dims: dict[sympy.Expr, Dim] = {}
    hints: dict[sympy.Expr, int] = {}
    args, shapes = [], []
    for node in nodes:
        value: Tensor = node.meta["val"]
        exprs = {i: s.node.expr for i, s in enumerate(shape(node) or ()) if isinstance(s, torch.SymInt)}
        symbolic = {i: expr for i, expr in exprs.items() if expr.free_symbols}
        for expr in symbolic.values():
            dims.setdefault(expr, Dim(f"size_{len(dims)}", min=0))
            hints.setdefault(expr, _HINT + 2 * len(hints))
        sizes: list[Any] = [hints[symbolic[i]] if i in symbolic else int(s) for i, s in enumerate(value.shape)]
        with fake_mode:
            args.append(torch.empty(sizes, dtype=value.dtype, device=value.device))
        shapes.append({i: dims[expr] for i, expr in symbolic.items()} or None)
    return tuple(args), tuple(shapes)


def _without_reshape(graph_module: fx.GraphModule) -> fx.GraphModule:
    """A copy in which each `reshape` is a `view`, of a clone where it copies.

    `reshape` is the one op that asks whether a size is 1 while it is exported. What it finds does not depend on that
    here: its result in the graph's fake values, which hold for all sizes, says whether it copies.
    """
    graph = fx.Graph()
    graph.output(graph.graph_copy(graph_module.graph, {}))
    for node in graph.find_nodes(op="call_function", target=aten.reshape.default):
        source = node.args[0]
        if not torch._C._is_alias_of(source.meta["val"], node.meta["val"]):  # type: ignore[attr-defined]
            with graph.inserting_before(node):
                source = graph.call_function(aten.clone.default, (source,), {"memory_format": torch.contiguous_format})
        node.target, node.args = aten.view.default, (source, *node.args[1:])
    return fx.GraphModule(graph_module, graph, class_name=graph_module._get_name())
