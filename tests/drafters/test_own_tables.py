"""`OwnTables`: what a head borrows is the target's, by its rows for the tokens that can be drafted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from emssd_compile.drafters import MTP, BlockDrafter, Eagle3, Medusa
from emssd_compile.drafters.block_config import BlockConfig
from emssd_compile.drafters.decoder_layer import LayerSizes
from emssd_compile.drafters.eagle3_config import Eagle3Config
from emssd_compile.drafters.medusa_config import MedusaConfig
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


COUNTS, MOST = torch.tensor([0, 5, 1, 0, 7, 5, 0, 0, 0, 5, 2]), [1, 4, 5]  # of three equals the lower two


@pytest.mark.parametrize("owns_head", [False, True], ids=["borrowed", "own"])
def test_a_head_to_be_trained_drafts_what_is_said_most_and_begins_with_the_targets_rows(owns_head):
    head = Eagle3(Eagle3Config(HIDDEN, VOCABULARY, taps=(0,), draft_vocabulary=3, owns_head=owns_head))
    head.prepare(target_of(None, 1, 8, VOCABULARY, HIDDEN, TokenTables(EMBEDDING, HEAD)))
    head.begin(COUNTS)
    assert head.ids().tolist() == MOST
    torch.testing.assert_close(head.head_logits(OUTPUTS), _expected(None)[:, MOST])


def test_so_does_a_medusa():
    head = Medusa(MedusaConfig(HIDDEN, VOCABULARY, 2, num_lm_heads=2, draft_vocabulary=3))
    head.prepare(target_of(None, 1, 8, VOCABULARY, HIDDEN, TokenTables(EMBEDDING, HEAD)))
    head.begin(COUNTS)
    assert head.token_map.tolist() == MOST
    assert all(torch.equal(weight, HEAD[MOST]) for weight in head.lm_heads.parameters())


def test_a_head_of_its_own_size_begins_as_it_was_made():
    """Nothing of the target's fits it."""
    layer = LayerSizes.as_wide_as(2 * HIDDEN)
    sizes: dict[str, Any] = {"layer": layer, "draft_vocabulary": 3, "owns_embedding": True, "owns_head": True}
    head = Eagle3(Eagle3Config(HIDDEN, VOCABULARY, taps=(0,), **sizes))
    head.prepare(target_of(None, 1, 8, VOCABULARY, HIDDEN, TokenTables(EMBEDDING, HEAD)))
    made = {name: value.clone() for name, value in head.named_parameters()}
    head.begin(COUNTS)
    assert all(torch.equal(value, made[name]) for name, value in head.named_parameters())


@BIASES
@torch.no_grad()
def test_so_does_that_of_a_module_for_multi_token_prediction(bias):
    """Behind its norm."""
    head = MTP(MTPConfig(HIDDEN, VOCABULARY))
    head.prepare(target_of(None, 1, 8, VOCABULARY, HIDDEN, TokenTables(EMBEDDING, HEAD, bias)))
    unit = OUTPUTS / OUTPUTS.square().mean(-1, keepdim=True).sqrt()
    torch.testing.assert_close(head.logits_of(unit), _expected(bias, unit))
