"""`page_caches`: the same step on a pool of blocks; where tokens go is looked up once."""

from dataclasses import replace

import pytest
import torch

from emssd_compile.errors import OptionError, UnsupportedModelError
from emssd_compile.ops import append_kv, move_kv, ragged_attention
from emssd_compile.passes.block_tables import pageable
from emssd_compile.passes.graph import inputs, placeholder
from emssd_compile.passes.manager import PassRecord
from emssd_compile.passes.page_caches import PageCaches
from emssd_compile.step.drafting import Draft, DraftContext
from emssd_compile.step.paging import Paging
from emssd_compile.step.tensor_spec import TensorSpec
from tests.exactness.compiled import target
from tests.passes.graphs import Scripted, ScriptedTree, apply, calls, fake_mode_of, step_of

PAGING = Paging(num_blocks=7, rows=3, capacity=64, block_size=16)


def _page(graph_module: torch.fx.GraphModule, paging: Paging = PAGING) -> PassRecord:
    (record,) = apply(graph_module, PageCaches(paging, fake_mode_of(graph_module)))
    return record


def test_caches_become_pools_and_all_that_uses_them_is_told_where_rows_are():
    step = step_of(ScriptedTree([3, 4, 5], [0, 0, 1], 2))
    assert _page(step, replace(PAGING, spare=4)).changed == 2
    given = {str(node.target): node for node in inputs(step.graph)}
    assert {name: given[name].meta["role"] for name in ("k_cache_0", "v_cache_0", "block_table")} == {
        "k_cache_0": "pool",
        "v_cache_0": "pool",
        "block_table": "table",
    }
    assert list(given["k_cache_0"].meta["val"].shape) == [7, 16, 2, 4]
    assert list(given["block_table"].meta["val"].shape) == [3, 5]  # 64 tokens and a tree of 4
    for op in (ragged_attention, move_kv):
        assert [node.kwargs["block_table"] for node in calls(step, op)] == [given["block_table"]]


def test_where_tokens_go_is_looked_up_once_for_all_layers():
    compiled = target("llama", 3)
    step = compiled.optimize(compiled.drafter("none"))._step.placed(paging=PAGING)
    appends = calls(step.graph_module, append_kv)
    assert len(appends) == 2
    assert len({node.args[4:6] for node in appends}) == 1


def test_it_is_idempotent():
    step = step_of(Scripted([1, 2]))
    assert _page(step).changed == 2
    before = [node.name for node in step.graph.nodes]
    assert _page(step).changed == 0
    assert [node.name for node in step.graph.nodes] == before


class _Remembers(Scripted):
    """Keeps numbers in a tensor of its own that is written in place, as no op for KV does."""

    def tensors(self, sizes):
        return {"mine": TensorSpec((sizes.rows, 4), torch.int64, kept="forever", in_place=True)}

    def forward(self, context: DraftContext) -> Draft:
        context.state["mine"].add_(1)
        return super().forward(context)


def test_what_is_used_in_another_way_stays_a_slab_and_is_named():
    step = step_of(_Remembers([1, 2]))
    assert [str(node.target) for node in pageable(step.graph)] == ["k_cache_0", "v_cache_0"]
    record = _page(step)
    assert record.notes == ("slabs stay: drafter_mine",)
    assert placeholder(step.graph, "drafter_mine").meta["role"] == "cache"


class _LooksAtKeys(Scripted):
    """Reads the target's keys, and says so."""

    writes_kv = True

    def forward(self, context: DraftContext) -> Draft:
        draft = super().forward(context)
        return replace(draft, lengths=draft.lengths * (context.caches["k_cache_0"].sum() < torch.inf))


def test_a_cache_stays_a_slab_where_its_partner_does():
    """One op writes keys and values to the same places."""
    step = step_of(_LooksAtKeys([1, 2]))
    assert pageable(step.graph) == []
    assert _page(step).notes == ("slabs stay: k_cache_0, v_cache_0",)


def test_what_is_in_a_pool_is_in_it_in_all_forms():
    chosen = replace(PAGING, caches=("k_cache_0",))
    step = step_of(Scripted([1, 2]))
    assert _page(step, chosen).changed == 1
    with pytest.raises(UnsupportedModelError, match="k_cache_0: in a pool in other forms"):
        _page(step_of(_LooksAtKeys([1, 2])), chosen)


@pytest.mark.parametrize("size", [0, 3, 48, 8192, -64])
def test_blocks_of_an_odd_size_are_refused(size: int):
    with pytest.raises(OptionError, match=f"block_size={size} is out of range; pass a power of two from 1 to 4096"):
        replace(PAGING, block_size=size)
