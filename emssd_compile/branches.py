"""Decide the branches of a forward that depend on how many tokens there are, while it is captured."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode


class _Undecided(Exception):
    """The condition depends on more than the number of tokens."""


@dataclass(frozen=True)
class Branch:
    """A condition that was decided.

    Attributes:
        node: the node that computes it.
        limit: the most tokens up to which it is what it is for one token.
    """

    node: fx.Node
    limit: int


class DecideBranches(TorchFunctionMode):
    """Within this context, `if tensor:` is decided as for a text of `tokens` tokens.

    Export cannot follow a branch on a tensor. But where the tensor is computed from the number of tokens alone, as in
    rotary frequencies that are chosen by `positions.max() >= trained_length`, it is known for each number, and it
    should be the same for all numbers up to the longest. Conditions that depend on anything else are left to export.

    A forward that turns gradients off, as they are already, is captured as if it did not: of what is within, export
    would make a graph of its own and put it back again, which takes a third of its time.

    Args:
        tokens: the number of tokens to decide for.
        longest: the most tokens that there will be.

    Attributes:
        changing: the branches that are not the same for all numbers of tokens up to `longest`.
    """

    def __init__(self, tokens: int, longest: int) -> None:
        super().__init__()
        self.tokens, self.longest = tokens, longest
        self.changing: list[Branch] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Answer for `Tensor.__bool__`; leave out what would set what is set."""
        if func is torch._C._set_grad_enabled and args[0] == torch.is_grad_enabled():
            return None
        if func is Tensor.__bool__:
            with contextlib.suppress(_Undecided):
                return self._decide(args[0])
        return func(*args, **(kwargs or {}))

    def _decide(self, condition: Tensor) -> bool:
        node = _traced(condition)
        tried = [n for n in _numbers(self.longest) if _holds(node, n) != _holds(node, 1)]
        if tried:
            low, high = max((n for n in _numbers(self.longest) if n < tried[0]), default=1), tried[0]
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (middle, high) if _holds(node, middle) == _holds(node, 1) else (low, middle)
            self.changing.append(Branch(node, low))
        return _holds(node, self.tokens)


def _numbers(longest: int) -> list[int]:
    """Numbers of tokens to ask for: powers of two, and the longest."""
    return sorted({min(2**power, longest) for power in range(longest.bit_length() + 1)} | {max(1, longest - 1)})


def _traced(value: Tensor) -> fx.Node:
    """The node of the graph under construction that computes `value`."""
    from torch.fx.experimental.proxy_tensor import get_proxy_mode, get_proxy_slot

    mode = get_proxy_mode()
    if mode is None:
        raise _Undecided
    found = get_proxy_slot(value, mode.tracer, None)
    if found is None:
        raise _Undecided
    return found.proxy.node


def _holds(node: fx.Node, tokens: int) -> bool:
    """Whether the condition that `node` computes holds for a text of so many tokens."""
    values: dict[fx.Node, Any] = {}
    stack = [node]
    with _outside_of_the_capture():
        while stack:
            waiting = [n for n in _sources(stack[-1]) if n not in values]
            if waiting:
                stack += waiting
            else:
                current = stack.pop()
                values[current] = _compute(current, values, tokens)
        return bool(values[node])


def _sources(node: fx.Node) -> list[fx.Node]:
    return [] if node.target in _shape_only() else node.all_input_nodes


def _shape_only() -> frozenset[Any]:
    from emssd_compile.passes.graph import SHAPE_ONLY  # brings sympy

    return SHAPE_ONLY


def _compute(node: fx.Node, values: dict[fx.Node, Any], tokens: int) -> Any:
    if node.op == "get_attr":
        value = getattr(node.graph.owning_module, str(node.target), None)
        if isinstance(value, Tensor):
            return value
    if node.op != "call_function":
        raise _Undecided
    known = dict(values)
    if node.target in _shape_only():
        source = node.args[0]
        assert isinstance(source, fx.Node)
        known[source] = _placeholder_of_shape(source, tokens)
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: known[n])
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _placeholder_of_shape(node: fx.Node, tokens: int) -> Tensor:
    """A tensor of the shape of `node`; its values mean nothing."""
    import sympy

    value = node.meta["val"]
    shape = []
    for size in value.shape:
        expression = size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)
        symbols = expression.free_symbols
        if len(symbols) > 1:
            raise _Undecided
        shape.append(int(expression.xreplace(dict.fromkeys(symbols, sympy.Integer(tokens)))))
    return torch.empty(shape, dtype=value.dtype, device=value.device)


@contextlib.contextmanager
def _outside_of_the_capture() -> Iterator[None]:
    """Real values, although a capture with fake ones is under way."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily
    from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing

    with torch._C.DisableTorchFunction(), disable_proxy_modes_tracing(), unset_fake_temporarily(), torch.no_grad():
        yield


__all__ = ["Branch", "DecideBranches"]
