"""What every pass needs to ask of a graph: where tokens are, what depends on them, and what a subgraph computes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext, statically_known_true

from emssd_compile.errors import UnsupportedModelError
from emssd_compile.functional import argument as argument  # there, since capturing brings no sympy

aten = torch.ops.aten

SHAPE_ONLY = frozenset(
    {
        aten.sym_size.int,
        aten.new_ones.default,
        aten.new_zeros.default,
        aten.new_full.default,
        aten.new_empty.default,
        aten.zeros_like.default,
        aten.ones_like.default,
        aten.full_like.default,
        aten.empty_like.default,
    }
)
"""Ops whose result depends on the shape of their first argument, never on its values."""


_UNTAGGED_POINTWISE = frozenset(
    {
        *(aten.__and__.Tensor, aten.__and__.Scalar, aten.__or__.Tensor, aten.__or__.Scalar),
        *(aten.__xor__.Tensor, aten.__xor__.Scalar, aten.rsub.Tensor, aten.masked_fill.Tensor),
        *(aten.floor_divide.default, aten.floor_divide.Scalar),
        *(aten.where.Scalar, aten.where.ScalarSelf, aten.where.ScalarOther),
    }
)


def is_pointwise(target: Any) -> bool:
    """Whether an op computes each element of its result from the elements of its operands at the same place."""
    return target in _UNTAGGED_POINTWISE or torch.Tag.pointwise in getattr(target, "tags", ())


def inputs(graph: fx.Graph) -> list[fx.Node]:
    """The inputs, in order."""
    found: list[fx.Node] = graph.find_nodes(op="placeholder")
    return found


def placeholder(graph: fx.Graph, name: str) -> fx.Node:
    """The input called `name`."""
    for node in inputs(graph):
        if node.target == name:
            return node
    raise KeyError(f"the graph has no input named {name}")


def output(graph: fx.Graph) -> fx.Node:
    """The output node."""
    node: fx.Node = graph.output_node()
    return node


def shape(node: fx.Node) -> tuple[int | torch.SymInt, ...] | None:
    """Shape of the tensor that `node` computes; None if it computes something else."""
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, Tensor) else None


def token_symbol(graph: fx.Graph) -> sympy.Symbol:
    """The symbol T: the number of packed tokens."""
    size = placeholder(graph, "input_ids").meta["val"].shape[-1]
    return size.node.expr


def has_symbol(size: int | torch.SymInt, symbol: sympy.Symbol) -> bool:
    """Whether a size depends on `symbol`."""
    return isinstance(size, torch.SymInt) and symbol in size.node.expr.free_symbols


def token_dims(node: fx.Node, symbol: sympy.Symbol) -> tuple[int, ...]:
    """Dimensions of `node` whose size depends on the number of tokens."""
    return tuple(d for d, size in enumerate(shape(node) or ()) if has_symbol(size, symbol))


def same_size(a: int | torch.SymInt, b: int | torch.SymInt) -> bool:
    """Whether two sizes are equal for every number of tokens; never adds a guard."""
    return bool(statically_known_true(a == b))


def data_dependent(graph: fx.Graph) -> set[fx.Node]:
    """Nodes whose values depend on the token ids, not just on how many there are."""
    found: set[fx.Node] = {placeholder(graph, "input_ids")}
    for node in graph.nodes:
        if node.target not in SHAPE_ONLY and any(n in found for n in node.all_input_nodes):
            found.add(node)
    return found


def ancestors(nodes: Iterable[fx.Node], *, values_only: bool = False) -> set[fx.Node]:
    """`nodes` and everything they are computed from; with `values_only`, not what they take a shape from."""
    found: set[fx.Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            if not (values_only and node.target in SHAPE_ONLY):
                stack.extend(node.all_input_nodes)
    return found


def literals(nodes: Iterable[fx.Node]) -> set[int]:
    """Positive integers that stand as arguments of `nodes`."""
    found: set[int] = set()

    def note(leaf: Any) -> Any:
        if type(leaf) is int and 0 < leaf < 2**31:
            found.add(leaf)
        return leaf

    for node in nodes:
        if node.op == "call_function":
            fx.node.map_aggregate((node.args, node.kwargs), note)
    return found


def attribute(graph_module: fx.GraphModule, node: fx.Node) -> Tensor:
    """The tensor that a `get_attr` node reads."""
    value = getattr(graph_module, str(node.target))
    assert isinstance(value, Tensor)
    return value


def read_attributes(graph_module: fx.GraphModule) -> set[str]:
    """Names of the attributes whose values a pass has looked at: what it made of them may stand in the graph."""
    found: set[str] = graph_module.meta.setdefault("read_attributes", set())
    return found


def origin(node: fx.Node) -> str:
    """Where `node` came from in the user's model: the innermost module, or the source line."""
    stack = node.meta.get("nn_module_stack")
    if stack:
        path, cls = list(stack.values())[-1]
        name = cls if isinstance(cls, str) else cls.__name__
        return f"{path.removeprefix('model.') or '(root)'} ({name.rsplit('.', 1)[-1]})"
    return "the model's forward"


def refuse(node: fx.Node, reason: str, remedy: str = "", longest: int | None = None) -> UnsupportedModelError:
    """The error for a node that no pass can handle: which node, its op, its module, and why."""
    return UnsupportedModelError(
        reason, node=node.name, op=str(node.target), module=origin(node), remedy=remedy or None, longest=longest
    )


class Evaluator:
    """Computes values of nodes for a concrete number of tokens, without running the whole model.

    Used to recognise what a subgraph *means* (a mask, positions) by what it computes. Values of tensors that depend on
    token ids are never computed: only their shapes may be asked for.

    Args:
        graph_module: an L0 or L1 graph.
        tokens: the value of T.
        given: values to take for some nodes instead of computing them.
    """

    def __init__(
        self,
        graph_module: fx.GraphModule,
        tokens: int,
        given: dict[fx.Node, Tensor] | None = None,
    ) -> None:
        self.graph_module = graph_module
        self.tokens = tokens
        self.symbol = token_symbol(graph_module.graph)
        self.values: dict[fx.Node, Any] = dict(given or {})
        ids = placeholder(graph_module.graph, "input_ids")
        self.device = ids.meta["val"].device
        positions = placeholder(graph_module.graph, "positions")
        self.values.setdefault(positions, torch.arange(tokens, device=self.device)[None])

    def __call__(self, node: fx.Node) -> Any:
        """Value of `node`. Raises KeyError if it depends on token ids."""
        for step in self._schedule(node):
            self.values[step] = self._compute(step)
        return self.values[node]

    def _schedule(self, node: fx.Node) -> list[fx.Node]:
        needed: set[fx.Node] = set()
        stack = [node]
        while stack:
            current = stack.pop()
            if current in self.values or current in needed:
                continue
            needed.add(current)
            if current.target not in SHAPE_ONLY:
                stack.extend(current.all_input_nodes)
        return [n for n in self.graph_module.graph.nodes if n in needed]

    def _compute(self, node: fx.Node) -> Any:
        if node.op == "get_attr":
            read_attributes(self.graph_module).add(str(node.target))
            return attribute(self.graph_module, node).detach()
        if node.op != "call_function":
            raise KeyError(f"%{node.name} depends on the token ids")
        if node.target in SHAPE_ONLY:
            return self._call(node, (self.concrete(node.args[0]), *self._arguments(node.args[1:])))
        return self._call(node, self._arguments(node.args))

    def _call(self, node: fx.Node, args: tuple[Any, ...]) -> Any:
        target: Callable[..., Any] = node.target  # type: ignore[assignment]
        with torch.no_grad():
            return target(*args, **self._arguments(node.kwargs))

    def _arguments(self, arguments: Any) -> Any:
        def value(leaf: Any) -> Any:
            if isinstance(leaf, fx.Node):
                return self.values[leaf] if leaf in self.values else self(leaf)
            return leaf

        return fx.node.map_aggregate(arguments, value)

    def concrete_shape(self, node: fx.Node) -> tuple[int, ...]:
        """Shape of `node` with T set."""
        return tuple(
            int(s.node.expr.xreplace({self.symbol: sympy.Integer(self.tokens)})) if isinstance(s, torch.SymInt) else s
            for s in shape(node) or ()
        )

    def concrete(self, node: Any) -> Tensor:
        """A tensor of the shape, dtype and device of `node`; its values mean nothing."""
        value = node.meta["val"]
        return torch.empty(self.concrete_shape(node), dtype=value.dtype, device=value.device)


def scalar(value: Any) -> float | None:
    """A number that stands in a graph as a literal."""
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


@contextmanager
def inserting_for(node: fx.Node) -> Iterator[None]:
    """Insert before `node`; what is inserted is said to be of the module that `node` is of."""
    before = node.prev
    with node.graph.inserting_before(node):
        yield
    inserted = before.next
    while inserted is not node:
        inserted.meta["nn_module_stack"] = node.meta.get("nn_module_stack")
        inserted = inserted.next


def call(graph: fx.Graph, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
    """Insert a call at the graph's insertion point and compute its fake value at once."""
    node = graph.call_function(target, args, kwargs)
    node.meta["val"] = fake_result(node)
    return node


def fake_result(node: fx.Node) -> Any:
    """What a call gives for the fake values of its arguments."""
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    assert callable(node.target)
    with enable_python_dispatcher():  # as export does: the C++ `matmul` of torch 2.11 asks for concrete sizes, fixing T
        return node.target(*args, **kwargs)


def basis_of(node: fx.Node) -> tuple[Any, ...]:
    """What the fake value of a node follows from: as long as all of it is the same objects, the value stays what it is.

    `meta["val_basis"]` is what it was when the value was computed last.
    """
    return node.target, node.args, node.kwargs, *(n.meta["val"] for n in node.all_input_nodes)


def is_current(node: fx.Node) -> bool:
    """Whether the fake value of a node is known to follow from what it is computed of."""
    basis, last = basis_of(node), node.meta.get("val_basis", ())
    return len(last) == len(basis) and all(a is b for a, b in zip(last, basis, strict=True))


def keep_values(graph: fx.Graph) -> None:
    """Have the fake values in a graph that was traced just now count as computed.

    Not those with sizes that are more than symbols times numbers: there are several ways to write these.
    """
    for node in graph.nodes:
        value = node.meta.get("val")
        is_simple = isinstance(value, FakeTensor) and all(map(_is_simple, (*value.shape, *value.stride())))
        if is_simple and all("val" in source.meta for source in node.all_input_nodes):
            node.meta["val_basis"] = basis_of(node)


def _is_simple(size: int | torch.SymInt) -> bool:
    return isinstance(size, int) or not size.node.expr.has(sympy.Function, sympy.Add, sympy.Pow)


def copied(graph: fx.Graph) -> fx.Graph:
    """The same graph anew; its fake values count as computed where they do."""
    copy, nodes = fx.Graph(), dict[fx.Node, fx.Node]()
    copy.output(copy.graph_copy(graph, nodes))
    for node, twin in nodes.items():
        if is_current(node):
            twin.meta["val_basis"] = basis_of(twin)
    return copy


def fresh_index(fake_mode: FakeTensorMode, device: torch.device) -> Tensor:
    """A fake int64 index whose length is a new symbol."""
    context: StatelessSymbolicContext[Any, Any] = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])
    example = torch.zeros(7, dtype=torch.int64, device=device)
    return fake_mode.from_tensor(example, static_shapes=False, symbolic_context=context)


def results(graph: fx.Graph) -> tuple[fx.Node, ...]:
    """What an L2 graph returns: hidden states, logits, and the outputs of tapped layers."""
    return tuple(output(graph).args[0])  # type: ignore[arg-type]


def caches(graph: fx.Graph) -> dict[str, Tensor]:
    """The KV caches of an L2 graph: fake values by input name."""
    return {str(n.target): n.meta["val"] for n in inputs(graph) if n.meta.get("role") == "cache"}
