"""Let the slots of a KV cache's rows lie in blocks, wherever a table says."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from emssd_compile.ops import append_kv, move_kv, ragged_attention
from emssd_compile.passes.graph import aten, inputs
from emssd_compile.passes.splice import inline_function
from emssd_compile.step.paging import BLOCK_TABLE

CACHES = {append_kv: slice(0, 2), move_kv: slice(0, 2), ragged_attention: slice(1, 3)}
"""Ops that know blocks, and where their caches stand among the arguments."""


def slabs(graph: fx.Graph) -> list[fx.Node]:
    """The caches of a step that each row has a slab of."""
    return [node for node in inputs(graph) if node.meta.get("role") == "cache"]


def pageable(graph: fx.Graph) -> list[fx.Node]:
    """Those of them that may lie in blocks: ops that know blocks use them, and their partners."""
    found = dict.fromkeys(node for node in slabs(graph) if all(_knows_blocks(user, node) for user in node.users))
    pairs = [node.args[CACHES[node.target]] for node in graph.nodes if node.target in CACHES]
    while torn := [cache for pair in pairs if not found.keys() >= {*pair} for cache in pair if cache in found]:
        for cache in torn:
            found.pop(cache, None)
    return [*found]


def look_up(graph_module: fx.GraphModule, tables: Mapping[fx.Node, fx.Node], fake_mode: FakeTensorMode) -> None:
    """Hand each op on caches the table of these.

    Where tokens are written is looked up once for all caches of a table; what reads or moves tokens is handed the
    table.

    Args:
        graph_module: the step.
        tables: int32 `[B, M]` for each cache, `[blocks, P, ...]` by now.
        fake_mode: of the graph.
    """
    places: dict[tuple[fx.Node, ...], tuple[fx.Node, ...]] = {}
    for node in [n for n in graph_module.graph.nodes if n.target in CACHES and n.args[CACHES[n.target]][0] in tables]:
        cache = node.args[CACHES[node.target]][0]
        table = tables[cache]
        if node.target == append_kv:
            tokens = (*node.args[4:6], table)
            if tokens not in places:
                num_blocks, size = cache.meta["val"].shape[:2]
                find = partial(locate, num_blocks=num_blocks, size=size)
                with graph_module.graph.inserting_before(_latest(graph_module.graph, tokens).next):
                    places[tokens] = inline_function(graph_module, find, tokens, fake_mode)
            node.args = (*node.args[:4], *places[tokens])
        else:
            node.kwargs = {**node.kwargs, BLOCK_TABLE: table}


def locate(row_ids: Tensor, slots: Tensor, table: Tensor, num_blocks: int, size: int) -> tuple[Tensor, Tensor]:
    """The block of each token `[T]`, one past the last for the inert tail; and its place in it.

    Args:
        row_ids, slots: int64 `[T]`, those of the tokens.
        table: int32 `[B, M]`.
        num_blocks: blocks that there are.
        size: P, slots of a block.
    """
    is_tail = row_ids >= table.shape[0]
    slots = torch.where(is_tail, 0, slots)
    blocks = table[row_ids.clamp(max=table.shape[0] - 1), slots // size].to(torch.int64)
    return torch.where(is_tail, num_blocks, blocks), slots % size


def _latest(graph: fx.Graph, nodes: tuple[fx.Node, ...]) -> fx.Node:
    order = {node: number for number, node in enumerate(graph.nodes)}
    return max(nodes, key=lambda node: order[node])


def _knows_blocks(user: fx.Node, cache: fx.Node) -> bool:
    """Whether it may be handed blocks; or asks for the number of rows, which another input tells, too."""
    counts_rows = user.target == aten.sym_size.int and user.args[1] == 0
    return user.target in CACHES or bool(counts_rows and not isinstance(cache.meta["val"].shape[0], int))
