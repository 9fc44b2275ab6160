"""`fuse_projections`: one product for layers that read the same input."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from emssd_compile.passes.fuse_projections import FuseProjections
from tests.passes.graphs import TinyModel, apply, capture_and_apply, model_with_attention, ops, unpadded


def test_merges_what_reads_the_same_input():
    model = model_with_attention()
    graph_module, manager = unpadded(model)
    assert manager.records[-1].name == "fuse_projections"
    assert manager.records[-1].changed == 1
    assert ops(graph_module)["linear"] == 2  # q, k and v as one; the head
    assert manager.records[-1].refusals == ()


def test_holds_no_weight_twice_and_the_model_goes_on_working():
    model = model_with_attention()
    before = model(torch.tensor([[3, 1, 4]]))
    unpadded(model)
    storages = {p.untyped_storage().data_ptr() for p in (model.q.weight, model.k.weight, model.v.weight)}
    assert len(storages) == 1
    assert model.q.weight.untyped_storage().nbytes() == sum(p.weight.nbytes for p in (model.q, model.k, model.v))
    assert torch.equal(model(torch.tensor([[3, 1, 4]])), before)


def test_changes_nothing_the_second_time():
    graph_module, _ = unpadded(model_with_attention())
    (record,) = apply(graph_module, FuseProjections())
    assert record.changed == 0


def _tied(m: TinyModel, x: Tensor, ids: Tensor) -> Tensor:
    return F.linear(x, m.dense.weight) + F.linear(x, m.dense.weight) * 2


UNFUSED = {
    "one weight used twice": _tied,
    "a weight that is computed": lambda m, x, ids: F.linear(x, m.dense.weight * 2) + F.linear(x, m.q.weight),
}


@pytest.mark.parametrize("local", UNFUSED.values(), ids=UNFUSED)
def test_leaves_weights_alone_that_others_use_and_says_why(local):
    graph_module, (record,) = capture_and_apply(TinyModel(local), FuseProjections())
    assert record.changed == 0
    assert [refusal.reason for refusal in record.refusals] == ["a weight is computed or used elsewhere"]
    assert record.refusals[0].node in {n.name for n in graph_module.graph.nodes}


def test_layers_that_read_different_inputs_stay_apart():
    graph_module, (record,) = capture_and_apply(TinyModel(lambda m, x, ids: m.q(m.dense(x))), FuseProjections())
    assert (record.changed, record.refusals) == (0, ())
    assert ops(graph_module)["linear"] == 3
