"""Give attention the rectangular, functional form that graph runtimes have."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from emssd_compile.ops import append_kv, move_kv, ragged_attention, tiled_attention, update_kv
from emssd_compile.ops._scores import AttentionAttributes, in_use
from emssd_compile.passes.graph import argument, aten, attribute, call, fresh_index, inputs, output, refuse
from emssd_compile.passes.splice import add_input, inline_function
from emssd_compile.passes.tile_layout import by_rows, lay_out, make_mask, mark_broken, moved, pick

_KEPT = {"scale", "softcap", "sinks"}  # attributes that `tiled_attention` has, too
_MASKED = {"window", "chunk", "alibi_slopes"}  # attributes that masks say


@dataclass(frozen=True)
class _Picks:
    """Where vectors of heads go between packed tokens `[T, Hq, D]` and a tile with heads before tokens, as nodes.

    Attributes:
        queries: int64 `[B, Hq, S]`, the packed token and head of each vector of the tile, of `T * Hq`.
        results: int64 `[T, Hq]`, the place in the tile of each packed vector, of `B * Hq * S`.
    """

    queries: fx.Node
    results: fx.Node


@dataclass(frozen=True)
class _Tile:
    """Where the packed tokens of one pass over the text lie in a tile `[B, S]` of right-aligned rows, as nodes.

    Attributes:
        tokens: int64 `[B * S]`, the packed token of each tile slot; any token where the row has fewer than S.
        rows: int64 `[T]`, the row of each packed token; the last one for inert tail tokens.
        tile_slots: int64 `[T]`, the tile slot of each packed token; the last slot for inert tail tokens.
        kv_lengths: int64 `[B]`, slots of each row's cache that its last token sees; at least 1.
        picks: which vectors of which head go where, by the number of query heads.
        masks: the masks made so far, by how far a query sees, ALiBi slopes and what else they are made of.
    """

    tokens: fx.Node
    rows: fx.Node
    tile_slots: fx.Node
    kv_lengths: fx.Node
    picks: dict[int, _Picks] = field(default_factory=dict)
    masks: dict[tuple[AttentionAttributes, bytes, tuple[fx.Node, ...]], fx.Node] = field(default_factory=dict)


class TileAttention:
    """Turn each append-then-attend over packed tokens into a cache update and an attention over a tile of queries.

    ONNX and TensorRT know no packed queries, and their graphs hold values, not memory. So around attention, and only
    there, the tokens of each row are put into a row of a tile of S queries; the caches go in and come out, to be bound
    to the same memory. S is the length of the input `row_range`, the most tokens of a row; a graph that has none yet (a
    model without the step around it) gets it. Rows are right-aligned, since then causal order needs no mask: the last
    query sees all of the row's slots, the one before it one less, and so on. What is not plain causal order (windows,
    chunks, ALiBi, draft trees) becomes a mask. Masks, and where the tokens lie, are computed once a step and shared by
    all layers.

    An append that no attention follows, of keys and values that only later tokens attend to, becomes the update alone:
    a row's tokens lie behind one another there, too, in the packed order and in the cache.

    No result of a tile slot without a token is ever read, and nothing reads what inert tail tokens give.

    A token that overflows must not reach those who do not see it: not a draft the tokens before it, nor a request the
    next one in its row. So no value that is written to a cache is infinite or NaN; instead the token's key is NaN, and
    so is what attends to it.

        before:  emssd.append_kv(%k_cache_0[B,C,Hkv,D], %v_cache_0, %k[T,Hkv,D], %v, %row_ids, %slots)
                 %o[T,Hq,D] = emssd.ragged_attention(%q[T,Hq,D], %k_cache_0, %v_cache_0, %offsets, %lengths, ...)
                 return {...}
        after:   %k_1 = emssd.update_kv(%k_cache_0[B,Hkv,C+1,D], %k, %row_ids, %slots, %offsets, %lengths)
                 %v_1 = emssd.update_kv(%v_cache_0, %v, ...)
                 %t[B,Hq,S,D] = emssd.tiled_attention(%q[tokens], %k_1, %v_1, %kv_lengths, mask, ...)
                 %o[T,Hq,D] = %t[tile_slots]
                 return {..., k_cache_0: %k_1, v_cache_0: %v_1}

    Args:
        spare_slots: slots of a cache behind the C of each row, for what inert tail tokens write.
    """

    name = "tile_attention"

    def __init__(self, spare_slots: int = 1) -> None:
        self.spare_slots = spare_slots

    def run(self, graph_module: fx.GraphModule) -> int:
        """Put a tile around each attention; returns how many.

        Raises:
            UnsupportedModelError: the graph returns no dict.
        """
        graph = graph_module.graph
        sites = [node for node in graph.nodes if node.target in (append_kv, ragged_attention, move_kv)]
        if not sites:
            return 0
        if not isinstance(output(graph).args[0], dict):
            raise refuse(output(graph), "the graph must return its results by name, to return the KV caches with them")
        fake_mode: FakeTensorMode = inputs(graph)[0].meta["val"].fake_mode
        rewrite = _Rewrite(graph_module, fake_mode, _row_range(graph, fake_mode), self.spare_slots)
        appends = {site: _append_before(site) for site in sites if site.target == ragged_attention}
        for site in sites:  # in the order in which they run: each reads what those before it left in the caches
            if site in appends:
                rewrite.attention(site, appends[site])
            elif site.target == move_kv:
                rewrite.move(site)
            elif site not in appends.values():
                rewrite.append(site)
        results: Any = output(graph).args[0]
        output(graph).args = ({**results, **{str(cache.target): now for cache, now in rewrite.caches.items()}},)
        return len(appends)

    def ensures(self, graph_module: fx.GraphModule) -> None:
        """Nothing writes memory: each cache goes in and comes out."""
        for node in graph_module.graph.nodes:
            if node.target in (append_kv, ragged_attention, move_kv):
                raise refuse(node, "a KV cache is written or read in the packed form")


def _append_before(site: fx.Node) -> fx.Node:
    """The `append_kv` whose tokens `site` attends with: the last one before it of the same caches."""
    node = site.prev
    while node.op != "root":
        if node.target == append_kv and node.args[:2] == site.args[1:3]:
            return node
        node = node.prev
    raise refuse(site, "an attention reads a KV cache before this step's tokens are written to it")


def _row_range(graph: fx.Graph, fake_mode: FakeTensorMode) -> fx.Node:
    """The input that says how wide a tile is: a step has it, a model alone gets it."""
    found = [node for node in inputs(graph) if node.target == "row_range"]
    return (
        found[0]
        if found
        else add_input(graph, "row_range", fresh_index(fake_mode, inputs(graph)[0].meta["val"].device))
    )


class _Rewrite:
    """The state of one run of the pass: the tiles made so far, where rows begin, and the newest value of each cache."""

    def __init__(
        self, graph_module: fx.GraphModule, fake_mode: FakeTensorMode, row_range: fx.Node, spare_slots: int
    ) -> None:
        self.graph_module = graph_module
        self.graph = graph_module.graph
        self.fake_mode = fake_mode
        self.row_range = row_range
        self.spare_slots = spare_slots
        self.caches: dict[fx.Node, fx.Node] = {}
        self.tiles: dict[tuple[fx.Node, ...], _Tile] = {}
        self.rows: dict[tuple[fx.Node, ...], dict[str, fx.Node]] = {}

    def attention(self, site: fx.Node, append: fx.Node) -> None:
        """Rewrite one `ragged_attention` and the `append_kv` before it."""
        for name in sorted(in_use(site.kwargs) - _KEPT - _MASKED):
            raise refuse(site, f"its attribute {name} has no form for a tile of queries")
        query, _, _, offsets, lengths = (argument(site, index) for index in range(5))
        row_ids = argument(append, 4)
        with self.graph.inserting_before(site):
            caches = self._write(append, offsets, lengths)
            result = self._attend(site, query, caches, self._tile(offsets, lengths, row_ids))
        result.meta = {**site.meta, **result.meta}
        site.replace_all_uses_with(result)
        self.graph.erase_node(site)

    def append(self, site: fx.Node) -> None:
        """Rewrite an `append_kv` that no attention follows."""
        caches, given = argument(site, 0), {"row_ids": argument(site, 4), "slots": argument(site, 5)}
        with self.graph.inserting_before(site):
            key = tuple(given.values())
            if key not in self.rows:
                count = partial(by_rows, num_rows=caches.meta["val"].shape[0])
                self.rows[key] = inline_function(self.graph_module, count, (given,), self.fake_mode)
            self._write(site, **self.rows[key])

    def _write(self, append: fx.Node, offsets: fx.Node, lengths: fx.Node) -> list[fx.Node]:
        """Update the caches instead of an `append_kv`; their new values, keys first."""
        k_cache, v_cache, keys, values, row_ids, slots = (argument(append, index) for index in range(6))
        new = inline_function(self.graph_module, mark_broken, ({"keys": keys, "values": values},), self.fake_mode)
        caches = [
            self._update(cache, new[name], row_ids, slots, offsets, lengths)
            for name, cache in (("keys", k_cache), ("values", v_cache))
        ]
        self.graph.erase_node(append)
        return caches

    def move(self, site: fx.Node) -> None:
        """Rewrite a `move_kv`: all nodes of a path are written again, past those that count, where nothing is kept."""
        *caches, starts, path = (argument(site, index) for index in range(4))
        with self.graph.inserting_before(site):
            for cache in caches:
                now = self.caches[cache]
                given = {"cache": now, "starts": starts, "path": path}
                new = inline_function(self.graph_module, moved, (given,), self.fake_mode)
                self._update(cache, new["new"], new["row_ids"], new["slots"], new["offsets"], starts)
        self.graph.erase_node(site)

    def _update(self, cache: fx.Node, *arguments: fx.Node) -> fx.Node:
        if cache not in self.caches:
            rows, capacity, heads, size = cache.meta["val"].shape
            with self.fake_mode:
                cache.meta["val"] = cache.meta["val"].new_empty((rows, heads, capacity + self.spare_slots, size))
        self.caches[cache] = call(self.graph, update_kv, self.caches.get(cache, cache), *arguments)
        return self.caches[cache]

    def _tile(self, offsets: fx.Node, lengths: fx.Node, row_ids: fx.Node) -> _Tile:
        key = (offsets, lengths, row_ids)
        if key not in self.tiles:
            given = {"offsets": offsets, "lengths": lengths, "row_ids": row_ids, "row_range": self.row_range}
            found = inline_function(self.graph_module, lay_out, (given,), self.fake_mode)
            self.tiles[key] = _Tile(found["tokens"], found["rows"], found["tile_slots"], found["kv_lengths"])
        return self.tiles[key]

    def _attend(self, site: fx.Node, query: fx.Node, caches: list[fx.Node], tile: _Tile) -> fx.Node:
        picks = self._picks(tile, heads=query.meta["val"].shape[1])
        mask = self._mask(site, caches[0], tile)
        result = call(
            self.graph,
            tiled_attention,
            self._take(query, picks.queries),
            *caches,
            tile.kv_lengths,
            mask,
            **{name: value for name, value in site.kwargs.items() if name in _KEPT},
            is_causal=mask is None,
        )
        return self._take(result, picks.results)

    def _picks(self, tile: _Tile, heads: int) -> _Picks:
        if heads not in tile.picks:
            given = {
                "tokens": tile.tokens,
                "rows": tile.rows,
                "tile_slots": tile.tile_slots,
                "row_range": self.row_range,
            }
            picks = partial(pick, num_rows=len(tile.kv_lengths.meta["val"]), heads=heads)
            tile.picks[heads] = _Picks(**inline_function(self.graph_module, picks, (given,), self.fake_mode))
        return tile.picks[heads]

    def _take(self, source: fx.Node, index: fx.Node) -> fx.Node:
        """The vectors in the last dimension of `source` that lie where `index` says, in its shape."""
        vectors = call(self.graph, aten.reshape.default, source, [-1, source.meta["val"].shape[-1]])
        return call(self.graph, aten.embedding.default, vectors, index)

    def _mask(self, site: fx.Node, k_cache: fx.Node, tile: _Tile) -> fx.Node | None:
        """The mask that `site` needs, causal order included; None if that is all there is to it."""
        slopes, ancestors = site.kwargs.get("alibi_slopes"), site.kwargs.get("ancestors")
        if in_use(site.kwargs) <= _KEPT and ancestors is None:
            return None
        reach: Any = {name: site.kwargs[name] for name in ("window", "chunk") if name in site.kwargs}
        given = {"row_range": self.row_range, "kv_lengths": tile.kv_lengths}
        if isinstance(ancestors, fx.Node):
            given |= {"tokens": tile.tokens, "ancestors": ancestors}
            given |= {name: argument(site, index) for index, name in enumerate(("offsets", "lengths", "positions"), 3)}
        sources, slope_bytes = tuple(given.values()), b""
        if isinstance(slopes, fx.Node):  # each layer has a copy of its own
            given["slopes"] = slopes
            slope_bytes = attribute(self.graph_module, slopes).double().cpu().numpy().tobytes()
        key = (AttentionAttributes(1.0, **reach), slope_bytes, sources)
        if key not in tile.masks:
            cache = k_cache.meta["val"]
            make = partial(make_mask, rule=key[0], capacity=cache.shape[2], dtype=cache.dtype)
            tile.masks[key] = inline_function(self.graph_module, make, (given,), self.fake_mode)["mask"]
        return tile.masks[key]
