"""`restore_all_logits`: a forward that gives the last position's logits gives all of them."""

import pytest
import torch
from torch import Tensor, nn

from emssd_compile.errors import UnsupportedModelError
from emssd_compile.passes.drop_noops import DropNoops
from emssd_compile.passes.restore_all_logits import RestoreAllLogits
from tests.passes.graphs import TinyModel, apply, capture_and_apply, eager, ops, run

LAST = {
    "slice": lambda m, x, ids: x[:, -1:],
    "select": lambda m, x, ids: x[:, -1],
    "list index": lambda m, x, ids: x[:, [-1]],
    "then a layer": lambda m, x, ids: m.dense(x[:, -1:]),
}


@pytest.mark.parametrize("local", LAST.values(), ids=LAST)
def test_gives_the_logits_of_every_token(local):
    model = TinyModel(local)
    graph_module, records = capture_and_apply(model, DropNoops(), RestoreAllLogits())
    assert records[-1].changed == 1
    logits = run(graph_module, 7).reshape(7, -1)
    assert len(logits) == 7
    # What the model says after each prefix is what the restored graph says at its last token.
    torch.testing.assert_close(logits[-1], eager(model, 7).reshape(-1), rtol=1e-6, atol=1e-6)
    assert not torch.equal(logits[0], logits[-1])


def test_a_second_run_changes_nothing():
    graph_module, _ = capture_and_apply(TinyModel(LAST["slice"]), DropNoops(), RestoreAllLogits())
    (record,) = apply(graph_module, RestoreAllLogits())
    assert record.changed == 0


def test_all_logits_are_left_alone():
    model = TinyModel()
    graph_module, records = capture_and_apply(model, DropNoops(), RestoreAllLogits())
    assert records[-1].changed == 0
    assert ops(graph_module) == {"embedding": 1, "linear": 1}
    assert torch.equal(run(graph_module, 7), eager(model, 7))


class _Flat(nn.Module):
    """Logits `[T, V]` without a batch dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = TinyModel()

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.inner(input_ids)[0]


def test_logits_without_a_batch_dimension_get_one():
    model = _Flat().eval()
    graph_module, records = capture_and_apply(model, DropNoops(), RestoreAllLogits())
    assert records[-1].changed == 1
    assert run(graph_module, 7).shape == (1, 7, 32)
    assert torch.equal(run(graph_module, 7)[0], eager(model, 7))


REFUSED = {
    "first token": lambda m, x, ids: x[:, :1],
    "last but one": lambda m, x, ids: x[:, -2:-1],
    "last two tokens": lambda m, x, ids: x[:, -2:],
    "mean of the tokens": lambda m, x, ids: x.mean(1, keepdim=True),
}


@pytest.mark.parametrize("local", REFUSED.values(), ids=REFUSED)
def test_refuses_logits_of_something_else(local):
    with pytest.raises(UnsupportedModelError, match="neither those of every token nor those of the last") as caught:
        capture_and_apply(TinyModel(local), DropNoops(), RestoreAllLogits())
    assert caught.value.op is not None
    assert caught.value.op.startswith("aten.")
    assert caught.value.node is not None
