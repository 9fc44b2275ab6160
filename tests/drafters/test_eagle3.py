"""`Eagle3`: what it drafts is what EAGLE-3 drafts, and the tokens stay the target's."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch._inductor.config

from emssd_compile.drafters import DynamicTree, Eagle3
from emssd_compile.drafters.decoder_layer import LayerSizes
from emssd_compile.drafters.eagle3_config import Eagle3Config, default_taps
from emssd_compile.drafters.rotary import Rotary
from emssd_compile.errors import DrafterError, OptionError
from tests.drafters.contexts import target_of
from tests.drafters.llama_heads import (
    HIDDEN,
    NEW,
    PROMPTS,
    ROWS,
    SAMPLED,
    THIRD,
    TREE,
    features_of,
    learn,
    loud,
    optimized,
    plainly,
    prepared,
    shape,
    target,
)
from tests.drafters.plain_heads import plain_eagle3
from tests.drafters.watched import check_drafts
from tests.exactness.models import prompt
from tests.zoo import VOCABULARY

CONFIGS = {
    "borrows": Eagle3Config(HIDDEN, VOCABULARY, taps=default_taps(2), speculative_tokens=3),
    "eagle-3": Eagle3Config(
        HIDDEN,
        VOCABULARY,
        LayerSizes(32, 48, 4, 2, 16, rotary=Rotary(500.0), has_qkv_bias=True, has_output_bias=True),
        taps=(0, 0, 1),
        draft_vocabulary=len(THIRD),
        owns_embedding=True,
        owns_head=True,
        adds_normalised=True,
        normalises_features=True,
        speculative_tokens=3,
    ),
    "eagle-3.1": Eagle3Config(
        HIDDEN,
        VOCABULARY,
        LayerSizes(HIDDEN, 48, 4, 1, 8, has_head_norms=True),
        taps=(1, 0),
        num_layers=2,
        draft_vocabulary=len(THIRD),
        normalises_taps=True,
        feeds_on_normalised=True,
        speculative_tokens=3,
    ),
}


def head_of(name: str, *, tree: DynamicTree | None = None, seed: int = 0) -> Eagle3:
    """A head of random weights, loud enough to draft something else for each text."""
    torch.manual_seed(seed)
    return loud(Eagle3(CONFIGS[name], tree=tree))


@pytest.mark.parametrize(("name", "tree"), [("eagle-3", None), ("eagle-3.1", TREE)])
def test_drafts_are_those_of_the_paper_and_tokens_the_targets(name, tree):
    """Prompts are read in chunks, and by one of the rows that begin with it; rows end while others begin."""
    head = head_of(name, tree=tree)
    fast, plain = optimized(head), plain_eagle3(head, target())
    assert check_drafts(fast, plain, PROMPTS, tree=tree, max_new_tokens=NEW) > 20
    sampled = {**SAMPLED, "num_return_sequences": 2}
    assert check_drafts(fast, plain, PROMPTS, tree=tree, shape=shape, max_new_tokens=NEW, **sampled) > 20
    assert fast.generate(PROMPTS, max_new_tokens=NEW) == plainly()
    assert fast.generate(PROMPTS, max_new_tokens=NEW, **sampled) == plainly(**sampled)


@pytest.mark.parametrize("name", ["eagle-3", "eagle-3.1"])
@torch.no_grad()
def test_it_is_trained_on_what_it_does_when_it_drafts(name):
    """Of each place in a text, the logits of each draft are those of drafting behind it, drafts being the text's."""
    head = prepared(head_of(name))
    plain, texts = plain_eagle3(head, target()), [prompt(9), prompt(12)[:9]]
    steps = list(head.rollout(features_of(texts, head)))
    assert len(steps) == head.num_draft_tokens
    for index, logits in enumerate(steps):
        assert logits.shape == (2, 9, VOCABULARY)
        for row, text in enumerate(texts):
            for place in range(8 - index):
                expected = plain.logits(plain.output(text[: place + 2], text[place + 2 : place + 2 + index]))
                torch.testing.assert_close(logits[row, place, plain.ids], expected, rtol=1e-3, atol=1e-3)
        undrafted = torch.ones(VOCABULARY, dtype=torch.bool).index_fill(0, plain.ids, False)
        assert (logits[..., undrafted] == -torch.inf).all()


@pytest.mark.parametrize("tree", [None, TREE])
def test_trained_on_the_targets_texts_it_is_mostly_right(tree):
    """What is accepted stays read: one stale or missing key would show in the drafts behind it."""
    torch.manual_seed(0)
    head = prepared(Eagle3(CONFIGS["borrows"], tree=tree))
    learn(head, plainly())
    fast, plain = optimized(head.eval()), plain_eagle3(head, target())
    assert check_drafts(fast, plain, PROMPTS, tree=tree, max_new_tokens=NEW) > 20
    fast.stats.reset()
    assert fast.generate(PROMPTS, max_new_tokens=NEW) == plainly()
    assert fast.stats.num_accepted_draft_tokens > fast.stats.num_spec_steps  # more than one a row and step


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_draft_tokens": 0}, "Eagle3 num_draft_tokens=0 is out of range"),
        ({"num_draft_tokens": 3, "tree": TREE}, "num_draft_tokens=3 is for chains, and the tree says"),
        ({"tree": (4, 2)}, "is no DynamicTree; pass tree=DynamicTree"),
        ({"tree": DynamicTree(61, 1, 61)}, "puts 61 tokens behind a node, and 53 can be drafted"),
        ({"taps": (0, 1)}, "this Eagle3 reads 3 layers"),
        ({"taps": (0, 1, -1)}, "taps\\[2\\]=-1 is out of range"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(OptionError, match=message):
        Eagle3(CONFIGS["eagle-3"], **options)


def test_layers_to_read_have_to_be_said():
    with pytest.raises(OptionError, match="nothing says which layers"):
        Eagle3(replace(CONFIGS["eagle-3"], taps=None))


def test_a_target_of_another_size_or_without_what_is_borrowed_is_refused():
    head = head_of("borrows")
    with pytest.raises(DrafterError, match="of size 64; the target's have 32"):
        head.prepare(target_of(None, ROWS, 96, VOCABULARY, 32))
    with pytest.raises(DrafterError, match="reads the target's embedding"):
        head.prepare(target_of(None, ROWS, 96, VOCABULARY, HIDDEN))
    with pytest.raises(DrafterError, match="differ by more than padding"):
        head.prepare(target_of(None, ROWS, 96, 2 * VOCABULARY, HIDDEN))


def test_an_early_a_middle_and_a_late_layer_are_read():
    assert default_taps(32) == (1, 15, 28)
    assert default_taps(2) == (0, 1)
