"""`ring_caches`: the same step with caches of windows written around."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from emssd_compile.errors import UnsupportedModelError
from emssd_compile.ops import move_kv, ragged_attention
from emssd_compile.passes.graph import inputs, placeholder
from emssd_compile.passes.manager import PassRecord
from emssd_compile.passes.ring_caches import RingCaches, reaches, ring_table
from emssd_compile.step.rings import Rings
from tests.passes.graphs import Scripted, ScriptedTree, apply, calls, fake_mode_of, step_of

RINGS = Rings({"k_cache_0": 10, "v_cache_0": 10}, num_new=6, block_size=8)  # two blocks a row


def _windowed(graph_module: torch.fx.GraphModule, **attributes: int) -> torch.fx.GraphModule:
    for node in calls(graph_module, ragged_attention):
        node.kwargs = {**node.kwargs, **attributes}
    return graph_module


def _ring(graph_module: torch.fx.GraphModule, rings: Rings = RINGS) -> PassRecord:
    (record,) = apply(graph_module, RingCaches(rings, fake_mode_of(graph_module)))
    return record


def test_caches_become_rings_and_all_that_uses_them_is_told_where_slots_are():
    step = _windowed(step_of(ScriptedTree([3, 4, 5], [0, 0, 1], 2)), window=10)
    assert _ring(step).changed == 2
    for name in RINGS.reaches:
        node = placeholder(step.graph, name)
        assert node.meta["role"] == "ring"
        assert list(node.meta["val"].shape) == [3 * 2, 8, 2, 4]
    (table,) = {node.kwargs["block_table"] for node in calls(step, ragged_attention) + calls(step, move_kv)}
    assert isinstance(table, torch.fx.Node)
    assert list(table.meta["val"].shape) == [3, 9]  # 64 slots and a tree of 4
    assert "block_table" not in [node.target for node in inputs(step.graph)]


def test_a_table_names_the_same_blocks_again_and_again():
    table = ring_table(torch.tensor([7, 7, 7]), row_blocks=2, columns=5)
    assert table.tolist() == [[0, 1, 0, 1, 0], [2, 3, 2, 3, 2], [4, 5, 4, 5, 4]]
    assert table.dtype == torch.int32


def test_it_is_idempotent():
    step = _windowed(step_of(Scripted([1, 2])), window=10)
    assert _ring(step).changed == 2
    before = [node.name for node in step.graph.nodes]
    assert _ring(step).changed == 0
    assert [node.name for node in step.graph.nodes] == before


@pytest.mark.parametrize(
    ("attributes", "seen"), [({}, None), ({"window": 9}, 9), ({"chunk": 12}, 12), ({"window": 9, "chunk": 4}, 4)]
)
def test_how_far_is_seen_is_what_attention_says(attributes: dict[str, int], seen: int | None):
    found = reaches(_windowed(step_of(Scripted([1, 2])), **attributes).graph)
    assert found == ({} if seen is None else {"k_cache_0": seen, "v_cache_0": seen})


def test_of_two_attentions_the_farther_counts():
    step = _windowed(step_of(Scripted([1, 2])), window=9)
    (one,) = calls(step, ragged_attention)
    with step.graph.inserting_after(one):
        other = step.graph.node_copy(one)
    other.kwargs = {**one.kwargs, "window": 20}
    assert reaches(step.graph)["k_cache_0"] == 20
    other.kwargs = {**one.kwargs, "window": 0}
    assert reaches(step.graph) == {}


def test_what_is_a_ring_is_one_in_all_forms():
    """A form in which more is seen would read what has been written over."""
    step = _windowed(step_of(Scripted([1, 2])), window=11)
    with pytest.raises(UnsupportedModelError, match="k_cache_0, v_cache_0: a ring in other forms"):
        _ring(step)
    assert _ring(step, replace(RINGS, reaches=dict.fromkeys(RINGS.reaches, 11))).changed == 2
