"""What TensorRT's layers are documented to do, in torch; and a cut step with them in its gaps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from emssd_compile.export.tensorrt.cut import Cut
from emssd_compile.passes.graph import inputs, output


def kv_cache_update(cache: Tensor, new: Tensor, starts: Tensor, ends: Tensor) -> Tensor:
    """`IKVCacheUpdateLayer`, linear, `PACKED_NHD`: row b's tokens go to slots from `starts[b]` on, in place.

    The first of `ends[B + 1]` must be 0 and the last the number of tokens; no write may leave the cache.
    """
    assert starts.dtype == ends.dtype == torch.int32
    assert ends[0] == 0
    assert ends[-1] == len(new)
    assert bool((ends.diff() >= 0).all())
    for row, (start, begin, end) in enumerate(zip(starts.tolist(), ends[:-1].tolist(), ends[1:].tolist(), strict=True)):
        assert start + end - begin <= cache.shape[2]
        cache[row, :, start : start + end - begin] = new[begin:end].transpose(0, 1)
    return cache


def attention(q: Tensor, k: Tensor, v: Tensor, kv_lengths: Tensor, mask: Tensor | None = None) -> Tensor:
    """`IAttention`: without a mask causal, `LOWER_RIGHT`, over the first `kv_lengths[b]` slots. It has no scale.

    What a query that sees nothing gets is not documented: NaN here.
    """
    assert kv_lengths.dtype == torch.int32
    repeats, queries = q.shape[1] // k.shape[1], q.shape[2]
    slots = torch.arange(k.shape[2])
    seen = (slots < kv_lengths[:, None])[:, None, None, :]
    scores = q.float() @ k.float().repeat_interleave(repeats, 1).mT
    if mask is None:
        seen = seen & (slots <= torch.arange(queries)[:, None] + kv_lengths[:, None, None, None] - queries)
    elif mask.dtype == torch.bool:
        seen = seen & mask
    else:
        scores = scores + mask
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return (weights @ v.float().repeat_interleave(repeats, 1)).to(q.dtype)


LAYERS: dict[str, Callable[..., Tensor]] = {
    "emssd.update_kv.default": kv_cache_update,
    "emssd.tiled_attention.default": attention,
}


class SplicedStep:
    """A cut step with the layers above in its gaps, as a `Step`: caches are written in place and not returned."""

    def __init__(self, cut: Cut) -> None:
        self.cut = cut
        self.graph_module = _spliced(cut)
        self.inputs = [str(node.target) for node in inputs(self.graph_module.graph)]
        self.names = [name for name in self.inputs if name not in cut.caches]

    def __call__(self, *values: Tensor) -> dict[str, Tensor]:
        given = dict(zip(self.names, values, strict=True))
        with torch.no_grad():
            results: dict[str, Tensor] = self.graph_module(*(given[self.cut.caches.get(n, n)] for n in self.inputs))
        return {name: result for name, result in results.items() if name not in given or "_cache_" not in name}


def _spliced(cut: Cut) -> fx.GraphModule:
    """As `network.splice` does with TensorRT's layers."""
    graph_module = cut.graph_module
    graph = graph_module.graph
    results: Any = output(graph).args[0]
    tensors: dict[str, fx.Node] = {str(node.target): node for node in inputs(graph)} | results
    for site in cut.sites:
        stand_in = tensors[site.result]
        with graph.inserting_before(stand_in):
            operands: Any = {role: tensors[name] for role, name in site.operands.items()}
            layer = graph.call_function(LAYERS[site.op], kwargs=operands)
        stand_in.replace_all_uses_with(layer)
        tensors[site.result] = layer
    output(graph).args = ({name: tensors[tensor] for name, tensor in cut.results.items()},)
    graph.eliminate_dead_code()
    graph_module.recompile()
    return graph_module
