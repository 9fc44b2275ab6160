"""`tile_attention`: the same tokens from a tile of queries, with caches that go in and come out."""

import pytest
import torch
from torch import Tensor, fx

from emssd_compile.errors import UnsupportedModelError
from emssd_compile.ops import append_kv, ragged_attention, tiled_attention, update_kv
from emssd_compile.passes.graph import call, inputs, output, placeholder, results
from emssd_compile.passes.manager import PassManager
from emssd_compile.passes.tile_attention import TileAttention
from tests.exactness.compiled import assert_exact, rechunked, target
from tests.exactness.models import prompt
from tests.passes.graphs import (
    BATCH,
    COMMITTED,
    HEADS,
    HIDDEN,
    ROWS,
    TinyModel,
    alone,
    model_with_attention,
    ops,
    returned,
    unpadded,
)
from tests.passes.tiled import EagerStep, run_with, tile_step
from tests.passes.trees import TAIL, assert_same, break_draft, spread, step_inputs, tiled_inputs, tree_batch, tree_graph

# Grouped heads and learned positions, a window, capped scores in every other layer's window, and ALiBi.
CASES = {
    "llama": "draft-model",
    "gpt2": "prompt-lookup",
    "opt": "none",
    "mistral": "sometimes-wrong",
    "gemma2": "sometimes-wrong",
    "bloom": "sometimes-wrong",
}


@pytest.mark.parametrize(("architecture", "drafter"), CASES.items())
def test_the_tokens_are_the_models_own(architecture, drafter):
    compiled = target(architecture, 3)
    fast = compiled.optimize(compiled.drafter(drafter), drafts_for_few=False)
    tiled = tile_step(fast)
    run_with(fast, tiled, EagerStep(tiled))
    assert_exact(fast, compiled.reference, [prompt(n) for n in (61, 1, 17, 5)], 10)


def test_a_long_prompt_beside_short_ones_may_be_read_in_one_step():
    compiled = target("llama", 3)
    fast = rechunked(compiled.optimize(compiled.drafter("prompt-lookup")), 512)
    tiled = tile_step(fast)
    run_with(fast, tiled, EagerStep(tiled))
    assert_exact(fast, compiled.reference, [prompt(n) for n in (70, 1, 33)], 10)


def test_where_the_tokens_lie_is_computed_once_and_masks_are_made_where_needed():
    """Two layers of bloom have the same slopes: one mask. Llama needs none."""
    for architecture, masks in (("bloom", 1), ("llama", 0)):
        compiled = target(architecture, 3)
        tiled = tile_step(compiled.optimize(compiled.drafter("none")))
        sites = [node for node in tiled.graph.nodes if node.target == tiled_attention]
        assert len(sites) == 2
        assert len({node.args[3] for node in sites}) == 1, "kv_lengths"
        assert len({node.args[4] for node in sites} - {None}) == masks
        assert {node.kwargs["is_causal"] for node in sites} == {masks == 0}


def _verify_only(model: TinyModel) -> tuple[fx.GraphModule, PassManager]:
    """The unpadded model as a graph that returns its results by name."""
    graph_module, manager = unpadded(model)
    output(graph_module.graph).args = (dict(zip(("hidden", "logits"), results(graph_module.graph), strict=True)),)
    return graph_module, manager


def _run_tiled(graph_module: fx.GraphModule, tail: int, width: int) -> dict[str, Tensor]:
    """What the tiled unpadded model gives for `ROWS` behind `COMMITTED`, with `tail` inert tokens."""
    held = {str(n.target): torch.zeros(list(n.meta["val"].shape)) for n in inputs(graph_module.graph)[6:-1]}
    lengths = torch.zeros(BATCH.rows, dtype=torch.int64)
    for fed in (COMMITTED, ROWS):
        counts = torch.tensor([len(row) for row in fed])
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
        live = torch.arange(BATCH.rows).repeat_interleave(counts)
        row_ids = torch.cat([live, torch.full((tail,), BATCH.rows)])
        positions = torch.cat([torch.arange(len(live)) - offsets[live] + lengths[live], torch.zeros(tail).long()])
        ids = torch.cat([*fed, torch.full((tail,), 3)])
        with torch.no_grad():
            found = graph_module(
                ids, positions, row_ids, offsets, lengths, torch.arange(len(live)), *held.values(), torch.arange(width)
            )
        held = {name: found.pop(name) for name in held}
        lengths = lengths + counts
    return found


@pytest.mark.parametrize(("tail", "width"), [(0, 5), (0, 9), (4, 5), (4, 9)])
def test_a_model_without_the_step_around_it(tail, width):
    """Rows without a token, inert tail tokens, more tile slots than tokens."""
    model = model_with_attention()
    graph_module, manager = _verify_only(model)
    manager._run(TileAttention(), "tiled", graph_module)
    assert [str(n.target) for n in inputs(graph_module.graph)][-1] == "row_range"
    found = _run_tiled(graph_module, tail, width)
    torch.testing.assert_close(found["logits"], alone(model), rtol=1e-5, atol=1e-5)


def test_what_it_leaves_behind():
    graph_module, manager = _verify_only(model_with_attention())
    manager._run(TileAttention(), "tiled", graph_module)
    assert manager.records[-1].changed == 1
    counts = ops(graph_module)
    assert counts["update_kv"] == 2
    assert counts["tiled_attention"] == 1
    assert not {append_kv, ragged_attention} & {node.target for node in graph_module.graph.nodes}
    assert set(returned(graph_module)) == {"hidden", "logits", "k_cache_0", "v_cache_0"}
    cache = placeholder(graph_module.graph, "k_cache_0").meta["val"]
    assert tuple(cache.shape) == (BATCH.rows, 2, BATCH.capacity + 1, HIDDEN // HEADS)
    assert {user.target for user in placeholder(graph_module.graph, "k_cache_0").users} == {update_kv}

    manager._run(TileAttention(), "tiled", graph_module)
    assert manager.records[-1].changed == 0, "there is nothing left to do"


def test_refuses_a_graph_whose_results_have_no_names():
    graph_module, manager = unpadded(model_with_attention())
    with pytest.raises(UnsupportedModelError, match="must return its results by name"):
        manager._run(TileAttention(), "tiled", graph_module)


@pytest.mark.parametrize(("width", "words"), [(40, 2), (43, 2), (43, 1)])
def test_draft_trees_see_what_the_packed_form_sees(width, words):
    """Windows, chunks and ALiBi by true positions, rows and tile slots without tokens, a tail, tokens past the bits."""
    given = step_inputs(tree_batch())
    given["ancestors"] = given["ancestors"][:, :words]
    graph_module, fake_mode = tree_graph(given)
    tiled = tiled_inputs(given, width)
    expected = graph_module(*given.values())
    PassManager(fake_mode)._run(TileAttention(), "tiled", graph_module)
    assert_same(graph_module(*tiled.values()), expected)


def test_a_draft_that_overflows_reaches_those_who_see_it_and_no_others():
    """As in the packed form: there are both among its tree's tokens."""
    given = step_inputs(tree_batch())
    break_draft(given)
    graph_module, fake_mode = tree_graph(given)
    tiled = tiled_inputs(given, 43)
    expected = graph_module(*given.values())
    for result in expected.values():
        touched = ~result[:-TAIL].isfinite().all(-1).all(-1)
        assert touched[20]
        assert 0 < touched.sum() < 20
    PassManager(fake_mode)._run(TileAttention(), "tiled", graph_module)
    found = graph_module(*tiled.values())
    assert_same(spread({name: found[name] for name in expected}), spread(expected))


def test_trees_of_layers_that_see_the_same_share_a_mask():
    graph_module, fake_mode = tree_graph(step_inputs(tree_batch()))
    PassManager(fake_mode)._run(TileAttention(), "tiled", graph_module)
    first, second, *others = (node for node in graph_module.graph.nodes if node.target == tiled_attention)
    assert first.args[4] is second.args[4]
    windowed, biased, chunked, sunk = (node.args[4] for node in others)
    assert sunk is first.args[4], "sinks are no mask"
    assert len({first.args[4], windowed, biased, chunked}) == 4
    assert not any(node.kwargs["is_causal"] for node in (first, second, *others))


def test_an_append_that_no_attention_follows_is_an_update():
    """Also where tokens lie row by row, which some runtimes go by: that is found from where each of them lies."""
    given = step_inputs(tree_batch())
    graph_module, fake_mode = tree_graph(given)
    nodes = {str(node.target): node for node in inputs(graph_module.graph)}
    with graph_module.graph.inserting_before(output(graph_module.graph)):
        for names in (("k_cache_0", "v_cache_0", "v", "k"), ("k_cache_1", "v_cache_1", "k", "k")):
            call(graph_module.graph, append_kv, *(nodes[name] for name in (*names, "row_ids", "slots")))
    graph_module.recompile()
    tiled = tiled_inputs(given, 43)
    graph_module(*given.values())  # writes into the caches
    PassManager(fake_mode)._run(TileAttention(), "tiled", graph_module)
    updates = [node for node in graph_module.graph.nodes if node.target == update_kv]
    first, second = updates[-4], updates[-1]
    assert first.args[4:] == second.args[4:], "found once"
    results = output(graph_module.graph).args[0]
    output(graph_module.graph).args = ({**results, "offsets": first.args[4], "lengths": first.args[5]},)  # type: ignore[dict-item]
    graph_module.recompile()
    found = graph_module(*tiled.values())
    for name in ("k_cache_0", "v_cache_0", "k_cache_1", "v_cache_1"):
        torch.testing.assert_close(found[name][:, :, :-1].transpose(1, 2), given[name], equal_nan=True)
    assert torch.equal(found["offsets"], given["offsets"])
    has_tokens = given["offsets"].diff() > 0
    assert torch.equal(found["lengths"][has_tokens], given["lengths"][has_tokens])


def test_a_query_that_sees_nothing_is_given_a_slot():
    """A softmax over nothing is NaN in some runtimes. In the second tree no token sees itself."""
    given = step_inputs(tree_batch())
    graph_module, fake_mode = tree_graph(given)
    PassManager(fake_mode)._run(TileAttention(), "tiled", graph_module)
    plain, _, windowed, _, chunked, _ = (n for n in graph_module.graph.nodes if n.target == tiled_attention)
    output(graph_module.graph).args = ((plain.args[4], windowed.args[4], chunked.args[4], plain.args[3]),)
    graph_module.recompile()
    for ancestors in (given["ancestors"], torch.zeros_like(given["ancestors"])):
        *masks, kv_lengths = graph_module(*tiled_inputs({**given, "ancestors": ancestors}, 43).values())
        for mask in masks:
            used = torch.arange(mask.shape[-1]) < kv_lengths[:, None, None, None]
            assert (mask & used).any(-1).all()
