"""Give attention the rectangular, functional form that graph runtimes have."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from emssd_compile.ops import append_kv, move_kv, ragged_attention, tiled_attention, update_kv
from emssd_compile.ops._ancestors import unpack_ancestors
from emssd_compile.ops._scores import AttentionAttributes, in_use
from emssd_compile.passes.graph import argument, aten, attribute, call, fresh_index, inputs, output, refuse
from emssd_compile.passes.splice import Tensors, add_input, inline_function

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
        sites = [node for node in graph.nodes if node.target in (ragged_attention, move_kv)]
        if not sites:
            return 0
        if not isinstance(output(graph).args[0], dict):
            raise refuse(output(graph), "the graph must return its results by name, to return the KV caches with them")
        fake_mode: FakeTensorMode = inputs(graph)[0].meta["val"].fake_mode
        rewrite = _Rewrite(graph_module, fake_mode, _row_range(graph, fake_mode), self.spare_slots)
        for site in sites:  # in the order in which they run: each reads what those before it left in the caches
            (rewrite.move if site.target == move_kv else rewrite.attention)(site)
        results: Any = output(graph).args[0]
        output(graph).args = ({**results, **{str(cache.target): now for cache, now in rewrite.caches.items()}},)
        return sum(site.target == ragged_attention for site in sites)

    def ensures(self, graph_module: fx.GraphModule) -> None:
        """Nothing writes memory: each cache goes in and comes out."""
        for node in graph_module.graph.nodes:
            if node.target in (append_kv, ragged_attention, move_kv):
                raise refuse(node, "a KV cache is written or read in the packed form")


def _row_range(graph: fx.Graph, fake_mode: FakeTensorMode) -> fx.Node:
    """The input that says how wide a tile is: a step has it, a model alone gets it."""
    found = [node for node in inputs(graph) if node.target == "row_range"]
    return (
        found[0]
        if found
        else add_input(graph, "row_range", fresh_index(fake_mode, inputs(graph)[0].meta["val"].device))
    )


class _Rewrite:
    """The state of one run of the pass: the tiles made so far, and the newest value of each cache."""

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

    def attention(self, site: fx.Node) -> None:
        """Rewrite one `ragged_attention` and the `append_kv` before it."""
        for name in sorted(in_use(site.kwargs) - _KEPT - _MASKED):
            raise refuse(site, f"its attribute {name} has no form for a tile of queries")
        append = self._append(site)
        query, k_cache, v_cache, offsets, lengths = (argument(site, index) for index in range(5))
        row_ids, slots = argument(append, 4), argument(append, 5)
        with self.graph.inserting_before(site):
            given = {"keys": argument(append, 2), "values": argument(append, 3)}
            new = inline_function(self.graph_module, _mark_broken, (given,), self.fake_mode)
            caches = [
                self._update(cache, new[name], row_ids, slots, offsets, lengths)
                for name, cache in (("keys", k_cache), ("values", v_cache))
            ]
            self.graph.erase_node(append)
            result = self._attend(site, query, caches, self._tile(offsets, lengths, row_ids))
        result.meta = {**site.meta, **result.meta}
        site.replace_all_uses_with(result)
        self.graph.erase_node(site)

    def move(self, site: fx.Node) -> None:
        """Rewrite a `move_kv`: all nodes of a path are written again, past those that count, where nothing is kept."""
        *caches, starts, path = (argument(site, index) for index in range(4))
        with self.graph.inserting_before(site):
            for cache in caches:
                now = self.caches[cache]
                given = {"cache": now, "starts": starts, "path": path}
                new = inline_function(self.graph_module, _moved, (given,), self.fake_mode)
                self._update(cache, new["new"], new["row_ids"], new["slots"], new["offsets"], starts)
        self.graph.erase_node(site)

    def _append(self, site: fx.Node) -> fx.Node:
        """The `append_kv` whose tokens `site` attends with: the last one before it of the same caches."""
        node = site.prev
        while node.op != "root":
            if node.target == append_kv and node.args[:2] == site.args[1:3]:
                return node
            node = node.prev
        raise refuse(site, "an attention reads a KV cache before this step's tokens are written to it")

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
            found = inline_function(self.graph_module, _lay_out, (given,), self.fake_mode)
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
            pick = partial(_pick, num_rows=len(tile.kv_lengths.meta["val"]), heads=heads)
            tile.picks[heads] = _Picks(**inline_function(self.graph_module, pick, (given,), self.fake_mode))
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
            make = partial(_make_mask, rule=key[0], capacity=cache.shape[2], dtype=cache.dtype)
            tile.masks[key] = inline_function(self.graph_module, make, (given,), self.fake_mode)["mask"]
        return tile.masks[key]


def _mark_broken(given: Tensors) -> Tensors:
    """Keys and values whose values are finite: where one is not, the key is NaN in its place.

    A weight of 0 does not hide a value that is not finite; a score is hidden whatever it is.
    """
    keys, values = given["keys"], given["values"]
    nothing = (values * 0).sum(-1, keepdim=True)  # 0, or NaN where a value is not finite
    return {"keys": keys + nothing, "values": torch.where(nothing == 0, values, 0)}


def _moved(given: Tensors) -> Tensors:
    """The keys or values of a path, and where `update_kv` writes them: behind one another, from `starts` on."""
    cache, starts, path = given["cache"], given["starts"], given["path"]
    rows, heads, slots, size = cache.shape
    width = path.shape[1]  # D + 1
    row, head, depth = (torch.arange(length, device=path.device) for length in (rows, heads, width))
    source = (starts[:, None] + path).clamp(0, slots - 1)  # [B, D + 1]
    vectors = (row[:, None, None] * heads + head) * slots + source[:, :, None]  # [B, D + 1, Hkv]
    return {
        "new": torch.embedding(cache.reshape(-1, size), vectors.flatten(0, 1)),  # [B * (D + 1), Hkv, size]
        "row_ids": row[:, None].expand(rows, width).flatten(),
        "slots": (starts[:, None] + depth).flatten(),
        "offsets": torch.arange(rows + 1, device=path.device) * width,
    }


def _lay_out(given: Tensors) -> Tensors:
    """The fields of `_Tile`. Row b's tokens end at tile slot S - 1, so slot i holds token `offsets[b + 1] - S + i`."""
    offsets, row_ids, row_range = given["offsets"], given["row_ids"], given["row_range"]
    rows, width = given["lengths"].shape[0], row_range.shape[0]
    ends = offsets[1:]
    tokens = (ends[:, None] - width + row_range).clamp(min=0)
    row = row_ids.clamp(max=rows - 1)
    packed = torch.arange(row_ids.shape[0], device=row_ids.device)
    tile_slots = (row + 1) * width - torch.where(row_ids < rows, ends[row] - packed, 1)
    kv_lengths = (given["lengths"] + ends - offsets[:-1]).clamp(min=1)
    return {"tokens": tokens.reshape(-1), "rows": row, "tile_slots": tile_slots, "kv_lengths": kv_lengths}


def _pick(given: Tensors, num_rows: int, heads: int) -> Tensors:
    """The fields of `_Picks`."""
    tokens, width = given["tokens"], given["row_range"].shape[0]
    head = torch.arange(heads, device=tokens.device)
    queries = tokens.view(num_rows, 1, width) * heads + head[:, None]
    # A place is row * width + slot; with heads it is (row * heads + head) * width + slot.
    results = given["tile_slots"][:, None] + (given["rows"][:, None] * (heads - 1) + head) * width
    return {"queries": queries, "results": results}


def _make_mask(given: Tensors, rule: AttentionAttributes, capacity: int, dtype: torch.dtype) -> Tensors:
    """Bool `[B, 1, S, C + 1]`, or with ALiBi `slopes[Hq]` what is added to the scores, `[B, Hq, S, C + 1]`."""
    is_tree = "ancestors" in given
    visible, own, key_positions = (_tree if is_tree else _chain)(given, capacity)
    visible = visible & rule.reaches(own, key_positions)
    if "slopes" in given:
        bias = given["slopes"].to(torch.float32)[:, None, None] * (key_positions - own)[:, None]
        # Half of the lowest number: with a score added to it, it is still finite.
        return {"mask": torch.where(visible[:, None], bias.to(dtype), torch.finfo(dtype).min / 2)}
    if is_tree:  # a query that sees nothing gets slot 0, since a softmax over nothing may be NaN
        first = torch.arange(capacity, device=visible.device) == 0
        visible = visible | (first & ~visible.any(-1, keepdim=True))
    return {"mask": visible[:, None]}


def _chain(given: Tensors, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
    """What a query in each tile slot sees, before any window or chunk, where each token follows the one before it.

    Positions of tokens and queries are slots then: the last query's is `kv_lengths - 1`. A tile slot without a token
    counts as one at position 0.

    Returns:
        visible: bool `[B, S, C + 1]`.
        own: `[B, S, 1]`, the position of each query.
        key_positions: the position of the token in each cache slot, in a shape that broadcasts to `[B, S, C + 1]`.
    """
    kv_lengths, row_range = given["kv_lengths"], given["row_range"]
    slots = torch.arange(capacity, device=kv_lengths.device)
    own = (kv_lengths[:, None] - row_range.shape[0] + row_range).clamp(min=0)[:, :, None]
    return slots <= own, own, slots


def _tree(given: Tensors, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
    """As `_chain`, where the row's tokens of this step are a tree: `emssd::ragged_attention` says who sees whom.

    A tile slot without a token sees what the bits of another row's token say, of this row's tokens.
    """
    lengths, positions, offsets = given["lengths"], given["positions"], given["offsets"]
    rows, width = lengths.shape[0], given["row_range"].shape[0]
    slots = torch.arange(capacity, device=lengths.device)
    step_index = slots - lengths[:, None]  # [B, C + 1], which token of the row's in this step lies in the slot
    committed = step_index < 0
    counts = offsets.diff()[:, None]
    own_index = counts - width + given["row_range"]  # [B, S], which token of the row's the query is; negative: none

    bits = unpack_ancestors(given["ancestors"].index_select(0, given["tokens"])).view(rows, width, -1)
    has_bit = step_index < counts.clamp(max=bits.shape[2])
    index = step_index.clamp(0, bits.shape[2] - 1)[:, None].expand(-1, width, -1)
    in_order = step_index[:, None] <= own_index[:, :, None]
    visible = committed[:, None] | (has_bit[:, None] & bits.gather(2, index))
    visible = visible | ((step_index >= bits.shape[2])[:, None] & in_order)

    step_token = (offsets[:-1, None] + step_index).clamp(0, positions.shape[0] - 1)
    key_positions = torch.where(committed, slots, positions[step_token])
    own = positions.index_select(0, given["tokens"]).view(rows, width)
    return visible, own[:, :, None], key_positions[:, None]
