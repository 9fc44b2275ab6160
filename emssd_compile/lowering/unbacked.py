"""A graph in the form that Inductor compiles once for all sizes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.value_ranges import ValueRanges, bound_sympy

from emssd_compile.ops import source_hash

# Inductor's checks of its own output cost 7 % of a step of 8 rows of a small model on a CPU.
OPTIONS: dict[str, Any] = {
    "size_asserts": False,
    "alignment_asserts": False,
    "triton.cudagraphs": False,  # the runtime captures whole steps itself
}
"""Options of Inductor that hold however the compiled step is kept."""


class SizeTakenError(ValueError):
    """What is compiled would hold for one size only."""


class _OpenSizes(ShapeEnv):
    """Sizes that nothing is concluded about. Inductor takes `[4 u, 4]` viewed as `[u, 16]` to say that u is 1."""

    def _set_replacement(self, symbol: sympy.Symbol, value: sympy.Expr, reason: str) -> None:
        raise SizeTakenError(f"a size that differs from step to step is taken for {value}")


@dataclass(frozen=True)
class UnbackedGraph:
    """A graph whose sizes are unbacked symbols: the compiler may assume nothing about them but that none is 0.

    So a length of 1, or two lengths that happen to be equal, needs no other code; and an op that would decide something
    by a size cannot be compiled wrongly, only not at all: what Inductor concludes about a size is refused.

    Attributes:
        graph_module: the graph; it returns a tuple.
        inputs: a fake value for each of its inputs.
        result_names: what the items of the tuple are.
        fake_mode: of the inputs.
    """

    graph_module: fx.GraphModule
    inputs: tuple[Tensor, ...]
    result_names: tuple[str, ...]
    fake_mode: FakeTensorMode

    @contextlib.contextmanager
    def compiling(self) -> Iterator[None]:
        """What Inductor has to run in."""
        # Inductor's cache on disk does not look into custom ops: it would serve a graph compiled for an older form of
        # ours.
        tag = torch.compiler.config.patch(cache_key_tag=f"emssd-{source_hash()}")  # type: ignore[attr-defined]
        with tag, torch.no_grad(), torch._guards.tracing(torch._guards.TracingContext(self.fake_mode)):
            yield


def unbacked(graph_module: fx.GraphModule) -> UnbackedGraph:
    """Copy a graph that returns a dict; sizes that are symbols in its inputs' fake values become unbacked ones."""
    graph = fx.Graph()
    results = graph.graph_copy(graph_module.graph, {})
    assert isinstance(results, dict)
    graph.output(tuple(results.values()))
    _split_reshapes(graph)
    fake_mode = FakeTensorMode(shape_env=_OpenSizes(), allow_non_fake_inputs=True)
    sizes: dict[sympy.Expr, torch.SymInt] = {}
    inputs = []
    for node in graph.find_nodes(op="placeholder"):
        given = node.meta["val"]
        shape = [_size(size, sizes, fake_mode) for size in given.shape]
        with fake_mode:
            value = torch.empty(shape, dtype=given.dtype, device=given.device)
            if not given.is_contiguous():  # a weight
                value = torch.empty_strided(shape, given.stride(), dtype=given.dtype, device=given.device)
        node.meta["val"] = value  # with a C++ wrapper, Inductor takes its inputs from here
        inputs.append(value)
    copy = fx.GraphModule(graph_module, graph, class_name=graph_module._get_name())
    return UnbackedGraph(copy, tuple(inputs), tuple(results), fake_mode)


def _split_reshapes(graph: fx.Graph) -> None:
    """Have each reshape either split dimensions or merge them: of one that does both Inductor takes a size for known.

    before:  %y[u,6] = reshape(%x[3u,2], [u, -1])
    after:   %y[u,6] = reshape(reshape(%x[3u,2], [-1, 3, 2]), [u, -1])
    """
    reshape = torch.ops.aten.reshape.default
    for node in [*graph.nodes]:
        if node.target not in (reshape, torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default):
            continue
        (source,) = (argument for argument in node.args[:1] if isinstance(argument, fx.Node))
        before, after = ([_expression(size) for size in each.meta["val"].shape] for each in (source, node))
        parts = _common_parts(before, after)
        if parts in (None, before, after) or sum(not part.is_Integer for part in parts) > 1:
            continue
        sizes = [int(part) if part.is_Integer else -1 for part in parts]
        with graph.inserting_before(node):
            split = graph.call_function(reshape, (source, sizes))
        node.replace_input_with(source, split)


def _common_parts(before: list[sympy.Expr], after: list[sympy.Expr]) -> list[sympy.Expr] | None:
    """The fewest sizes that give both shapes where neighbours are merged; None if that cannot be told."""
    olds, news, parts = before[::-1], after[::-1], list[sympy.Expr]()
    while olds and news:
        old, new = olds.pop(), news.pop()
        for size, other, rest in ((new, old, olds), (old, new, news)):
            left, denominator = sympy.fraction(sympy.cancel(other / size)) if size else (0, 0)
            if denominator == 1:
                parts.append(size)
                rest += [left] if left != 1 else []
                break
        else:
            return None
    return parts + olds[::-1] + news[::-1] if {*olds, *news} <= {sympy.Integer(1)} else None


def _expression(size: int | torch.SymInt) -> sympy.Expr:
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)


def _size(
    size: int | torch.SymInt, known: dict[sympy.Expr, torch.SymInt], fake_mode: FakeTensorMode
) -> int | torch.SymInt:
    if not isinstance(size, torch.SymInt) or not size.node.expr.free_symbols:
        return int(size)
    if size.node.expr not in known:
        shape_env = fake_mode.shape_env
        assert shape_env is not None
        with shape_env.ignore_fresh_unbacked_symbols():
            known[size.node.expr] = shape_env.create_unbacked_symint()
        torch._check(known[size.node.expr] >= _least(size.node.expr))
    return known[size.node.expr]


def _least(size: sympy.Expr) -> int:
    """What a size is at least, where a step is never without tokens or rows."""
    ranges = dict.fromkeys(size.free_symbols, ValueRanges(sympy.Integer(1), int_oo))
    return max(0, int(bound_sympy(size, ranges).lower))
