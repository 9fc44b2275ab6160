"""`ParallelEagle`: what it drafts in one pass is what P-EAGLE drafts behind masks, and the tokens stay the target's."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest
import torch

from emssd_compile.drafters import Eagle3, ParallelEagle, load_head
from emssd_compile.drafters.decoder_layer import LayerSizes
from emssd_compile.drafters.parallel_eagle import ParallelEagleConfig
from emssd_compile.drafters.rotary import Rotary
from emssd_compile.errors import CheckpointError, DrafterError, OptionError
from emssd_compile.step.drafting import TokenTables
from tests.drafters.contexts import target_of
from tests.drafters.head_cases import write
from tests.drafters.llama_heads import (
    HIDDEN,
    NEW,
    PROMPTS,
    SAMPLED,
    THIRD,
    TREE,
    features_of,
    loud,
    optimized,
    plainly,
    prepared,
    shape,
    target,
)
from tests.drafters.plain_heads import plain_parallel_eagle
from tests.drafters.test_eagle3_layouts import CONFIG as EAGLE3
from tests.drafters.test_eagle3_layouts import HT, V, tensors
from tests.drafters.watched import check_drafts
from tests.exactness.models import prompt
from tests.zoo import VOCABULARY

CONFIGS = {
    "borrows": ParallelEagleConfig(
        HIDDEN, VOCABULARY, taps=(0, 0, 1), num_layers=1, owns_embedding=False, speculative_tokens=5, mask_token=3
    ),
    "owns": ParallelEagleConfig(
        HIDDEN,
        VOCABULARY,
        LayerSizes(32, 48, 4, 2, 16, rotary=Rotary(500.0), has_head_norms=True),
        taps=(1, 0),
        num_layers=2,
        draft_vocabulary=len(THIRD),
        owns_head=True,
        normalises_taps=True,
        speculative_tokens=4,
    ),
}


def head_of(name: str, **options: Any) -> ParallelEagle:
    """A head of random weights."""
    torch.manual_seed(0)
    return loud(ParallelEagle(CONFIGS[name], **options))


SAMPLED_TWICE = {**SAMPLED, "num_return_sequences": 2}


@pytest.mark.parametrize(
    ("name", "options", "new"),
    [pytest.param("borrows", {}, 6, marks=pytest.mark.long), ("owns", SAMPLED_TWICE, 5)],
)
def test_drafts_are_those_behind_masks_and_tokens_the_targets(name, options, new):
    """Prompts are read in chunks, and by one of the rows that begin with it; rows end while others begin."""
    head = head_of(name)
    fast, plain = optimized(head), plain_parallel_eagle(head, target())
    shaped: Any = {"shape": shape} if options else {}
    assert check_drafts(fast, plain, PROMPTS, max_new_tokens=new, **shaped, **options) > 20
    assert fast.generate(PROMPTS, max_new_tokens=NEW) == plainly()
    assert fast.generate(PROMPTS, max_new_tokens=NEW, **SAMPLED_TWICE) == plainly(**SAMPLED_TWICE)


def test_a_single_draft_needs_no_mask():
    head = head_of("owns", num_draft_tokens=1)
    fast, plain = optimized(head), plain_parallel_eagle(head, target())
    assert check_drafts(fast, plain, PROMPTS[:1], max_new_tokens=NEW) > 5


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_it_is_trained_on_what_it_does_when_it_drafts(name):
    head = prepared(head_of(name))
    plain, texts = plain_parallel_eagle(head, target()), [prompt(9), prompt(12)[:9]]
    steps = list(head.rollout(features_of(texts, head)))
    assert len(steps) == head.num_draft_tokens
    for index, logits in enumerate(steps):
        for row, text in enumerate(texts):
            for place in range(8 - index):
                expected = plain.logits(plain.output(text[: place + 2], text[place + 2 : place + 2 + index]))
                torch.testing.assert_close(logits[row, place, plain.ids], expected, rtol=1e-3, atol=1e-3)


def test_a_head_to_be_trained_begins_with_the_targets_embedding():
    table = torch.randn(VOCABULARY, HIDDEN)
    tables = TokenTables(table, torch.randn(VOCABULARY, HIDDEN))
    target = target_of(None, 1, 8, VOCABULARY, HIDDEN, tables)
    head = ParallelEagle.for_target(target, num_layers=1)
    head.prepare(target)
    head.begin(torch.zeros(VOCABULARY, dtype=torch.int64))
    assert torch.equal(head.embed_tokens.weight, table)
    assert (head.config.mask_token, head.num_draft_tokens, head.borrows) == (VOCABULARY - 1, 8, ("head",))


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_written_is_read(tmp_path, name):
    head = head_of(name)
    head.save_pretrained(tmp_path)
    read = load_head(tmp_path)
    assert type(read) is ParallelEagle
    assert read.config == head.config
    assert read.state_dict().keys() == head.state_dict().keys()
    assert all(torch.equal(value, head.state_dict()[name]) for name, value in read.state_dict().items())


WEIGHTS = {**tensors(), "mask_hidden": torch.randn(1, 1, 3 * HT)}
SPECULATORS = {
    **{name: value for name, value in EAGLE3.items() if name != "embed_requires_grad"},
    "speculators_model_type": "peagle",
    "mask_token_id": 7,
}
FLAT = {**EAGLE3["transformer_layer_config"], "draft_vocab_size": 13, "target_hidden_size": HT, "ptd_token_id": 7}


def test_checkpoints_of_speculators_and_of_vllm_are_read(tmp_path):
    head = load_head(write(tmp_path / "speculators", SPECULATORS, WEIGHTS))
    assert isinstance(head, ParallelEagle)
    assert (head.config.mask_token, head.num_draft_tokens, head.taps) == (7, 5, (0, 1, 3))
    assert head.borrows == ()
    second = {
        name.replace("layers.0.", "layers.1."): value if value.dim() == 1 or "_proj" not in name else value[:, :16]
        for name, value in tensors().items()
        if name.startswith("layers.0.") and "hidden_norm" not in name
    }
    second["layers.1.mlp.down_proj.weight"] = torch.randn(16, 20)
    named = {name.replace("layers.0.", "midlayer."): value for name, value in WEIGHTS.items()} | second
    named["mask_hidden"] = named["mask_hidden"][0]
    flat = load_head(write(tmp_path / "flat", {**FLAT, "parallel_drafting": True}, named), taps=(0, 1, 3))
    assert isinstance(flat, ParallelEagle)
    assert (flat.config.mask_token, flat.num_draft_tokens, flat.config.num_layers) == (7, 8, 2)
    for name in ("mask_hidden", "embed_tokens.weight", "layers.0.self_attn.k_proj.weight"):
        assert torch.equal(flat.state_dict()[name], head.state_dict()[name])


@pytest.mark.parametrize(
    ("config", "weights", "message"),
    [
        ({"mask_token_id": None}, {}, "mask_token_id is missing"),
        ({"mask_token_id": V}, {}, f"mask_token={V} is out of range"),
        ({"mask_token_id": -1}, {}, "mask_token_id is -1; it is to be the id of a token"),
        ({"parallel_drafting": False}, {}, "parallel_drafting is false"),
        ({}, {"mask_hidden": None}, "lacks 1 tensors of a ParallelEagle: mask_hidden"),
        ({}, {"mask_hidden": torch.ones(1, 1, HT)}, r"mask_hidden is \[1, 1, 24\]; expected \[1, 1, 72\]"),
        ({"speculators_model_type": "eagle3"}, {}, "a Eagle3 does not know: mask_hidden"),
    ],
)
def test_checkpoints_that_do_not_fit_are_refused_by_name(tmp_path, config, weights, message):
    with pytest.raises(CheckpointError, match=message):
        load_head(write(tmp_path, {**SPECULATORS, **config}, {**WEIGHTS, **weights}))


def test_options_out_of_range_and_targets_without_the_mask_are_refused():
    with pytest.raises(OptionError, match="it drafts chains only"):
        head_of("owns", tree=TREE)
    with pytest.raises(OptionError, match="ParallelEagle num_draft_tokens=0 is out of range"):
        head_of("owns", num_draft_tokens=0)
    with pytest.raises(OptionError, match=f"mask_token={VOCABULARY} is out of range"):
        ParallelEagleConfig(HIDDEN, VOCABULARY, mask_token=VOCABULARY)
    last = ParallelEagleConfig(HIDDEN, VOCABULARY, taps=(0, 0, 1), num_layers=1, owns_embedding=False)
    tables = TokenTables(torch.randn(VOCABULARY - 1, HIDDEN), torch.randn(VOCABULARY - 1, HIDDEN))
    with pytest.raises(DrafterError, match=f"is {VOCABULARY - 1}, and the target's embedding has {VOCABULARY - 1}"):
        ParallelEagle(last).prepare(target_of(None, 1, 8, VOCABULARY - 1, HIDDEN, tables))
    assert asdict(last)["mask_token"] == VOCABULARY - 1
    assert issubclass(ParallelEagle, Eagle3)
