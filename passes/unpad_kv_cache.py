"""Give every attention an unpadded KV cache."""

from __future__ import annotations

from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from emssd_compile.ops import append_kv, attention, ragged_attention
from emssd_compile.passes.graph import aten, call, inputs, inserting_for, placeholder, refuse, shape
from emssd_compile.step.batch import BatchShape


class UnpadKVCache:
    """Turn each attention over one sequence into append-then-attend over the rows' KV caches.

    Every row has its own slab of C slots and its own write offset: slot = position, so nothing is padded, and rejected
    tokens are rolled back by not advancing `lengths`. For trees of drafts, whose nodes share positions, there are N
    more slots a row, and a token's slot comes from the input of that name.

        before:  %o[1,Hq,T,D] = emssd.attention(%q, %k, %v, scale=0.35)
        after:   emssd.append_kv(%k_cache_0[B,C,Hkv,D], %v_cache_0, %k[T,Hkv,D], %v, %row_ids, %positions)
                 %o = emssd.ragged_attention(%q[T,Hq,D], %k_cache_0, %v_cache_0, %offsets, %lengths, %positions)
    """

    name = "unpad_kv_cache"

    def __init__(self, batch: BatchShape, fake_mode: FakeTensorMode) -> None:
        self.batch = batch
        self.fake_mode = fake_mode

    def run(self, graph_module: fx.GraphModule) -> int:
        """Give each attention caches of its own; returns how many.

        Raises:
            UnsupportedModelError: there is no attention at all.
        """
        graph = graph_module.graph
        sites = [n for n in graph.nodes if n.target == attention]
        if not sites:
            raise refuse(
                next(iter(graph.nodes)),
                "the model has no attention (recurrent models keep a state this compiler cannot cache)",
            )
        for index, site in enumerate(sites):
            self._rewrite(graph, site, index)
        return len(sites)

    def _rewrite(self, graph: fx.Graph, site: fx.Node, index: int) -> None:
        query, key, value = site.args[:3]
        assert isinstance(key, fx.Node)
        assert isinstance(value, fx.Node)
        caches = [self._cache(graph, f"{kind}_cache_{index}", node) for kind, node in (("k", key), ("v", value))]
        fields = {name: placeholder(graph, name) for name in ("row_ids", "positions", "offsets", "lengths")}
        is_tree = self.batch.tree_nodes > 0
        slots = placeholder(graph, "slots") if is_tree else fields["positions"]
        sight = {"ancestors": placeholder(graph, "ancestors")} if is_tree else {}
        with inserting_for(site):
            packed = [_packed(graph, node) for node in (query, key, value)]  # type: ignore[arg-type]
            call(graph, append_kv, *caches, *packed[1:], fields["row_ids"], slots)
            result = call(
                graph,
                ragged_attention,
                packed[0],
                *caches,
                fields["offsets"],
                fields["lengths"],
                fields["positions"],
                **site.kwargs,
                **sight,
            )
            result.meta = {**site.meta, **result.meta}
            result = call(graph, aten.unsqueeze.default, call(graph, aten.transpose.int, result, 0, 1), 0)
        site.replace_all_uses_with(result)

    def _cache(self, graph: fx.Graph, name: str, values: fx.Node) -> fx.Node:
        with graph.inserting_after(inputs(graph)[-1]):
            node = graph.placeholder(name)
        _, heads, _, size = shape(values) or ()
        with self.fake_mode:
            node.meta["val"] = values.meta["val"].new_empty((self.batch.rows, self.batch.slots, heads, size))
        node.meta["role"] = "cache"
        return node


def _packed(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """[1, heads, T, D] as [T, heads, D]."""
    return call(graph, aten.transpose.int, call(graph, aten.squeeze.dim, node, 0), 0, 1)
