"""`drop_noops`: what does nothing goes, everything else stays."""

import pytest
import torch
from torch import Tensor

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


def test_a_relation_of_tokens_keeps_its_sizes_as_it_becomes_a_reshape():
    def local(m: TinyModel, x: Tensor, ids: Tensor) -> Tensor:
        relation = (x @ x.transpose(1, 2)).contiguous().view(x.shape[1], x.shape[1])
        return x + 0 * relation.transpose(0, 1).contiguous().view(1, x.shape[1], x.shape[1]).sum(-1, keepdim=True)

    model = TinyModel(local)
    graph_module, _ = capture_and_apply(model, DropNoops())
    assert not ops(graph_module).keys() & {"view", "clone", "_unsafe_view"}
    torch.testing.assert_close(run(graph_module, 9), eager(model, 9), rtol=1e-5, atol=1e-5)


def test_transposes_that_undo_each_other_go():
    model = TinyModel(lambda m, x, ids: x.transpose(1, 2).contiguous().transpose(-1, 1) * 2)
    graph_module, _ = capture_and_apply(model, DropNoops())
    assert not ops(graph_module)["transpose"]
    torch.testing.assert_close(run(graph_module, 9), eager(model, 9), rtol=1e-5, atol=1e-5)
    other = TinyModel(lambda m, x, ids: (x @ x.transpose(1, 2)).transpose(0, 1).transpose(1, 2).mean(1)[..., None] + x)
    assert ops(capture_and_apply(other, DropNoops())[0])["transpose"] == 3
