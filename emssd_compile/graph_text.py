"""A captured graph as text and back: nodes as JSON, fake values computed anew.

What it can say is what a capture of most models leaves: ATen ops and arithmetic of sizes, numbers, dtypes and other
plain arguments, one symbol for the number of tokens. Of any other graph it says so, by `UnwritableError`.
"""

from __future__ import annotations

import json
import operator
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import Dim
from torch.fx._lazy_graph_module import _LazyGraphModule
from torch.utils import _pytree as pytree
from torch.utils._sympy.numbers import int_oo

from emssd_compile.capture import EXAMPLE_TOKENS, without_fake_cache
from emssd_compile.functional import ON_SIZES
from emssd_compile.passes.graph import placeholder
from emssd_compile.passes.manager import propagate

_TOLD = ("nn_module_stack", "stack_trace")
"""What is kept of a node's `meta`, beside its value; nodes share most of it."""
_LARGEST = 4096
"""Elements of a tensor that is written."""
_NAMED = {"dtype": torch.dtype, "layout": torch.layout, "memory_format": torch.memory_format}
_OPERATORS = {name: value for name, value in vars(operator).items() if callable(value) and not name.startswith("_")}
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{f"operator.{name}": value for name, value in _OPERATORS.items()},
    **{f"torch.{function.__name__}": function for function in ON_SIZES},
}
"""What nodes may call, beside ops."""
_WORDS = {function: word for word, function in _FUNCTIONS.items()}


class UnwritableError(Exception):
    """The graph holds something that this text has no word for."""


def write(graph_module: fx.GraphModule, names: Mapping[int, str]) -> str:
    """The graph as text.

    Args:
        graph_module: level L0, as it was captured.
        names: of the tensors that it may hold, by their ids.

    Raises:
        UnwritableError: it cannot be written such that the same is read.
    """
    numbers = {node: number for number, node in enumerate(graph_module.graph.nodes)}
    told: dict[str, int] = {}
    nodes = []
    for node in graph_module.graph.nodes:
        target = _word(node.target) if node.op == "call_function" else node.target
        if node.op == "get_attr":
            held = getattr(graph_module, node.target)
            target = [node.target, names.get(id(held)), *(() if id(held) in names else _constant(held))]
        about = [json.dumps(_packed(node.meta.get(key), numbers)) for key in _TOLD]
        places = [told.setdefault(text, len(told)) for text in about]
        nodes.append([node.op, node.name, target, _packed(node.args, numbers), _packed(node.kwargs, numbers), *places])
    return json.dumps({"range": _range(graph_module), "told": [*told], "nodes": nodes})


def read(text: str, tensors: Mapping[str, Tensor]) -> fx.GraphModule:
    """The graph of a text that `write` gave.

    Args:
        text: it.
        tensors: by the names that `write` was given.
    """
    content = json.loads(text)
    told = [json.loads(each) for each in content["told"]]
    root, graph, nodes = nn.Module(), fx.Graph(), list[fx.Node]()
    for op, name, target, args, kwargs, *places in content["nodes"]:
        if op == "get_attr":
            target, path, *constant = target
            held = tensors[path] if path is not None else _made(*constant)
            if isinstance(held, nn.Parameter):
                root.register_parameter(target, held)
            else:
                root.register_buffer(target, held)
        elif op == "call_function":
            target = _meaning(target)
        nodes.append(graph.create_node(op, target, _unpacked(args, nodes), _unpacked(kwargs, nodes), name))
        nodes[-1].meta = {key: _unpacked(told[place], nodes) for key, place in zip(_TOLD, places, strict=True)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # get_attr of flat names
        graph_module = _LazyGraphModule(root, graph, class_name="CapturedModel")
    device = next((tensor.device for tensor in tensors.values()), torch.device("cpu"))
    ids = _fake_ids(device, *content["range"])
    placeholder(graph, "input_ids").meta["val"] = ids
    placeholder(graph, "positions").meta["val"] = torch.empty_like(ids, dtype=torch.int64)
    with without_fake_cache():
        propagate(graph_module, ids.fake_mode)
    return graph_module


def same(first: fx.GraphModule, second: fx.GraphModule) -> bool:
    """Whether two graphs are the same, their values and what they hold included."""
    if len(first.graph.nodes) != len(second.graph.nodes) or _range(first) != _range(second):
        return False
    held = {str(node.target) for node in first.graph.find_nodes(op="get_attr")}
    return all(a == b for a, b in zip(_said(first), _said(second), strict=True)) and all(
        _alike(getattr(first, name), getattr(second, name)) for name in held
    )


def _said(graph_module: fx.GraphModule) -> Iterator[object]:
    """All that is compared of each node."""
    symbol = re.compile(rf"\b{_tokens(graph_module).node.expr}\b")
    for node in graph_module.graph.nodes:
        form = symbol.sub("T", repr(pytree.tree_map(_form, node.meta.get("val"))))
        about = [node.meta.get(key) for key in _TOLD]
        yield node.op, node.name, node.target, repr(node.args), repr(node.kwargs), about, form


def _form(value: object) -> object:
    """What a fake value says; gradients are nobody's business here."""
    if not isinstance(value, Tensor):
        return value
    return value.dtype, value.device, value.shape, value.stride(), value.storage_offset()


def _alike(first: Tensor, second: Tensor) -> bool:
    """Whether it is the same tensor, or a constant that says the same."""
    if first is second:
        return True
    is_constant = first.numel() <= _LARGEST and first.dtype == second.dtype and first.device == second.device
    return is_constant and torch.equal(first, second)


def _tokens(graph_module: fx.GraphModule) -> torch.SymInt:
    """T."""
    tokens: torch.SymInt = placeholder(graph_module.graph, "input_ids").meta["val"].shape[1]
    return tokens


def _range(graph_module: fx.GraphModule) -> tuple[int, int | None]:
    """The least and the most tokens that the graph is for; None: there is no most."""
    tokens = _tokens(graph_module)
    if not tokens.node.expr.is_Symbol:
        raise UnwritableError(f"the number of tokens is {tokens}")
    bounds = tokens.node.shape_env.bound_sympy(tokens.node.expr)
    return int(bounds.lower), None if bounds.upper in (int_oo, float("inf")) else int(bounds.upper)


def _constant(held: Any) -> tuple[str, str, Any]:
    """A tensor that the forward makes of numbers: its dtype, device and values."""
    if type(held) is not Tensor or held.numel() > _LARGEST or not held.is_contiguous() or held.is_complex():
        raise UnwritableError(f"a {type(held).__name__} of {getattr(held, 'shape', '')} is held")
    return str(held.dtype).removeprefix("torch."), str(held.device), held.tolist()


def _made(dtype: str, device: str, values: Any) -> Tensor:
    return torch.tensor(values, dtype=getattr(torch, dtype), device=device)


class _Ids(nn.Module):
    def forward(self, input_ids: Tensor) -> Tensor:
        return input_ids + 0


def _fake_ids(device: torch.device, least: int, most: int | None) -> FakeTensor:
    """Ids `[1, T]` as export makes them, with a mode and a symbol of their own."""
    tokens = Dim.AUTO if most is None else Dim.AUTO(min=least, max=most)
    example = torch.arange(EXAMPLE_TOKENS, device=device)[None]
    with torch.no_grad(), without_fake_cache():
        program = torch.export.export(_Ids(), (example,), dynamic_shapes=({1: tokens},), strict=False)
    ids: FakeTensor = placeholder(program.graph, "input_ids").meta["val"]
    return ids


def _word(target: Any) -> str:
    """The name of what a node calls."""
    if isinstance(target, torch._ops.OpOverload):
        return f"ops.{target}"
    if target not in _WORDS:
        raise UnwritableError(f"{target} is called")
    return _WORDS[target]


def _meaning(word: str) -> Callable[..., Any]:
    if word in _FUNCTIONS:
        return _FUNCTIONS[word]
    _, namespace, name, overload = word.split(".")
    op: Callable[..., Any] = getattr(getattr(getattr(torch.ops, namespace), name), overload)
    return op


def _packed(value: Any, numbers: Mapping[fx.Node, int]) -> Any:
    """An argument in JSON: what JSON does not know is an object with one member, its kind."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, fx.Node):
        return {"node": numbers[value]}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    for kind, known in _NAMED.items():
        if isinstance(value, known):
            return {kind: str(value).removeprefix("torch.")}
    if isinstance(value, slice):
        return {"slice": _packed([value.start, value.stop, value.step], numbers)}
    if isinstance(value, tuple) and type(value) is tuple:
        return {"tuple": [_packed(item, numbers) for item in value]}
    if isinstance(value, list):
        return [_packed(item, numbers) for item in value]
    if isinstance(value, dict) and all(type(key) is str for key in value):
        return {"dict": {key: _packed(item, numbers) for key, item in value.items()}}
    raise UnwritableError(f"{type(value).__name__} {value} is an argument")


def _unpacked(value: Any, nodes: list[fx.Node]) -> Any:
    if isinstance(value, list):
        return [_unpacked(item, nodes) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "node":
        return nodes[content]
    if kind == "device":
        return torch.device(content)
    if kind in _NAMED:
        return getattr(torch, content)
    if kind == "dict":
        return {key: _unpacked(item, nodes) for key, item in content.items()}
    items = [_unpacked(item, nodes) for item in content]
    return slice(*items) if kind == "slice" else tuple(items)
