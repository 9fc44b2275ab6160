"""`fuse_projections`: one product for layers that read the same input."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from emssd_compile.passes.fuse_projections import FuseProjections
from tests.passes.graphs import (
    COMMITTED,
    ROWS,
    TinyModel,
    alone,
    apply,
    capture_and_apply,
    model_with_attention,
    ops,
    run_packed,
    unpadded,
)


def test_merges_what_reads_the_same_input():
    graph_module, _ = unpadded(model_with_attention())
    before = ops(graph_module)["linear"]
    (record,) = apply(graph_module, FuseProjections())
    assert (record.changed, record.refusals) == (1, ())
    assert (before, ops(graph_module)["linear"]) == (4, 2)  # q, k and v as one; the head


def test_gives_what_the_model_gives():
    model = model_with_attention()
    graph_module, _ = unpadded(model)
    apply(graph_module, FuseProjections())
    torch.testing.assert_close(run_packed(graph_module, ROWS, COMMITTED)[1], alone(model))


def test_leaves_the_weights_of_the_model_where_they_are():
    model = model_with_attention()
    before = {name: (p.data_ptr(), p._version) for name, p in model.named_parameters()}
    graph_module, _ = unpadded(model)
    apply(graph_module, FuseProjections())
    assert {name: (p.data_ptr(), p._version) for name, p in model.named_parameters()} == before


def test_changes_nothing_the_second_time():
    graph_module, _ = unpadded(model_with_attention())
    assert [record.changed for record in apply(graph_module, FuseProjections(), FuseProjections())] == [1, 0]


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
