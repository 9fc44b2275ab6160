"""What TensorRT's attention cannot do is said before the step is rewritten for it."""

from __future__ import annotations

import torch
from torch import fx

from emssd_compile.errors import OptionError
from emssd_compile.ops import ragged_attention
from emssd_compile.ops._scores import in_use
from emssd_compile.passes.graph import argument, refuse

_MASKABLE = {"scale", "window", "chunk", "alibi_slopes"}  # queries are scaled beforehand, the others become masks
_MEANING = {"softcap": "scores are capped", "sinks": "attention has sinks"}


class CheckTensorRTAttention:
    """Refuse attention that TensorRT has no kernel for; nothing is changed.

    The builder would refuse most of it, too, minutes later, and would not say what to do.
    """

    name = "check_tensorrt_attention"

    def run(self, graph_module: fx.GraphModule) -> int:
        """Look at each attention; returns 0, since nothing changes.

        Raises:
            OptionError: it is in float32 or float64, and the options do not ask for matrix products in its place.
            UnsupportedModelError: scores are capped, there are attention sinks, or keys and values differ in size.
        """
        for node in graph_module.graph.find_nodes(op="call_function", target=ragged_attention):
            _check(node)
        return 0


def _check(node: fx.Node) -> None:
    remedy = "export with attention='decomposed'"
    query, value = argument(node, 0).meta["val"], node.meta["val"]
    if value.dtype not in (torch.float16, torch.bfloat16):
        raise OptionError(
            f"TensorRT's attention has no kernel for {value.dtype}: convert the model to float16 or bfloat16, or "
            f"{remedy}"
        )
    for name in sorted(in_use(node.kwargs) - _MASKABLE):
        raise refuse(node, f"{_MEANING.get(name, name)}, which TensorRT's attention cannot do", remedy)
    if query.shape[-1] != value.shape[-1]:
        raise refuse(node, "keys and values differ in size, which TensorRT's attention cannot do", remedy)
