"""Keep the KV caches of all rows in one pool of blocks."""

from __future__ import annotations

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from emssd_compile.errors import UnsupportedModelError
from emssd_compile.ops import append_kv, move_kv, ragged_attention
from emssd_compile.passes.graph import aten, call, inputs, placeholder
from emssd_compile.passes.splice import add_input, inline_function
from emssd_compile.step.paging import BLOCK_TABLE, Paging
from emssd_compile.step.signature import DRAFT_ROWS

_CACHES = {append_kv: slice(0, 2), move_kv: slice(0, 2), ragged_attention: slice(1, 3)}
"""Ops that know blocks, and where their caches stand among the arguments."""


class PageCaches:
    """Let rows share a pool of blocks, so that memory goes with the tokens that they hold, not with the most they may.

    One more input, the block table, says in which blocks of the pool the slots of each row lie. Where tokens are
    written is looked up once for all layers; what reads or moves tokens is handed the table. So the step of slabs is
    the same step, and every part of it remains as it was. Caches that are used in another way stay slabs.

        before:  emssd.append_kv(%k_cache_0[B,C,Hkv,D], %v_cache_0, %k, %v, %row_ids[T], %slots[T])
                 %o = emssd.ragged_attention(%q, %k_cache_0, %v_cache_0, %offsets, %lengths, %positions)
        after:   %blocks[T] = %block_table[B,M][%row_ids, %slots // P];  %places[T] = %slots % P
                 emssd.append_kv(%k_cache_0[blocks,P,Hkv,D], %v_cache_0, %k, %v, %blocks, %places)
                 %o = emssd.ragged_attention(%q, ..., %positions, block_table=%block_table)

    Args:
        paging: the pool.
        fake_mode: of the graph.
    """

    name = "page_caches"

    def __init__(self, paging: Paging, fake_mode: FakeTensorMode) -> None:
        self.paging = paging
        self.fake_mode = fake_mode
        self.notes: tuple[str, ...] = ()

    def run(self, graph_module: fx.GraphModule) -> int:
        """Make pools of the caches; returns how many."""
        graph, paging = graph_module.graph, self.paging
        paged = [node for node in pageable(graph) if paging.caches is None or node.target in paging.caches]
        slabs = _slabs(graph)
        names = {str(node.target) for node in paged}
        if missing := {*(paging.caches or ())} & {str(node.target) for node in slabs} - names:
            raise UnsupportedModelError(
                f"{', '.join(sorted(missing))}: in a pool in other forms of the step, and used otherwise in this one",
                remedy='pass memory="slab"',
            )
        stay = [str(node.target) for node in slabs if node not in paged]
        self.notes = (f"slabs stay: {', '.join(stay)}",) if stay else ()
        if not paged:
            return 0
        with self.fake_mode:
            value = paged[0].meta["val"].new_empty((paging.rows, paging.row_blocks), dtype=torch.int32)
        table = add_input(graph, BLOCK_TABLE, value, "table")
        tables = dict.fromkeys(paged, table) | self._tables_of_first(graph, table, paged)
        for node in paged:
            with self.fake_mode:
                shape = (paging.num_blocks, paging.block_size, *node.meta["val"].shape[2:])
                node.meta["val"] = node.meta["val"].new_empty(shape)
            node.meta["role"] = "pool"
            for size in [user for user in node.users if user.target == aten.sym_size.int]:
                size.args = (placeholder(graph, DRAFT_ROWS), 0)
        places: dict[tuple[fx.Node, ...], tuple[fx.Node, ...]] = {}
        for node in [n for n in graph.nodes if n.target in _CACHES and n.args[_CACHES[n.target]][0] in paged]:
            own = tables[node.args[_CACHES[node.target]][0]]
            if node.target == append_kv:
                tokens = node.args[4:6]
                if tokens not in places:
                    places[tokens] = self._places(graph_module, tokens, own)
                node.args = (*node.args[:4], *places[tokens])
            else:
                node.kwargs = {**node.kwargs, BLOCK_TABLE: own}
        return len(paged)

    def _tables_of_first(self, graph: fx.Graph, table: fx.Node, paged: list[fx.Node]) -> dict[fx.Node, fx.Node]:
        """Of caches of which a step takes the first rows, the table of these."""
        narrow = [node for node in paged if not isinstance(node.meta["val"].shape[0], int)]
        if not narrow:
            return {}
        rows = placeholder(graph, DRAFT_ROWS)
        with graph.inserting_before(next(node for node in graph.nodes if node.op != "placeholder")):
            return dict.fromkeys(narrow, call(graph, aten.index.Tensor, table, [rows]))

    def _places(self, graph_module: fx.GraphModule, tokens: tuple[fx.Node, ...], table: fx.Node) -> tuple[fx.Node, ...]:
        """Blocks and places of tokens that have these rows and slots, computed as soon as those are known."""
        order = {node: number for number, node in enumerate(graph_module.graph.nodes)}
        latest = max((*tokens, table), key=lambda node: order[node])
        with graph_module.graph.inserting_before(latest.next):
            found: tuple[fx.Node, ...] = inline_function(graph_module, self._locate, (*tokens, table), self.fake_mode)
        return found

    def _locate(self, row_ids: Tensor, slots: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        """The block of each token `[T]`, one past the last for the inert tail; and its place in it."""
        size, is_tail = self.paging.block_size, row_ids >= table.shape[0]
        slots = torch.where(is_tail, 0, slots)
        blocks = table[row_ids.clamp(max=table.shape[0] - 1), slots // size].to(torch.int64)
        return torch.where(is_tail, self.paging.num_blocks, blocks), slots % size


def pageable(graph: fx.Graph) -> list[fx.Node]:
    """The caches of a step that may be blocks of a pool: ops that know blocks use them, and their partners."""
    able = dict.fromkeys(node for node in _slabs(graph) if all(_knows_blocks(user, node) for user in node.users))
    pairs = [node.args[_CACHES[node.target]] for node in graph.nodes if node.target in _CACHES]
    while torn := [cache for pair in pairs if not able.keys() >= {*pair} for cache in pair if cache in able]:
        for cache in torn:
            able.pop(cache, None)
    return [*able]


def _slabs(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in inputs(graph) if node.meta.get("role") == "cache"]


def _knows_blocks(user: fx.Node, cache: fx.Node) -> bool:
    """Whether it may be handed a pool; or asks for the number of rows, which another input tells, too."""
    counts_rows = user.target == aten.sym_size.int and user.args[1] == 0
    return user.target in _CACHES or bool(counts_rows and not isinstance(cache.meta["val"].shape[0], int))
