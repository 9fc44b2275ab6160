"""`bar_unreadable`: no token comes out that could not go in again."""

import torch
from torch import nn

from emssd_compile.passes.bar_unreadable import BarUnreadable, readable
from emssd_compile.passes.drop_noops import DropNoops
from tests.passes.graphs import HIDDEN, VOCABULARY, TinyModel, apply, capture_and_apply, eager, run


def _with_head(tokens: int) -> TinyModel:
    model = TinyModel()
    model.lm_head = nn.Linear(HIDDEN, tokens)
    return model


def test_the_logits_end_with_the_embedding():
    model = _with_head(VOCABULARY + 8)
    graph_module, records = capture_and_apply(model, DropNoops(), BarUnreadable())
    assert records[-1].changed == 1
    assert records[-1].notes == ("barred: tokens 32 to 39, which the embedding cannot take, are never emitted",)
    torch.testing.assert_close(run(graph_module, 9), eager(model, 9)[..., :VOCABULARY], rtol=1e-6, atol=1e-6)
    (again,) = apply(graph_module, BarUnreadable())
    assert again.changed == 0


def test_a_narrow_or_equal_head_stays():
    for tokens in (VOCABULARY, VOCABULARY - 5):
        _, records = capture_and_apply(_with_head(tokens), DropNoops(), BarUnreadable())
        assert (records[-1].changed, records[-1].notes) == (0, ())


def test_the_smallest_of_several_tables_counts():
    small = torch.randn(VOCABULARY - 2, HIDDEN)
    model = TinyModel(lambda m, x, ids: x + small[ids])
    graph_module, records = capture_and_apply(model, DropNoops(), BarUnreadable())
    assert records[-1].changed == 1
    assert readable(graph_module.graph) == VOCABULARY - 2
