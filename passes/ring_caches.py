"""Keep the window of each row in layers that see no further."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from emssd_compile.errors import UnsupportedModelError
from emssd_compile.ops import ragged_attention
from emssd_compile.ops._scores import reach
from emssd_compile.passes.block_tables import CACHES, look_up, pageable, slabs
from emssd_compile.passes.graph import placeholder
from emssd_compile.passes.splice import inline_function
from emssd_compile.step.rings import Rings


class RingCaches:
    """Write the caches of sliding windows around, so that a row takes what its window holds and not its whole text.

    A ring is a few blocks of each row, and a table that says so: its columns name the same blocks again and again. So
    ops, positions and masks stay as they are: a slot that has been overwritten is one that nobody sees any more.

        before:  emssd.append_kv(%k_cache_0[B,C,Hkv,D], %v_cache_0, %k, %v, %row_ids[T], %slots[T])
                 %o = emssd.ragged_attention(%q, %k_cache_0, %v_cache_0, %offsets, %lengths, %positions, window=W)
        after:   %table[B,M] = R * arange(B)[:, None] + arange(M) % R
                 %blocks[T] = %table[%row_ids, %slots // P];  %places[T] = %slots % P
                 emssd.append_kv(%k_cache_0[B*R,P,Hkv,D], %v_cache_0, %k, %v, %blocks, %places)
                 %o = emssd.ragged_attention(%q, ..., %positions, window=W, block_table=%table)

    Args:
        rings: which caches, and how large they are.
        fake_mode: of the graph.
    """

    name = "ring_caches"

    def __init__(self, rings: Rings, fake_mode: FakeTensorMode) -> None:
        self.rings = rings
        self.fake_mode = fake_mode
        self.notes: tuple[str, ...] = ()

    def run(self, graph_module: fx.GraphModule) -> int:
        """Make rings of the caches; returns how many.

        Raises:
            UnsupportedModelError: one of them is used in another way than when they were chosen.
        """
        graph, rings = graph_module.graph, self.rings
        chosen = {str(node.target): node for node in slabs(graph) if node.target in rings.reaches}
        found = reaches(graph)
        if odd := sorted(name for name in chosen if found.get(name) != rings.reaches[name]):
            raise UnsupportedModelError(
                f"{', '.join(odd)}: a ring in other forms of the step, and used otherwise in this one",
                remedy='pass memory="slab"',
            )
        tables: dict[tuple[int, int], fx.Node] = {}
        of_caches: dict[fx.Node, fx.Node] = {}
        for name, node in chosen.items():
            rows, slots, *vector = node.meta["val"].shape
            shape = rings.row_blocks(name), -(-slots // rings.block_size)
            if shape not in tables:
                tables[shape] = self._table(graph_module, *shape)
            of_caches[node] = tables[shape]
            with self.fake_mode:
                node.meta["val"] = node.meta["val"].new_empty((rows * shape[0], rings.block_size, *vector))
            node.meta["role"] = "ring"
        look_up(graph_module, of_caches, self.fake_mode)
        return len(chosen)

    def _table(self, graph_module: fx.GraphModule, row_blocks: int, columns: int) -> fx.Node:
        """The table of rings of so many blocks a row."""
        graph = graph_module.graph
        make = partial(ring_table, row_blocks=row_blocks, columns=columns)
        with graph.inserting_before(next(node for node in graph.nodes if node.op != "placeholder")):
            table: fx.Node = inline_function(graph_module, make, (placeholder(graph, "lengths"),), self.fake_mode)
        return table


def ring_table(lengths: Tensor, row_blocks: int, columns: int) -> Tensor:
    """int32 `[B, M]`, the block of each row's m-th.

    Args:
        lengths: `[B]`, whatever they are.
        row_blocks: R, blocks of each row.
        columns: M.
    """
    rows, blocks = (torch.arange(count, device=lengths.device) for count in (lengths.shape[0], columns))
    return (rows[:, None] * row_blocks + blocks % row_blocks).to(torch.int32)


def reaches(graph: fx.Graph) -> dict[str, int]:
    """How many tokens are seen of the caches whose attention sees no further, by the names of those."""
    seen: dict[fx.Node, list[int | None]] = {node: [] for node in pageable(graph)}
    for node in graph.find_nodes(op="call_function", target=ragged_attention):
        for cache in node.args[CACHES[ragged_attention]]:
            seen.get(cache, []).append(reach(node.kwargs))
    return {
        str(cache.target): max(each for each in own if each is not None)
        for cache, own in seen.items()
        if own and None not in own
    }
