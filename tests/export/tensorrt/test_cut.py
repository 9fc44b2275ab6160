"""`cut`: with layers in the gaps that do what TensorRT's are documented to do, the tokens are the model's own."""

import pytest
import torch
from torch import fx

from emssd_compile.compiler import apply_target_passes
from emssd_compile.drafters import NoDrafter
from emssd_compile.export.tensorrt.cut import cut
from emssd_compile.ops import tiled_attention, update_kv
from emssd_compile.optimized_model import OptimizedModel
from emssd_compile.passes.graph import inputs
from emssd_compile.passes.manager import PassManager
from emssd_compile.passes.tile_attention import TileAttention
from tests.exactness.compiled import K, assert_exact, rechunked, target
from tests.exactness.models import prompt
from tests.export.tensorrt.layers import SplicedStep
from tests.export.tensorrt.steps import CHUNK, example, tiled_step
from tests.passes import trees
from tests.passes.graphs import BATCH, LONGEST
from tests.passes.tiled import run_with


def tiled(fast: OptimizedModel) -> fx.GraphModule:
    """The step in the form that `cut` takes, with caches that have room for a whole step's tail."""
    return apply_target_passes(fast._step.graph_module, fast._step.compiled, (TileAttention(CHUNK),), [])


# Grouped heads, by causal order and by a mask of it; ALiBi, which is a mask; caches that are written K times.
CASES = [("llama", "sometimes-wrong", False), ("llama", "draft-model", True), ("bloom", "sometimes-wrong", False)]


@pytest.mark.parametrize(("architecture", "drafter", "masked"), CASES)
def test_the_tokens_are_the_models_own(architecture, drafter, masked):
    compiled = target(architecture, 3)
    fast = rechunked(compiled.optimize(compiled.drafter(drafter), drafts_for_few=False), CHUNK)
    graph_module = tiled(fast)
    run_with(fast, graph_module, SplicedStep(cut(graph_module, masked=masked)))
    assert_exact(fast, compiled.reference, [prompt(n) for n in (61, 1, 17, 5)], 10)


def test_a_long_tail_stays_inside_the_cache():
    """No row is active, so all of the step is tail, and the last row is full."""
    graph_module = tiled_step()
    full = torch.full((BATCH.rows,), LONGEST)
    inactive = torch.zeros(BATCH.rows, dtype=torch.bool)
    values = example(graph_module, CHUNK) | {"known": full, "lengths": full, "active": inactive}
    SplicedStep(cut(graph_module))(*values.values())
    assert values["k_cache_0"][-1, :, LONGEST:].any()
    assert not values["k_cache_0"][:, :, :LONGEST].any(), "nothing else is written"


def test_what_layers_share_is_computed_once():
    graph_module = tiled(target("llama", 3).optimize(NoDrafter()))
    parts = cut(graph_module)
    updates = [site.operands for site in parts.sites if site.op == str(update_kv)]
    attentions = [site.operands for site in parts.sites if site.op == str(tiled_attention)]
    assert [len(updates), len(attentions)] == [4, 2]
    assert {operands["cache"] for operands in updates} == {"k_cache_0", "v_cache_0", "k_cache_1", "v_cache_1"}
    assert len({operands["ends"] for operands in updates}) == len({operands["starts"] for operands in updates}) == 1
    assert len({operands["kv_lengths"] for operands in attentions}) == 1
    assert len({operands["q"] for operands in attentions}) == 2


def test_the_graph_that_is_cut_is_not_changed():
    graph_module = tiled_step()
    before = str(graph_module.graph)
    parts = cut(graph_module)
    assert str(graph_module.graph) == before
    assert parts.results["k_cache_0"] == "new_k_cache_0"
    assert not any(node.target in (update_kv, tiled_attention) for node in parts.graph_module.graph.nodes)


def test_draft_trees_are_masks(monkeypatch):
    """With a NaN wherever a layer says nothing of what it gives, and a draft that overflows.

    A layer may multiply a value with a weight of 0, or add to a score that it hides: whatever it does, it finds nothing
    in a cache that is not finite. Those who see the draft get something else than NaN.
    """
    known = [layer for layer in trees.LAYERS if not {"softcap", "sinks"} & layer.keys()]
    monkeypatch.setattr(trees, "LAYERS", known)
    given = trees.step_inputs(trees.tree_batch())
    trees.break_draft(given)
    graph_module, fake_mode = trees.tree_graph(given)
    tiled_given = {name: value.nan_to_num() for name, value in trees.tiled_inputs(given, 43, trees.TAIL).items()}
    tiled_given["v"] = given["v"]
    expected = trees.spread(graph_module(*given.values()))
    PassManager(fake_mode)._run(TileAttention(trees.TAIL), "tensorrt", graph_module)
    found = SplicedStep(cut(graph_module))(*tiled_given.values())
    clean = {name: torch.where(value.isfinite(), found[name], value) for name, value in expected.items()}
    trees.assert_same(clean, expected)
    assert all(value.isfinite().all() for name, value in tiled_given.items() if "_cache_" in name)


def test_a_cache_that_is_written_again_is_an_input_again():
    graph_module = tiled(target("llama", 3).optimize(target("llama", 3).drafter("draft-model"), drafts_for_few=False))
    parts = cut(graph_module)
    updates = [site for site in parts.sites if site.op == str(update_kv)]
    caches = [site.operands["cache"] for site in updates]
    assert len(set(caches)) == len(caches) == 4 + 4 * K
    given = {str(node.target) for node in inputs(graph_module.graph)}
    added = {str(node.target) for node in inputs(parts.graph_module.graph)} - given
    assert len(added) == 4 * (K - 1)
    assert parts.caches.keys() == added | {site.result for site in updates}
    assert set(parts.caches.values()) == {name for name in given if "_cache_" in name}
    assert parts.results["drafter_k_cache_0"] == updates[-4].result, "that of the last pass over the text"
