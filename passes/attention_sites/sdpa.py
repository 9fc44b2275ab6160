"""The form `scaled_dot_product_attention`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from emssd_compile.passes.attention_sites.form import AttentionSite, Form, Miss, Subject
from emssd_compile.passes.graph import aten, call, inserting_for, shape
from emssd_compile.passes.mask_family import MaskFamily
from emssd_compile.passes.sampled_evaluator import SampledEvaluator

_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


@dataclass(frozen=True)
class Call:
    """Arguments of one SDPA."""

    node: fx.Node
    given: dict[str, Any]

    @property
    def mask(self) -> fx.Node | None:
        """Its mask or bias, if it has one."""
        mask: fx.Node | None = self.given.get("attn_mask")
        return mask

    @property
    def scale(self) -> float:
        """The factor it was given, or one over the root of the head size."""
        scale = self.given.get("scale")
        return float(self.given["query"].meta["val"].shape[-1]) ** -0.5 if scale is None else float(scale)


class ScaledDotProduct(Form[Call]):
    """`%o = scaled_dot_product_attention(%q, %k, %v, %mask)`, with a mask or `is_causal`."""

    def match(self, subject: Subject, node: fx.Node) -> Call | None:
        """The call's arguments by name, if `node` is one."""
        if node.target != aten.scaled_dot_product_attention.default:
            return None
        return Call(node, {**dict(zip(_ARGUMENTS, node.args, strict=False)), **node.kwargs})

    def check(self, subject: Subject, match: Call) -> Miss | None:
        """Dropout, or a call in which tokens see later ones."""
        given = match.given
        if given.get("dropout_p", 0.0) != 0.0:
            return Miss(match.node, "attention has dropout; call model.eval() first", 1)
        if match.mask is None and not given.get("is_causal", False):
            return Miss(
                match.node,
                "attention is bidirectional: every token sees later ones, so tokens cannot be cached",
                1,
            )
        return None

    def rewrite(self, subject: Subject, match: Call) -> AttentionSite:
        """Query, key and value as they are given; the mask becomes the probe."""
        graph, node, mask, scale = subject.graph_module.graph, match.node, match.mask, match.scale

        def probe(places: Tensor, scores: Tensor) -> Tensor:
            scaled = scores * scale
            if mask is None:
                return MaskFamily().probabilities(scaled)
            value: Tensor = SampledEvaluator(subject.graph_module, places)(mask)
            if value.dtype == torch.bool:
                value = torch.zeros((), dtype=torch.float32, device=value.device).masked_fill(~value, -torch.inf)
            return (scaled + value.float()).softmax(-1).reshape(scores.shape)

        with inserting_for(node):
            query, key, value = (_four_dimensional(graph, match.given[name]) for name in _ARGUMENTS[:3])
        return AttentionSite(
            result=node,
            query=query,
            key=key,
            value=value,
            place=lambda graph, attended: _like(graph, attended, node),
            scale=scale,
            softcap=0.0,
            sinks=None,
            probe=probe,
            probe_key=("sdpa", None if mask is None else subject.numbers(mask), scale),
        )


def _four_dimensional(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """[heads, T, D] or [1, groups, heads a group, T, D] as [1, heads, T, D]."""
    rank = len(shape(node) or ())
    if rank == 3:
        return call(graph, aten.unsqueeze.default, node, 0)
    return call(graph, aten.flatten.using_ints, node, 1, rank - 3) if rank > 4 else node


def _like(graph: fx.Graph, attended: fx.Node, node: fx.Node) -> fx.Node:
    """[1, heads, T, D] with the dimensions of `node`."""
    sizes = shape(node) or ()
    if len(sizes) == 3:
        return call(graph, aten.squeeze.dim, attended, 0)
    if len(sizes) > 4:
        return call(graph, aten.reshape.default, attended, [-1 if isinstance(s, torch.SymInt) else s for s in sizes])
    return attended
