"""`ParallelDraftModel`: what its model says behind the text and behind each mask token."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import emssd_compile
from emssd_compile.drafters import ParallelDraftModel
from emssd_compile.errors import DrafterError, OptionError
from tests.drafters.alone import CAPACITY, Alone
from tests.exactness.models import Reference, prompt
from tests.zoo import VOCABULARY, toy_model

K, MASK, NEW = 4, 7, 20
PROMPTS = [prompt(n) for n in (5, 1, 23, 40)]


@torch.no_grad()
def _drafts(model: Any, text: list[int], count: int) -> list[int]:
    """The argmax behind the text, and behind each of as many mask tokens as are needed."""
    logits = model(torch.tensor([[*text, *[MASK] * (count - 1)]])).logits[0]
    return logits[len(text) - 1 :].argmax(-1).tolist()


def test_drafts_are_what_the_model_says_behind_masks():
    """While texts grow, one is read in chunks, and one nears the end of what fits."""
    model = toy_model("llama")
    alone = Alone(ParallelDraftModel(model, MASK, K), rows=4)
    texts = [prompt(3), prompt(1), prompt(CAPACITY - 4), prompt(30)]
    for step in range(3):
        room = [K, K, K, K if step else 2]
        draft = alone.draft(texts, room, 400)
        assert draft.parents is not None
        for row, text in enumerate(texts):
            count = min(room[row], CAPACITY - len(text) + 1)
            assert int(draft.lengths[row]) == count
            assert draft.tokens[row, :count].tolist() == _drafts(model, text, count)
            assert draft.parents[row, :count].tolist() == list(range(count))
        texts = [[*text, *prompt(step % 2 + 1)] for text in texts]


def test_a_row_whose_text_is_not_read_yet_drafts_nothing():
    model = toy_model("llama")
    alone = Alone(ParallelDraftModel(model, MASK, K), rows=2)
    texts = [prompt(3), prompt(30)]
    assert alone.draft(texts, [K, K], 20).lengths.tolist() == [K, 0]
    draft = alone.draft(texts, [K, K], 40)
    assert draft.lengths.tolist() == [K, K]
    assert [row[:K] for row in draft.tokens.tolist()] == [_drafts(model, text, K) for text in texts]


@pytest.mark.parametrize("count", [K, pytest.param(1, marks=pytest.mark.long)])
def test_tokens_are_the_models_own(count):
    model, draft = toy_model("gpt2"), toy_model("gpt2", seed=1)
    fast, plain = (
        emssd_compile.optimize(model, drafter, max_batch=3, max_length=80, backend="eager", layout="packed")
        for drafter in (ParallelDraftModel(draft, MASK, count), "none")
    )
    reference = Reference(model)
    expected = [[*ids, *reference(ids, NEW)] for ids in PROMPTS]
    assert fast.generate(PROMPTS, max_new_tokens=NEW) == expected
    sampling: dict[str, Any] = {"do_sample": True, "temperature": 0.7, "seed": 5, "max_new_tokens": NEW}
    assert fast.generate(PROMPTS, **sampling) == plain.generate(PROMPTS, **sampling)
    assert fast.stats.num_draft_tokens > 0


def test_what_cannot_be_meant_is_refused():
    model = toy_model("gpt2")
    with pytest.raises(OptionError, match="mask_token=-1 is out of range"):
        ParallelDraftModel(model, -1)
    with pytest.raises(OptionError, match="num_draft_tokens=0 must be"):
        ParallelDraftModel(model, MASK, 0)
    with pytest.raises(DrafterError, match=f"mask_token={VOCABULARY}: the draft model knows {VOCABULARY} tokens"):
        emssd_compile.optimize(model, ParallelDraftModel(model, VOCABULARY), max_length=64, backend="eager")
