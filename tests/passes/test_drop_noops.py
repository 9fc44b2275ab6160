"""`drop_noops`: what does nothing goes, everything else stays."""

import pytest
import torch

from emssd_compile.capture import capture
from emssd_compile.passes.drop_noops import DropNoops
from tests.passes.graphs import TinyModel, apply, capture_and_apply, eager, ops, run

NOOPS = {
    "clone": lambda m, x, ids: x.clone() * 2,
    "to the same dtype": lambda m, x, ids: x.to(torch.float32) * 2,
    "full slice": lambda m, x, ids: x[:, :, 0:] * 2,
    "expand to the same shape": lambda m, x, ids: x.expand(1, -1, 16) * 2,
    "view to the same shape": lambda m, x, ids: x.view(x.shape) * 2,
    "dropout of a model in eval mode": lambda m, x, ids: torch.dropout(x, 0.5, False) * 2,
    "dropout with probability 0": lambda m, x, ids: torch.dropout(x, 0.0, True) * 2,
    "detach": lambda m, x, ids: x.detach() * 2,
}


@pytest.mark.parametrize("local", NOOPS.values(), ids=NOOPS)
def test_drops_what_does_nothing(local):
    model = TinyModel(local)
    graph_module, (record,) = capture_and_apply(model, DropNoops())
    assert ops(graph_module) == {"embedding": 1, "mul": 1, "linear": 1}
    assert record.changed >= 1
    assert torch.equal(run(graph_module, 9), eager(model, 9))


def test_a_view_becomes_a_reshape_which_any_stride_allows():
    model = TinyModel(lambda m, x, ids: x.view(1, -1, 4, 4).transpose(2, 3).clone().flatten(2))
    graph_module = capture(model)
    assert "view" in ops(graph_module)
    apply(graph_module, DropNoops())
    assert "view" not in ops(graph_module)
    assert "clone" not in ops(graph_module)
    assert torch.equal(run(graph_module, 9), eager(model, 9))


KEPT = {
    "another dtype": (lambda m, x, ids: x.to(torch.float64).to(torch.float32), {"_to_copy": 2}),
    "half of a dimension": (lambda m, x, ids: torch.cat([x[..., :8], x[..., 8:]], -1), {"slice": 2}),
    "every second element": (lambda m, x, ids: x[..., ::2].repeat(1, 1, 2), {"slice": 1}),
    "a wider shape": (lambda m, x, ids: x[..., :1].expand(1, -1, 16), {"expand": 1}),
}


@pytest.mark.parametrize(("local", "kept"), KEPT.values(), ids=KEPT)
def test_must_not_drop(local, kept):
    graph_module, _ = capture_and_apply(TinyModel(local), DropNoops())
    found = ops(graph_module)
    assert {name: found[name] for name in kept} == kept


def test_a_second_run_changes_nothing():
    model = TinyModel(lambda m, x, ids: x.clone().view(1, -1, 4, 4).flatten(2))
    graph_module, _ = capture_and_apply(model, DropNoops())
    (record,) = apply(graph_module, DropNoops())
    assert record.changed == 0
