"""Runs passes: times them, cleans up after them, checks what they promise, records what they did.

A pass is an object with a `name`, a docstring, `run(graph_module) -> int` (how many places it changed, truthfully) and
optionally `ensures(graph_module)` (raises if what should hold afterwards does not). Everything else happens here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.fx.passes.graph_transform_observer import GraphTransformObserver

from emssd_compile.errors import EmssdError, UnsupportedModelError
from emssd_compile.passes.graph import basis_of, fake_result, is_current


class Pass(Protocol):
    """One rewrite of the graph."""

    name: str

    def run(self, graph_module: fx.GraphModule) -> int:
        """Rewrite in place; return the number of places changed."""
        ...


@dataclass(frozen=True)
class Refusal:
    """A place a pass looked at and left alone."""

    node: str
    reason: str


@dataclass(frozen=True)
class PassRecord:
    """What one pass did."""

    name: str
    level: str
    changed: int
    nodes_before: int
    nodes_after: int
    seconds: float
    notes: tuple[str, ...] = ()
    refusals: tuple[Refusal, ...] = ()


@dataclass(frozen=True)
class Level:
    """A stage of the graph: the passes that lead to it and the check that it was reached."""

    name: str
    passes: tuple[Pass, ...]
    verify: Callable[[fx.GraphModule], None]


Observer = Callable[[str, fx.GraphModule, PassRecord | None], None]
"""Called as (pass name, graph, None) before a pass and (pass name, graph, record) after it."""


@dataclass
class PassManager:
    """Applies levels in order and keeps the records.

    Args:
        fake_mode: the mode the graph's fake values belong to; used to propagate shapes after every pass.
        observers: called around every pass (dumps and the like).
    """

    fake_mode: FakeTensorMode
    observers: Iterable[Observer] = ()
    records: list[PassRecord] = field(default_factory=list)

    def apply(self, graph_module: fx.GraphModule, levels: Iterable[Level]) -> fx.GraphModule:
        """Run every pass of every level, verifying each level when it is reached.

        Raises:
            UnsupportedModelError: a pass or a level's verifier refuses the graph. An unexpected exception inside a pass
                is reported as one too, naming the pass and those before it.
        """
        for level in levels:
            for step in level.passes:
                self._run(step, level.name, graph_module)
            level.verify(graph_module)
        return graph_module

    def _run(self, step: Pass, level: str, graph_module: fx.GraphModule) -> None:
        for observe in self.observers:
            observe(step.name, graph_module, None)
        before = len(graph_module.graph.nodes)
        start = time.perf_counter()
        try:
            with GraphTransformObserver(graph_module, step.name):
                changed = step.run(graph_module)
            if changed:
                tidy(graph_module, self.fake_mode)
            getattr(step, "ensures", lambda _: None)(graph_module)
        except EmssdError:
            raise
        except Exception as error:
            done = ", ".join(r.name for r in self.records) or "none"
            raise UnsupportedModelError(
                f"pass {step.name} failed with {type(error).__name__}: {error} (passes before it: {done})"
            ) from error
        record = PassRecord(
            step.name,
            level,
            changed,
            before,
            len(graph_module.graph.nodes),
            time.perf_counter() - start,
            tuple(getattr(step, "notes", ())),
            tuple(getattr(step, "refusals", ())),
        )
        self.records.append(record)
        for observe in self.observers:
            observe(step.name, graph_module, record)


def tidy(graph_module: fx.GraphModule, fake_mode: FakeTensorMode) -> None:
    """Dead code out, recompile, fake values recomputed; torch lints a graph before it looks for what is dead."""
    graph_module.graph.eliminate_dead_code()
    graph_module.delete_all_unused_submodules()
    graph_module.recompile()
    propagate(graph_module, fake_mode)


def propagate(graph_module: fx.GraphModule, fake_mode: FakeTensorMode) -> None:
    """Bring the fake value (`meta["val"]`) of every node up to date; inputs keep theirs.

    A value is computed anew only if the node's op, its arguments or the values it reads are other objects than when it
    was computed last, and it stays the same object where it comes out as it was: most passes touch few nodes, and fake
    execution is the slowest part of compiling. What layers do alike is computed for one of them.
    """
    known: dict[Hashable, Any] = {}
    with fake_mode, torch.no_grad():
        for node in graph_module.graph.nodes:
            if is_current(node):
                continue
            if node.op == "get_attr":
                _update(node, fake_mode.from_tensor(getattr(graph_module, node.target), static_shapes=True))
            elif node.op == "call_function":
                _update(node, _known_result(node, known))
            node.meta["val_basis"] = basis_of(node)


def _known_result(node: fx.Node, known: dict[Hashable, Any]) -> Any:
    """The fake result of a call; that of one before, if it had the same arguments but for the values of tensors."""
    key = node.target, _said(node.args), _said(node.kwargs)
    if key in known:
        return known[key]
    value = fake_result(node)
    if not free_unbacked_symbols(value):  # else it is another size each time
        known[key] = value
    return value


def _said(argument: Any) -> Hashable:
    """What a fake result may follow from."""
    value = argument.meta["val"] if isinstance(argument, fx.Node) else argument
    if isinstance(value, FakeTensor):
        return _described(value)
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return value.node.expr  # type: ignore[no-any-return]
    if isinstance(value, (list, tuple)):
        return tuple(map(_said, value))
    if isinstance(value, dict):
        return tuple((name, _said(item)) for name, item in value.items())
    if isinstance(value, slice):
        return slice, _said((value.start, value.stop, value.step))
    return type(value), value


def _update(node: fx.Node, value: Any) -> None:
    """Give the node a fake value, unless the one that it has says the same."""
    last = node.meta.get("val")
    if not (isinstance(last, FakeTensor) and isinstance(value, FakeTensor) and _described(last) == _described(value)):
        node.meta["val"] = value


def _described(value: FakeTensor) -> tuple[Any, ...]:
    """All that a graph's values say; symbols by their expressions, for comparing sizes themselves would add guards."""
    sizes = (*value.shape, *value.stride(), value.storage_offset())
    return value.dtype, value.device, *(size.node.expr if isinstance(size, torch.SymInt) else size for size in sizes)


def drop_unused_weights(graph_module: fx.GraphModule) -> None:
    """Forget weights that no node reads any more."""
    used = {str(n.target) for n in graph_module.graph.nodes if n.op == "get_attr"}
    for store in (graph_module._parameters, graph_module._buffers):
        for name in [n for n in store if n not in used]:
            del store[name]
