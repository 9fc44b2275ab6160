"""Attention as matrix products and a softmax, where TensorRT's own cannot be used."""

from __future__ import annotations

from functools import partial

from torch import fx

from emssd_compile.ops import tiled_attention
from emssd_compile.ops._tiled_attention import reference
from emssd_compile.passes.splice import Tensors, inline_function

_OPERANDS = ("q", "k_cache", "v_cache", "kv_lengths", "mask")


class DecomposeAttention:
    """Put the definition of `tiled_attention` in its place: slower, but it caps scores and runs in float32.

    before:  %o = emssd.tiled_attention(%q, %k_1, %v_1, %kv_lengths, None, scale=0.125, softcap=50.0, is_causal=True)
    after:   %s = aten.matmul(%q, %k_1');  %w = aten._softmax(...);  %o = aten.matmul(%w, %v_1)
    """

    name = "decompose_attention"

    def run(self, graph_module: fx.GraphModule) -> int:
        """Replace each `tiled_attention`; returns how many there were."""
        sites = [node for node in graph_module.graph.nodes if node.target == tiled_attention]
        for node in sites:
            arguments = {**dict(zip(_OPERANDS, node.args, strict=True)), **node.kwargs}
            given = {name: value for name, value in arguments.items() if isinstance(value, fx.Node)}
            others = {name: value for name, value in arguments.items() if name not in given}
            fake_mode = node.meta["val"].fake_mode
            with graph_module.graph.inserting_before(node):
                traced = inline_function(graph_module, partial(_attention, others=others), (given,), fake_mode)
            node.replace_all_uses_with(traced["result"])
            graph_module.graph.erase_node(node)
        return len(sites)


def _attention(given: Tensors, others: dict[str, object]) -> Tensors:
    return {"result": reference(**given, **others)}  # type: ignore[arg-type]
