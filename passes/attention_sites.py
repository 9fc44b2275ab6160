"""Find attention in the forms that models write it in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from emssd_compile.passes.graph import (
    Evaluator,
    ancestors,
    argument,
    aten,
    call,
    literals,
    refuse,
    scalar,
    shape,
    token_dims,
    token_symbol,
)
from emssd_compile.passes.mask_family import MaskFamily, Probe

_SDPA = aten.scaled_dot_product_attention.default
_SOFTMAX = frozenset({aten.softmax.int, aten._softmax.default})
_MATMUL = frozenset({aten.matmul.default, aten.bmm.default})


@dataclass
class AttentionSite:
    """One attention as the model wrote it.

    Attributes:
        result: the node that holds its output.
        query, key, value: its inputs, heads of keys and values perhaps repeated.
        scale: factor on the products of queries and keys.
        softcap: 0, or c in `c * tanh(scaled / c)`.
        probe: computes its probabilities for given raw scores.
        literals: integers in its mask's subgraph.
    """

    result: fx.Node
    query: fx.Node
    key: fx.Node
    value: fx.Node
    scale: float
    softcap: float
    probe: Probe
    literals: set[int]


def find_site(graph_module: fx.GraphModule, node: fx.Node, dependent: set[fx.Node]) -> AttentionSite | None:
    """The attention around `node`, if `node` is an SDPA or the softmax of an eager attention.

    Args:
        graph_module: an L0 graph.
        node: where to look.
        dependent: nodes whose values depend on the token ids.

    Raises:
        UnsupportedModelError: it mixes tokens as an attention does, but is not of a known form.
    """
    if node.target == _SDPA:
        return _sdpa_site(graph_module, node)
    if node.target not in _SOFTMAX or node not in dependent:
        return None
    over_tokens = len(token_dims(node, token_symbol(graph_module.graph))) == 2
    return _eager_site(graph_module, node, dependent) if over_tokens else None


def _sdpa_site(graph_module: fx.GraphModule, node: fx.Node) -> AttentionSite:
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given: dict[str, Any] = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    mask, causal = given.get("attn_mask"), bool(given.get("is_causal", False))
    if given.get("dropout_p", 0.0) != 0.0:
        raise refuse(node, "attention has dropout; call model.eval() first")
    if mask is None and not causal:
        raise refuse(node, "attention is bidirectional: every token sees later ones, so tokens cannot be cached")
    scale = given.get("scale")
    factor = float(given["query"].meta["val"].shape[-1]) ** -0.5 if scale is None else float(scale)

    def probe(tokens: int, scores: Tensor, constants: dict[int, int]) -> Tensor:
        scaled = scores * factor
        if mask is None:
            return MaskFamily().probabilities(scaled)
        value: Tensor = Evaluator(graph_module, tokens, constants=constants)(mask)
        visible = torch.zeros((), dtype=torch.float32)
        bias = visible.masked_fill(~value, -torch.inf) if value.dtype == torch.bool else value.float()
        return (scaled + bias.to(scaled.device)).softmax(-1).reshape(scores.shape)

    integers = set() if mask is None else _literals(mask)
    return AttentionSite(node, given["query"], given["key"], given["value"], factor, 0.0, probe, integers)


def _eager_site(graph_module: fx.GraphModule, softmax: fx.Node, dependent: set[fx.Node]) -> AttentionSite:
    product, scale, softcap = _walk_up(graph_module, softmax, dependent)
    weights, result = _walk_down(softmax, dependent)
    query, key_transposed = argument(product, -2), argument(product, -1)
    with graph_module.graph.inserting_after(key_transposed):
        key = _untransposed(graph_module.graph, key_transposed)
    dtype = product.meta["val"].dtype

    def probe(tokens: int, scores: Tensor, constants: dict[int, int]) -> Tensor:
        given_shape = Evaluator(graph_module, tokens).concrete_shape(product)
        given = _given(graph_module, product, scores.to(dtype).reshape(given_shape))
        value: Tensor = Evaluator(graph_module, tokens, given, constants)(weights)
        return value.float().reshape(scores.shape)

    integers = _literals(weights, stop=product)
    return AttentionSite(result, query, key, argument(result, 1), scale, softcap, probe, integers)


def _given(graph_module: fx.GraphModule, product: fx.Node, scores: Tensor) -> dict[fx.Node, Tensor]:
    """`baddbmm` adds its first input to the product: the raw scores stand for the product alone."""
    if product.target != aten.baddbmm.default:
        return {product: scores}
    beta, alpha = (float(product.kwargs.get(name, 1.0)) for name in ("beta", "alpha"))  # type: ignore[arg-type]
    value: Tensor = Evaluator(graph_module, scores.shape[-1])(argument(product, 0))
    return {product: beta * value + alpha * scores}


def _walk_up(graph_module: fx.GraphModule, softmax: fx.Node, dependent: set[fx.Node]) -> tuple[fx.Node, float, float]:
    """From a softmax to the product of queries and keys: (product, scale, softcap)."""
    node, scale, softcap = softmax, 1.0, 0.0
    while True:
        inputs = [n for n in node.all_input_nodes if n in dependent]
        if node.target in _MATMUL and len(inputs) == 2:
            break
        if node.target == aten.baddbmm.default:
            scale *= scalar(node.kwargs.get("alpha", 1.0)) or 0.0
            break
        if len(inputs) != 1:
            raise refuse(node, "a softmax over tokens whose scores are not a product of queries and keys")
        factor = _factor(graph_module, node, inputs[0])
        if node.target == aten.tanh.default:
            softcap, scale = scale, 1.0
        scale *= factor
        node = inputs[0]
    return node, scale * (softcap or 1.0), softcap


def _factor(graph_module: fx.GraphModule, node: fx.Node, source: fx.Node) -> float:
    """By which constant `node` multiplies `source` (1 if it does something else: that shows when it is evaluated)."""
    if node.target not in (aten.mul.Tensor, aten.div.Tensor, aten.mul.Scalar, aten.div.Scalar):
        return 1.0
    other = node.args[1] if node.args[0] is source else node.args[0]
    value = scalar(other)
    if value is None:
        tensor = Evaluator(graph_module, 3)(other) if isinstance(other, fx.Node) else None
        if not isinstance(tensor, Tensor) or tensor.numel() != 1:
            return 1.0
        value = float(tensor)
    return value if node.target in (aten.mul.Tensor, aten.mul.Scalar) else 1.0 / value


def _walk_down(softmax: fx.Node, dependent: set[fx.Node]) -> tuple[fx.Node, fx.Node]:
    """From a softmax to its product with the values: (weights as they enter it, product)."""
    node = softmax
    while True:
        users = list(node.users)
        if len(users) != 1:
            raise refuse(
                node, f"attention weights are used in {len(users)} places; one product with the values is known"
            )
        user = users[0]
        if user.target in _MATMUL and user.args[0] is node:
            return node, user
        if [n for n in user.all_input_nodes if n in dependent] != [node]:
            raise refuse(user, "attention weights are combined with other values before they meet the values' product")
        node = user


def _untransposed(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """The keys [.., T, D] behind their transpose [.., D, T]."""
    rank = len(shape(node) or ())
    if node.target == aten.transpose.int:
        dims = {d % rank for d in node.args[1:] if isinstance(d, int)}
        if dims == {rank - 1, rank - 2}:
            return argument(node, 0)
    return call(graph, aten.transpose.int, node, -1, -2)


def _literals(node: fx.Node, stop: fx.Node | None = None) -> set[int]:
    """Integer literals in the subgraph of `node` (without what `stop` is computed from)."""
    return literals(ancestors([node]) - (ancestors(stop.all_input_nodes) if stop is not None else set()))
