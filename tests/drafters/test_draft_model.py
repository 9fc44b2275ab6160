"""`DraftModel`: a second causal LM drafts greedily, from its own cache, for every row at once."""

from dataclasses import replace

import pytest
import torch

import emssd_compile
from emssd_compile.drafters import Draft, DraftContext, DraftModel
from emssd_compile.errors import DrafterError, OptionError
from tests.passes.graphs import TinyModel, causal, model_with_attention

PROMPTS = [[3, 1, 4], [9], [2, 6, 5, 3, 5, 8, 9, 7, 1, 1, 2]]


def _fast(model, drafter):
    return emssd_compile.optimize(model, drafter, max_batch=2, max_length=48, backend="eager")


def test_the_target_as_its_own_draft_model_has_every_draft_accepted():
    """Also the proof that it catches up when all was accepted: one stale or missing KV would end the agreement."""
    model = model_with_attention()
    fast = _fast(model, DraftModel(model, num_draft_tokens=3))
    plain = _fast(model, "none").generate(PROMPTS, max_new_tokens=20)
    assert fast.generate(PROMPTS, max_new_tokens=20) == plain
    assert fast.stats.num_accepted_draft_tokens == fast.stats.num_draft_tokens > 0


def test_another_model_drafts_and_the_tokens_stay_the_targets():
    model = model_with_attention()
    torch.manual_seed(7)
    other = TinyModel(attend=causal, kv_heads=1)
    fast = _fast(model, DraftModel(other, num_draft_tokens=3))
    assert fast.generate(PROMPTS, max_new_tokens=20) == _fast(model, "none").generate(PROMPTS, max_new_tokens=20)
    assert fast.stats.num_accepted_draft_tokens < fast.stats.num_draft_tokens


def test_another_vocabulary_is_refused():
    other = model_with_attention()
    other.embed, other.lm_head = torch.nn.Embedding(40, 16), torch.nn.Linear(16, 40)
    with pytest.raises(DrafterError, match="predicts 40 tokens and the target 32"):
        _fast(model_with_attention(), other)


class _Graded(DraftModel):
    """Drafts only what it gives one grade."""

    def __init__(self, model, wanted: int) -> None:
        super().__init__(model, num_draft_tokens=3)
        self.wanted = wanted

    def forward(self, context: DraftContext) -> Draft:
        draft = super().forward(context)
        assert draft.grades is not None
        return replace(draft, lengths=draft.lengths * (draft.grades == self.wanted).all(1))


def test_the_grade_is_the_probability_in_eighths():
    """The same probability for every token is grade 0 of a vocabulary of 32; all on one token is the last grade."""
    flat, sure = model_with_attention(), model_with_attention()
    with torch.no_grad():
        flat.lm_head.weight.zero_()
        sure.lm_head.weight.mul_(1e4)
    for model, grade in ((flat, 0), (sure, 7)):
        fast = _fast(model, _Graded(model, grade))
        fast.generate(PROMPTS, max_new_tokens=8)
        assert fast.stats.num_draft_tokens > 0


@pytest.mark.parametrize("size", [0, -1, 1.5])
def test_a_size_that_makes_no_sense_is_refused(size):
    with pytest.raises(OptionError, match=f"DraftModel num_draft_tokens={size}"):
        DraftModel(TinyModel(), size)
