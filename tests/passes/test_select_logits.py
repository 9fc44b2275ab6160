"""`select_logits`: the LM head runs where a logit is needed."""

import pytest
import torch
from torch import Tensor

from emssd_compile.errors import UnsupportedModelError
from emssd_compile.passes.select_logits import SelectLogits
from emssd_compile.passes.unpad_tokens import UnpadTokens
from tests.passes.graphs import (
    BATCH,
    COMMITTED,
    ROWS,
    VOCABULARY,
    TinyModel,
    alone,
    canonical,
    causal,
    model_with_attention,
    run_packed,
    unpadded,
)


def test_runs_the_head_on_the_chosen_tokens_only():
    model = model_with_attention()
    graph_module, manager = canonical(model)
    for step in (UnpadTokens(BATCH, manager.fake_mode), SelectLogits()):
        manager._run(step, "L2", graph_module)
    assert manager.records[-1].changed == 1
    ids, positions = torch.randint(VOCABULARY, (6,)), torch.arange(6)
    nothing = torch.zeros(0, dtype=torch.int64)
    chosen = torch.tensor([5, 0])
    hidden, logits = graph_module(ids, positions, nothing, nothing, nothing, chosen)
    expected = model(ids[None])[0].detach()
    assert hidden.shape == (6, 16)
    torch.testing.assert_close(logits, expected[chosen], rtol=1e-5, atol=1e-5)


SCALED_HEADS = {
    "capped logits": lambda logits: 30 * torch.tanh(logits / 30),
    "scaled logits": lambda logits: logits * 0.5,
    "logits that meet again": lambda logits: logits.softmax(-1) + logits.flip(-1),
}


class _AfterHead(TinyModel):
    def __init__(self, after) -> None:
        super().__init__(attend=causal)
        self.after = after

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.after(super().forward(input_ids))


@pytest.mark.parametrize("after", SCALED_HEADS.values(), ids=SCALED_HEADS)
def test_keeps_what_follows_the_head(after):
    model = _AfterHead(after)
    graph_module, _ = unpadded(model)
    _, logits = run_packed(graph_module, ROWS, COMMITTED)
    torch.testing.assert_close(logits, alone(model), rtol=1e-5, atol=1e-5)


class _WithTerm(TinyModel):
    """Logits of which a part follows from the tokens' places, and one that has their number for no reason."""

    def forward(self, input_ids: Tensor) -> Tensor:
        tokens = input_ids.shape[1]
        places = torch.arange(tokens)
        return super().forward(input_ids) * (2.0 + places)[:, None].log() + torch.zeros(tokens, 1)


def test_terms_that_have_the_tokens_are_selected_too():
    model = _WithTerm(attend=causal)
    graph_module, _ = unpadded(model)
    _, logits = run_packed(graph_module, ROWS, COMMITTED)
    torch.testing.assert_close(logits, alone(model), rtol=1e-5, atol=1e-5)


class _TwoHeads(TinyModel):
    def forward(self, input_ids: Tensor) -> Tensor:
        return super().forward(input_ids) + self.lm_head(self.embed(input_ids))


def test_refuses_logits_that_come_from_two_places():
    graph_module, manager = canonical(_TwoHeads(attend=causal))
    manager._run(UnpadTokens(BATCH, manager.fake_mode), "L2", graph_module)
    with pytest.raises(UnsupportedModelError, match="do not come out of an LM head") as caught:
        manager._run(SelectLogits(), "L2", graph_module)
    assert caught.value.op == "aten.add.Tensor"
