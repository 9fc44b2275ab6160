"""Trace a function of tensors, and put one graph into another."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx._lazy_graph_module import _use_lazy_graph_module
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from emssd_compile.passes.graph import basis_of
from emssd_compile.passes.graph import inputs as graph_inputs
from emssd_compile.step.fields import key_name

Tensors = dict[str, Tensor]


def trace(function: Callable[[Tensors], Tensors], inputs: Tensors, fake_mode: FakeTensorMode) -> fx.GraphModule:
    """The ATen graph of `function`, for fake `inputs`; its inputs and outputs keep their names.

    Raises:
        ValueError: `function` takes a size that differs from step to step for a number, or for another size.
    """
    names = list(inputs)
    result_names: list[str] = []

    def flat(*values: Tensor) -> list[Tensor]:
        results = function(dict(zip(names, values, strict=True)))
        result_names[:] = list(results)
        return list(results.values())

    sizes: list[tuple[str, Any]] = [
        (name, size) for name in names for size in inputs[name].shape if isinstance(size, torch.SymInt)
    ]
    symbols = [size.node.expr for _, size in sizes]
    allowed, fake_mode.allow_non_fake_inputs = fake_mode.allow_non_fake_inputs, True  # weights of drafters are real
    try:
        # Composite ops in Python: in C++ some read sizes as numbers (matmul of torch 2.11).
        with fake_mode, torch.no_grad(), enable_python_dispatcher(), _use_lazy_graph_module(True):
            traced = make_fx(flat)(*_distinct(inputs.values()))
    finally:
        fake_mode.allow_non_fake_inputs = allowed
    for (name, size), symbol in zip(sizes, symbols, strict=True):
        if size.node.expr != symbol:
            raise ValueError(f"a size of {name} differs from step to step, and was taken for {size.node.expr}")
    placeholders = [n for n in traced.graph.nodes if n.op == "placeholder"]
    for node, name in zip(placeholders, names, strict=True):
        node.target = name
    traced.meta["results"] = result_names
    return traced


def _distinct(values: Iterable[Tensor]) -> list[Tensor]:
    """The fake values, of which several nodes may have one, as an object each: by these a trace tells its inputs."""
    found: list[Tensor] = []
    for value in values:
        found.append(torch.ops.aten.alias(value) if any(value is other for other in found) else value)
    return found


def inline(
    into: fx.GraphModule, source: fx.GraphModule, inputs: dict[str, fx.Node], *, keeps_values: bool = False
) -> Any:
    """Copy `source` to the insertion point of `into`; returns what it returned, as nodes of `into`.

    Args:
        into: grows by the nodes and attributes of `source`.
        source: a graph whose placeholders are named in `inputs`.
        inputs: the value of each placeholder.
        keeps_values: the fake values in `source` follow from those of `inputs`, and need not be computed again.
    """
    values: dict[fx.Node, fx.Node] = {}
    renamed: dict[str, str] = {}
    for node in source.graph.nodes:
        if node.op == "placeholder":
            values[node] = inputs[node.target]
        elif node.op == "get_attr":
            name = renamed.setdefault(node.target, _adopt(into, source, node.target))
            values[node] = into.graph.get_attr(name)
            values[node].meta = dict(node.meta)
        elif node.op == "output":
            return fx.node.map_arg(node.args[0], lambda n: values[n])
        else:
            values[node] = into.graph.node_copy(node, lambda n: values[n])
        if keeps_values and "val" in node.meta and not _is_real(node.meta["val"]):
            values[node].meta["val_basis"] = basis_of(values[node])
    raise AssertionError("a graph has an output")


def _is_real(value: object) -> bool:
    return isinstance(value, Tensor) and not isinstance(value, FakeTensor)


def _adopt(into: fx.GraphModule, source: fx.GraphModule, name: str) -> str:
    value = getattr(source, name)
    for existing, held in [*into.named_parameters(recurse=False), *into.named_buffers(recurse=False)]:
        if held is value:
            return existing
    unique = name.lstrip("_")
    while hasattr(into, unique):
        unique += "_"
    if isinstance(value, torch.nn.Parameter):
        into.register_parameter(unique, value)
    else:
        into.register_buffer(unique, value, persistent=False)
    return unique


def inline_function(
    into: fx.GraphModule, function: Callable[..., Any], arguments: tuple[Any, ...], fake_mode: FakeTensorMode
) -> Any:
    """Trace `function` and inline it.

    Args:
        into: grows by its ops, at the insertion point.
        function: of tensors, or of dataclasses and dicts that hold tensors (`step.fields`).
        arguments: what it is called with, nodes of `into` in the place of tensors.
        fake_mode: of the graph.

    Returns:
        What it returned, nodes in the place of tensors.
    """
    leaves, spec = pytree.tree_flatten_with_path(arguments)
    nodes: dict[str, fx.Node] = {}
    for path, leaf in leaves:
        name = _readable(path)
        nodes[f"{name} of argument {key_name(path[0])}" if name in nodes else name] = leaf
    returned: list[Any] = []

    def flat(given: Tensors) -> Tensors:
        results, form = pytree.tree_flatten(function(*pytree.tree_unflatten(list(given.values()), spec)))
        returned[:] = [form]
        return {str(index): value for index, value in enumerate(results)}

    traced = trace(flat, {name: node.meta["val"] for name, node in nodes.items()}, fake_mode)
    return pytree.tree_unflatten(list(inline(into, traced, nodes, keeps_values=True)), returned[0])


def _readable(path: tuple[Any, ...]) -> str:
    """What a message calls an argument: fields and keys on the way to it; which argument it is, if there are none."""
    return ".".join(map(key_name, path[1:] or path))


def add_input(graph: fx.Graph, name: str, value: Tensor, role: str | None = None) -> fx.Node:
    """A new input, after those there are; `role` (`signature.ROLES`) goes to its metadata."""
    placeholders = graph_inputs(graph)
    with graph.inserting_after(placeholders[-1]) if placeholders else graph.inserting_before():
        node = graph.placeholder(name)
    node.meta["val"] = value
    if role is not None:
        node.meta["role"] = role
    return node
