"""`OwnTables`: what a head borrows is the target's, by its rows for the tokens that can be drafted."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from emssd_compile.drafters import MTP, BlockDrafter
from emssd_compile.drafters.block_config import BlockConfig
from emssd_compile.drafters.mtp_config import MTPConfig
from emssd_compile.step.drafting import TokenTables
from tests.drafters.contexts import target_of

HIDDEN, VOCABULARY = 8, 11
EMBEDDING, HEAD, OUTPUTS = torch.randn(VOCABULARY, HIDDEN), torch.randn(VOCABULARY, HIDDEN), torch.randn(3, HIDDEN)
BIASES = pytest.mark.parametrize("bias", [None, torch.randn(VOCABULARY)], ids=["without", "biased"])


def _expected(bias: Tensor | None, outputs: Tensor = OUTPUTS) -> Tensor:
    return outputs @ HEAD.T + (0 if bias is None else bias)


@BIASES
@pytest.mark.parametrize("ids", [[1, 4, 5, 10], list(range(VOCABULARY))], ids=["some", "all"])
def test_a_borrowed_head_says_what_the_targets_says(ids, bias):
    head = BlockDrafter(BlockConfig(HIDDEN, VOCABULARY, taps=(0,), num_layers=1, draft_vocabulary=len(ids)))
    if len(ids) < VOCABULARY:
        head.draft_ids.copy_(torch.tensor(ids))
    head.prepare(target_of(None, 1, 8, VOCABULARY, HIDDEN, TokenTables(EMBEDDING, HEAD, bias)))
    assert head.ids().tolist() == ids
    assert head.table() is EMBEDDING
    torch.testing.assert_close(head.head_logits(OUTPUTS), _expected(bias)[:, ids])


@BIASES
@torch.no_grad()
def test_so_does_that_of_a_module_for_multi_token_prediction(bias):
    """Behind its norm."""
    head = MTP(MTPConfig(HIDDEN, VOCABULARY))
    head.prepare(target_of(None, 1, 8, VOCABULARY, HIDDEN, TokenTables(EMBEDDING, HEAD, bias)))
    unit = OUTPUTS / OUTPUTS.square().mean(-1, keepdim=True).sqrt()
    torch.testing.assert_close(head.logits_of(unit), _expected(bias, unit))
