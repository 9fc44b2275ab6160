"""Values of a subgraph at chosen places of a sequence, however long it is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from emssd_compile.passes.graph import SHAPE_ONLY, Evaluator, aten, is_pointwise, token_dims

_LARGEST = 2**26
"""Elements of a relation of tokens to tokens that are computed in full where its op has no rule."""

_SIZED = frozenset(
    {
        aten.expand.default,
        aten.reshape.default,
        aten.view.default,
        aten.unflatten.int,
        aten.full.default,
        aten.ones.default,
        aten.zeros.default,
        *SHAPE_ONLY,
    }
)
"""Ops whose numbers of tokens are sizes of their result, not values to compute with."""
_PER_PLACE = frozenset(
    {
        aten.unsqueeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.permute.default,
        aten.transpose.int,
        aten.flatten.using_ints,
        aten.repeat_interleave.self_int,
        aten.to.dtype,
        aten.to.dtype_layout,
        aten._to_copy.default,
        aten.type_as.default,
        aten.expand_as.default,
        aten.clone.default,
        aten.contiguous.default,
        aten.detach.default,
        aten.dropout.default,
    }
)
"""Ops besides the pointwise ones that give the same at a place whatever other places there are."""


class UnevaluatedError(Exception):
    """A relation of tokens to tokens too large to compute, by an op that has no rule for chosen places."""


class SampledEvaluator(Evaluator):
    """Computes what nodes hold at chosen places of a sequence that ends with the last of them.

    A mask of 100,000 x 100,000 tokens cannot be computed to see what it does to the last ones. Every tensor with one
    token dimension is computed in full, and then its places are picked; a relation of tokens to tokens is computed from
    its operands at those places. Values in `given` hold the chosen places only, and what is computed from them treats
    these as if they were all there are: a softmax over keys is one over the chosen keys.

        %m = ge(%query[T,1], %key[1,T]),  places = [0, 5, 99]   ->   %m[3,3], for T = 100

    Args:
        graph_module: an L0 or L1 graph.
        places: int64 `[n]`, ascending; T is the last of them and one.
        given: values to take for some nodes instead of computing them.
    """

    def __init__(
        self, graph_module: fx.GraphModule, places: Tensor, given: dict[fx.Node, Tensor] | None = None
    ) -> None:
        tokens = int(places[-1]) + 1
        self.complete = len(places) == tokens
        super().__init__(graph_module, tokens, given if self.complete else None)
        self.places = places.to(self.device)
        self.sizes, self.longer = Evaluator(graph_module, len(places)), Evaluator(graph_module, tokens + 1)
        self.chosen: dict[fx.Node, Any] = dict(given or {})
        self.from_given = set(self.chosen)
        for node in graph_module.graph.nodes:
            if node.target not in SHAPE_ONLY and any(n in self.from_given for n in node.all_input_nodes):
                self.from_given.add(node)

    def __call__(self, node: fx.Node) -> Any:
        """Value of `node` at the places. Raises KeyError if it depends on token ids, UnevaluatedError if too large."""
        if self.complete:
            return super().__call__(node)
        for step in self._order(node):
            self.chosen[step] = self._at_places(step) if self._is_partial(step) else self._pick(step)
        return self.chosen[node]

    def _order(self, node: fx.Node) -> list[fx.Node]:
        """What `node` needs at the places and has not got, in order."""
        needed: set[fx.Node] = set()
        stack = [node]
        while stack:
            current = stack.pop()
            if current in needed or current in self.chosen:
                continue
            needed.add(current)
            if self._is_partial(current) and current.target not in SHAPE_ONLY:
                stack.extend(current.all_input_nodes)
        return [n for n in self.graph_module.graph.nodes if n in needed]

    def _dims(self, node: fx.Node) -> tuple[int, ...]:
        """Dimensions that grow with the number of tokens; `1 - max(0, 1 - T)` is the size of one that does not."""
        found = token_dims(node, self.symbol)
        if not found:
            return found
        sizes, longer = self.concrete_shape(node), self.longer.concrete_shape(node)
        return tuple(dim for dim in found if sizes[dim] != longer[dim])

    def _is_partial(self, node: fx.Node) -> bool:
        """Whether `node` is computed at the places only: it relates tokens to tokens, or comes from given values."""
        return _holds_values(node) and (node in self.from_given or len(self._dims(node)) > 1)

    def _full(self, node: Any) -> Any:
        """The value for all T tokens of a node or a literal."""
        return super().__call__(node) if isinstance(node, fx.Node) else node

    def _pick(self, node: fx.Node) -> Any:
        """The places of a full value."""
        value = self._full(node)
        for dim in self._dims(node):
            if value.shape[dim] != self.tokens:
                raise UnevaluatedError(f"%{node.name} has a dimension that depends on the number of tokens")
            value = value.index_select(dim, self.places)
        return value

    def _at_places(self, node: fx.Node) -> Tensor:
        value: Tensor | None = self._by_rule(node)
        if value is not None:
            return value
        value = self._apply(node) if node in self.from_given else self._pick(node)
        return value

    def _compute(self, node: fx.Node) -> Any:
        if len(self._dims(node)) > 1 and node.op == "call_function":
            elements = torch.Size(self.concrete_shape(node)).numel()
            if elements > _LARGEST:
                raise UnevaluatedError(
                    f"%{node.name} ({node.target}) holds {elements} elements for {self.tokens} tokens"
                )
        return super()._compute(node)

    def _by_rule(self, node: fx.Node) -> Tensor | None:
        """The value from operands at the places; None if no rule fits."""
        target = node.target
        if target in _SIZED:
            return self._apply(node, self.sizes)
        if target in _PER_PLACE or is_pointwise(target):
            return self._apply(node)
        rules = {
            aten.triu.default: self._triangle,
            aten.tril.default: self._triangle,
            aten.slice.Tensor: self._slice,
            aten.index.Tensor: self._index,
        }
        return rules[target](node) if target in rules else None

    def _apply(self, node: fx.Node, sizes: Evaluator | None = None) -> Tensor:
        """The op itself, on operands at the places; numbers of tokens from `sizes`, if they are sizes."""

        def value(leaf: Any) -> Any:
            if not isinstance(leaf, fx.Node):
                return leaf
            if not _holds_values(leaf):
                return sizes(leaf) if sizes is not None else self._full(leaf)
            if node.target in SHAPE_ONLY and leaf not in self.chosen:
                return self.sizes.concrete(leaf)
            return self(leaf)

        args, kwargs = fx.node.map_aggregate((node.args, node.kwargs), value)
        with torch.no_grad():
            result: Tensor = node.target(*args, **kwargs)  # type: ignore[operator]
        return result

    def _triangle(self, node: fx.Node) -> Tensor | None:
        source, diagonal = (*node.args, 0)[:2]
        assert isinstance(source, fx.Node)
        rank = len(self.concrete_shape(source))
        if self._dims(source)[-2:] != (rank - 2, rank - 1):
            return None
        ahead = self.places - self.places[:, None]  # [n, n], key place minus query place
        shift = self._full(diagonal)
        kept = ahead >= shift if node.target == aten.triu.default else ahead <= shift
        value: Tensor = self(source)
        return value.masked_fill(~kept, 0)

    def _slice(self, node: fx.Node) -> Tensor | None:
        """A slice along another dimension than the tokens', one of all tokens, or of T rows of a longer table."""
        arguments: list[Any] = [*node.args]
        source, dim, start, end, step = arguments + [0, None, None, 1][len(arguments) - 1 :]
        assert isinstance(source, fx.Node)
        assert isinstance(dim, int)
        if node in self.from_given:
            return self._apply(node, self.sizes)
        of_tokens = dim in self._dims(source)
        if dim not in self._dims(node):
            return None if of_tokens else self._apply(node)
        first, last = self._full(start) or 0, self._full(end)
        if step != 1 or first < 0 or self.concrete_shape(node)[dim] != self.tokens:
            return None
        if of_tokens:
            return self(source) if first == 0 and (last is None or last >= self.tokens) else None
        value: Tensor = self(source)
        return value.index_select(dim, self.places + first)

    def _index(self, node: fx.Node) -> Tensor | None:
        """A table looked up with indices at the places."""
        source, indices = node.args
        assert isinstance(source, fx.Node)
        assert isinstance(indices, (list, tuple))
        if self._is_partial(source) or any(d >= len(indices) or indices[d] is None for d in self._dims(source)):
            return None
        found = [self(i) if isinstance(i, fx.Node) else None for i in indices]
        value: Tensor = aten.index.Tensor(self._full(source), found)
        return value


def _holds_values(node: fx.Node) -> bool:
    """Whether `node` computes a tensor, or several (as `max` along a dimension does), and no size."""
    return isinstance(node.meta.get("val"), (Tensor, tuple, list))


__all__ = ["SampledEvaluator", "UnevaluatedError"]
