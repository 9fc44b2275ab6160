"""`group_linears`: linear layers of one input as one product."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import emssd_compile
from emssd_compile.drafters import Eagle3, RecurrentDrafter
from emssd_compile.passes.group_linears import GroupLinears
from emssd_compile.passes.raise_linears import RaiseLinears
from tests.exactness.models import build
from tests.passes.graphs import (
    COMMITTED,
    ROWS,
    TinyModel,
    alone,
    apply,
    capture_and_apply,
    model_with_attention,
    ops,
    run,
    run_packed,
    unpadded,
)


def test_replaces_every_layer_and_says_how_many():
    graph_module, _ = unpadded(model_with_attention())
    layers = ops(graph_module)["linear"]
    (record,) = apply(graph_module, GroupLinears())
    assert (record.changed, record.refusals) == (layers, ())
    assert ops(graph_module)["grouped_linear"] == layers - 2 > 0  # q, k and v are one
    assert not ops(graph_module)["linear"]


def test_what_is_one_product_gives_what_the_model_gives_also_after_a_weight_has_changed():
    model = model_with_attention()
    graph_module, _ = unpadded(model)
    apply(graph_module, GroupLinears())
    for _ in range(2):
        torch.testing.assert_close(run_packed(graph_module, ROWS, COMMITTED)[1], alone(model))
        with torch.no_grad():
            model.k.weight.mul_(-2)
            model.v.bias.add_(1)


def test_gives_what_the_model_gives_also_with_a_bias_and_after_a_weight_has_changed():
    model = TinyModel(lambda m, x, ids: m.dense(x))
    graph_module, _ = capture_and_apply(model, GroupLinears())
    for _ in range(2):
        ids = torch.randint(32, (1, 5), generator=torch.Generator().manual_seed(5))
        torch.testing.assert_close(run(graph_module, 5), model(ids).detach())
        with torch.no_grad():
            model.dense.weight.mul_(-2)


def test_changes_nothing_the_second_time():
    graph_module, _ = capture_and_apply(TinyModel(), GroupLinears())
    (record,) = apply(graph_module, GroupLinears())
    assert record.changed == 0


def test_leaves_a_computed_weight_alone_and_says_why():
    _, (record,) = capture_and_apply(TinyModel(lambda m, x, ids: F.linear(x, m.q.weight * 2)), GroupLinears())
    assert record.changed == 1  # the head
    assert [refusal.reason for refusal in record.refusals] == ["its weight is computed"]


def test_leaves_weights_on_other_devices_alone():
    graph_module, _ = capture_and_apply(TinyModel())
    graph_module.to("meta")
    grouping = GroupLinears()
    assert grouping.run(graph_module) == 0
    assert [refusal.reason for refusal in grouping.refusals] == ["its weight is on meta"]


@pytest.mark.parametrize(("kind", "given"), [(Eagle3, {"taps": (0,)}), (RecurrentDrafter, {})], ids=["eagle3", "rnn"])
def test_layers_of_a_drafter_are_products_too_in_an_order_that_runs(kind, given):
    """Their weights are named where they are used, also those of one input, which are one product."""
    model: Any = build("llama")
    sizes = {"hidden_size": model.config.hidden_size, "vocabulary": model.config.vocab_size}
    head = kind(kind.config_class(**sizes, **given))
    fast = emssd_compile.optimize(model, head, max_batch=2, max_length=32, backend="eager", layout="packed")
    assert ops(fast.graph_module)["mm"] + ops(fast.graph_module)["addmm"] > 0
    lowered = fast._step.for_target((RaiseLinears(), GroupLinears()), [])
    lowered.graph.lint()
    assert not ops(lowered)["mm"] + ops(lowered)["addmm"] + ops(lowered)["linear"]
