"""Keep the KV caches of all rows in one pool of blocks."""

from __future__ import annotations

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from emssd_compile.errors import UnsupportedModelError
from emssd_compile.passes.block_tables import look_up, pageable, slabs
from emssd_compile.passes.graph import aten, call, placeholder
from emssd_compile.passes.splice import add_input
from emssd_compile.step.paging import BLOCK_TABLE, Paging
from emssd_compile.step.signature import DRAFT_ROWS


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
        names = {str(node.target) for node in paged}
        if missing := {*(paging.caches or ())} & {str(node.target) for node in slabs(graph)} - names:
            raise UnsupportedModelError(
                f"{', '.join(sorted(missing))}: in a pool in other forms of the step, and used otherwise in this one",
                remedy='pass memory="slab"',
            )
        stay = [str(node.target) for node in slabs(graph) if node not in paged]
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
        look_up(graph_module, tables, self.fake_mode)
        return len(paged)

    def _tables_of_first(self, graph: fx.Graph, table: fx.Node, paged: list[fx.Node]) -> dict[fx.Node, fx.Node]:
        """Of caches of which a step takes the first rows, the table of these."""
        narrow = [node for node in paged if not isinstance(node.meta["val"].shape[0], int)]
        if not narrow:
            return {}
        rows = placeholder(graph, DRAFT_ROWS)
        with graph.inserting_before(next(node for node in graph.nodes if node.op != "placeholder")):
            return dict.fromkeys(narrow, call(graph, aten.index.Tensor, table, [rows]))
