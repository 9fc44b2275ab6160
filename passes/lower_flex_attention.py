"""Spell flex_attention out."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from emssd_compile.passes.graph import argument, refuse
from emssd_compile.passes.splice import Tensors, inline_function

_FLEX = torch.ops.higher_order.flex_attention
_RESULTS = ("output", "logsumexp", "largest")


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
        """See the class."""
        sites = [n for n in graph_module.graph.nodes if n.target is _FLEX]
        for site in sites:
            _spell_out(graph_module, site)
        return len(sites)


def _spell_out(graph_module: fx.GraphModule, site: fx.Node) -> None:
    query, key, value, score_mod, block_mask, scale, _, score_buffers, mask_buffers = site.args
    assert isinstance(block_mask, tuple)
    if not isinstance(scale, float):
        raise refuse(site, "flex_attention has a scale that is not a constant")
    functions = [getattr(graph_module, str(node.target)) for node in (score_mod, block_mask[-1])]  # type: ignore[union-attr]
    buffers = {f"score_{i}": node for i, node in enumerate(score_buffers)}  # type: ignore[arg-type]
    buffers |= {f"mask_{i}": node for i, node in enumerate(mask_buffers)}  # type: ignore[arg-type]
    inputs = {"query": query, "key": key, "value": value, **buffers}
    fake_mode = argument(site, 0).meta["val"].fake_mode

    def attend(given: Tensors) -> Tensors:
        extra = [[given[n] for n in buffers if n.startswith(kind)] for kind in ("score_", "mask_")]
        return _attend(given["query"], given["key"], given["value"], scale, functions, extra)

    with graph_module.graph.inserting_before(site):
        results = inline_function(graph_module, attend, inputs, fake_mode)  # type: ignore[arg-type]
    for user in list(site.users):
        user.replace_all_uses_with(results[_RESULTS[user.args[1]]])  # type: ignore[index]
        graph_module.graph.erase_node(user)
    for result in results.values():
        result.meta.setdefault("nn_module_stack", site.meta.get("nn_module_stack"))
    graph_module.graph.erase_node(site)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    functions: list[Callable[..., Tensor]],
    buffers: list[list[Tensor]],
) -> Tensors:
    """What flex_attention computes. Shapes: `[1, Hq, T, Dk]`, `[1, Hkv, T, Dk]`, `[1, Hkv, T, Dv]`."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    device = query.device
    places = [torch.arange(n, device=device) for n in (query.shape[0], query.shape[1], query.shape[2], key.shape[2])]
    scores = torch.matmul(query, key.transpose(-1, -2)) * scale
    scores = _for_each(functions[0], [scores], places, buffers[0])
    visible = _for_each(functions[1], [], places, buffers[1])
    scores = scores.masked_fill(~visible, -torch.inf)
    output = torch.matmul(scores.softmax(-1), value)
    if statically_known_true(query.stride(1) <= query.stride(2)):  # the op's result lies in memory as its queries do
        output = output.transpose(1, 2).contiguous().transpose(1, 2)
    return {
        "output": output,
        "logsumexp": scores.logsumexp(-1) / math.log(2),
        "largest": scores.amax(-1),
    }


def _for_each(
    function: Callable[..., Any], scores: list[Tensor], places: list[Tensor], buffers: list[Tensor]
) -> Tensor:
    """`function` of each score, its batch, head, query and key, as one tensor."""
    unmapped = [None] * len(buffers)
    inner = function
    for dim in (3, 2, 1, 0):
        along = [0 if d == dim else None for d in range(4)]
        inner = torch.vmap(inner, in_dims=(*(0 for _ in scores), *along, *unmapped))
    result: Tensor = inner(*scores, *places, *buffers)
    return result
