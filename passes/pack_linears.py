"""Multiply with packed weights on a CPU."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, fx

from emssd_compile.memory import available_memory
from emssd_compile.ops import packed_linear
from emssd_compile.passes.graph import aten, attribute
from emssd_compile.passes.manager import Refusal


class PackLinears:
    """Have oneDNN multiply with each weight in the blocked layout that suits the machine.

    The few tokens of a decoding step make a matrix product as fast as its weight streams in, and a row-major weight
    streams badly. The packed weight is a second copy, made when the step first runs (see `emssd::packed_linear`).

        before:  %y[T,N] = linear(%x[T,M], %weight[N,M], %bias)
        after:   %y[T,N] = emssd.packed_linear(%x[T,M], %weight[N,M], %bias)
    """

    name = "pack_linears"

    def __init__(self) -> None:
        self.refusals: list[Refusal] = []

    def run(self, graph_module: fx.GraphModule) -> int:
        """See the class. Leaves all weights alone if the copies would take more than half of the memory available."""
        sites = [node for node in graph_module.graph.nodes if node.target == aten.linear.default]
        packable = [node for node in sites if self._is_packable(graph_module, node)]
        needed = _bytes(attribute(graph_module, node.args[1]) for node in packable)
        if packable and needed > _available_memory() // 2:
            self._refuse(packable[0], f"packed copies need {needed >> 20} MiB, more than half of what is available")
            return 0
        for node in packable:
            node.target = packed_linear
        return len(packable)

    def _is_packable(self, graph_module: fx.GraphModule, node: fx.Node) -> bool:
        source = node.args[1]
        if not isinstance(source, fx.Node) or source.op != "get_attr":
            return self._refuse(node, "its weight is computed")
        weight = attribute(graph_module, source)
        if weight.device.type != "cpu":
            return self._refuse(node, f"its weight is on {weight.device.type}")
        if weight.dtype not in _packable_dtypes() or weight.dim() != 2:
            return self._refuse(node, f"a weight of {weight.dtype} {list(weight.shape)} is not packed")
        return True

    def _refuse(self, node: fx.Node, reason: str) -> bool:
        self.refusals.append(Refusal(node.name, reason))
        return False


def _packable_dtypes() -> tuple[torch.dtype, ...]:
    """What oneDNN multiplies on this machine."""
    return (torch.float32, torch.bfloat16) if torch.ops.mkldnn._is_mkldnn_bf16_supported() else (torch.float32,)


def _bytes(weights: Iterable[Tensor]) -> int:
    """What copies of the weights take; a weight that is used twice is packed once."""
    return sum({w.data_ptr(): w.numel() * w.element_size() for w in weights}.values())


def _available_memory() -> int:
    return available_memory(torch.device("cpu"))
