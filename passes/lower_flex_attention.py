"""Spell flex_attention out."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from emssd_compile.passes.graph import aten, call, inserting_for
from emssd_compile.passes.splice import Tensors, inline_function

_FLEX = torch.ops.higher_order.flex_attention


class LowerFlexAttention:
    """Turn `flex_attention` into a product, its score and mask functions, a softmax and a product.

    It is a higher-order op: what it adds to scores and which it hides are graphs of their own, called for each query
    and key. Spelled out they are ATen ops like everybody's, and `raise_attention` recognises them as it does others.
    Its block mask only says which blocks need not be computed, and is dropped.

        before:  %o, %lse = flex_attention(%q, %k, %v, %score_mod, (..., %mask_mod), 0.25, {}, (), (%documents,))
        after:   %s = matmul(%q, %kT) * 0.25; %m = le(%j, %i) & ...; %o = matmul(softmax(where(%m, %s, -inf)), %v)
    """

    name = "lower_flex_attention"

    def run(self, graph_module: fx.GraphModule) -> int:
        """Replace each flex attention; returns how many there were."""
        sites = [n for n in graph_module.graph.nodes if n.target is _FLEX]
        for site in sites:
            _spell_out(graph_module, site)
        return len(sites)


def _spell_out(graph_module: fx.GraphModule, site: fx.Node) -> None:
    query, key, value, score_mod, block_mask, scale, _, score_buffers, mask_buffers = site.args
    assert isinstance(query, fx.Node)
    assert isinstance(key, fx.Node)
    assert isinstance(value, fx.Node)
    assert isinstance(block_mask, tuple)
    graph = graph_module.graph
    with inserting_for(site):
        groups = query.meta["val"].shape[1] // key.meta["val"].shape[1]
        if groups > 1:
            key, value = (call(graph, aten.repeat_interleave.self_int, n, groups, 1) for n in (key, value))
        product = call(graph, aten.matmul.default, query, call(graph, aten.transpose.int, key, -1, -2))
        scores = call(graph, aten.mul.Tensor, product, scale)
        scores = _for_each(graph_module, score_mod, scores, [scores], score_buffers)
        visible = _for_each(graph_module, block_mask[-1], scores, [], mask_buffers)
        hidden = call(graph, aten.logical_not.default, visible)
        scores = call(graph, aten.masked_fill.Scalar, scores, hidden, -torch.inf)
        output = call(graph, aten.matmul.default, call(graph, aten.softmax.int, scores, -1), value)
        results = [
            _laid_out_as(graph, output, query),
            call(graph, aten.div.Tensor, call(graph, aten.logsumexp.default, scores, [-1]), math.log(2)),
            call(graph, aten.amax.default, scores, [-1]),
        ]
    for user in list(site.users):
        user.replace_all_uses_with(results[user.args[1]])  # type: ignore[index]
        graph.erase_node(user)
    graph.erase_node(site)


def _laid_out_as(graph: fx.Graph, output: fx.Node, query: fx.Node) -> fx.Node:
    """The op's result lies in memory as its queries do, and the model may view it so."""
    strides = query.meta["val"].stride()
    if not statically_known_true(strides[1] <= strides[2]):
        return output
    tokens_first = call(graph, aten.transpose.int, output, 1, 2)
    copied = call(graph, aten.clone.default, tokens_first, memory_format=torch.contiguous_format)
    return call(graph, aten.transpose.int, copied, 1, 2)


def _for_each(
    graph_module: fx.GraphModule, function: Any, scores: fx.Node, first: list[fx.Node], buffers: Any
) -> fx.Node:
    """`function` of each score (or of none), its batch, head, query and key, as one tensor `[1, Hq, T, T]`."""
    inner: Callable[..., Any] = getattr(graph_module, function.target)
    for dim in (3, 2, 1, 0):
        along = [0 if d == dim else None for d in range(4)]
        inner = torch.vmap(inner, in_dims=(*(0 for _ in first), *along, *(None for _ in buffers)))
    inputs = {"scores": scores, **{f"buffer_{i}": node for i, node in enumerate(buffers)}}

    def spread(given: Tensors) -> Any:
        values = list(given.values())
        places = [torch.arange(size, device=values[0].device) for size in values[0].shape]
        return inner(*values[: len(first)], *places, *values[1:])

    found: fx.Node = inline_function(graph_module, spread, (inputs,), scores.meta["val"].fake_mode)
    return found
