"""`BlockDrafter`: what it drafts is what DFlash, DSpark and DDTree draft, and the tokens stay the target's."""

from __future__ import annotations

import copy
import csv
from typing import Any

import pytest
import torch

import emssd_compile
from emssd_compile.drafters import BlockDrafter, MarginalTree, anchors, load_head
from emssd_compile.drafters.block_config import BlockConfig, default_taps
from emssd_compile.drafters.decoder_layer import LayerSizes
from emssd_compile.drafters.rotary import Rotary
from emssd_compile.errors import DrafterError, OptionError
from emssd_compile.step.drafting import TokenTables
from emssd_compile.training.features import FrozenTarget
from emssd_compile.training.loss import acceptance, drafts_of
from emssd_compile.training.train import Texts, train
from tests.drafters.contexts import target_of
from tests.drafters.llama_heads import (
    HIDDEN,
    NEW,
    PROMPTS,
    ROWS,
    SAMPLED,
    THIRD,
    features_of,
    loud,
    optimized,
    plainly,
    prepared,
    shape,
    target,
)
from tests.drafters.plain_block import PlainBlock
from tests.drafters.watched import check_drafts
from tests.exactness.models import prompt
from tests.training.toys import TEXT, Characters, options, toy_target
from tests.zoo import VOCABULARY

MASK = 7
_OWN: dict[str, Any] = {"owns_embedding": True, "owns_head": True}
_NARROW = LayerSizes(32, 48, 4, 2, 16, rotary=Rotary(500.0), has_head_norms=True)
_DSPARK: dict[str, Any] = {
    "taps": (1, 0),
    "num_layers": 2,
    "mask_token": MASK,
    "markov_rank": 6,
    "has_confidence": True,
    "confidence_reads_token": True,
}
CONFIGS = {
    "dflash": BlockConfig(
        HIDDEN, VOCABULARY, LayerSizes(HIDDEN, 48, 4, 1, 8), (0, 0, 1), num_layers=2, block_size=4, mask_token=MASK
    ),
    "windows": BlockConfig(
        HIDDEN,
        VOCABULARY,
        LayerSizes(HIDDEN, 48, 4, 2, 8, has_head_norms=True),
        taps=(1,),
        num_layers=3,
        block_size=3,
        sample_from_anchor=True,
        sliding_window=4,
        sliding_layers=(0, 2),
        draft_vocabulary=len(THIRD),
        has_confidence=True,
    ),
    "vanilla": BlockConfig(HIDDEN, VOCABULARY, _NARROW, block_size=3, sample_from_anchor=True, **_DSPARK, **_OWN),
    "gated": BlockConfig(
        HIDDEN,
        VOCABULARY,
        _NARROW,
        block_size=3,
        sample_from_anchor=True,
        markov_head="gated",
        draft_vocabulary=len(THIRD),
        **_DSPARK,
        **_OWN,
    ),
    "rnn": BlockConfig(
        HIDDEN,
        VOCABULARY,
        LayerSizes(HIDDEN, 48, 4, 4, 8),
        block_size=5,
        markov_head="rnn",
        sliding_window=5,
        sliding_layers=(1,),
        sliding_is_causal=False,
        **_DSPARK,
    ),
}
TREE = MarginalTree(nodes=7, width=3)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "dflash": ("dflash", {}),
    "tree, as far as it is sure": ("windows", {"tree": TREE, "confidence_threshold": 0.5}),
    "gated, shorter, as far as it is sure": ("gated", {"num_draft_tokens": 2, "confidence_threshold": 0.12}),
    "rnn": ("rnn", {}),
}


def head_of(name: str, seed: int = 0, **options: Any) -> BlockDrafter:
    """A head of random weights, loud enough to draft something else for each text."""
    torch.manual_seed(seed)
    return loud(BlockDrafter(CONFIGS[name], **options))


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.long if case.startswith("gated") else ()) for case in CASES]
)
def test_drafts_are_those_of_the_papers_and_tokens_the_targets(case):
    """Prompts are read in chunks, and by one of the rows that begin with it; rows end while others begin."""
    name, options = CASES[case]
    head = head_of(name, **options)
    fast, plain = optimized(head), PlainBlock(head, target())
    assert check_drafts(fast, plain, PROMPTS, tree=head.tree, max_new_tokens=NEW) > 20
    sampled = {**SAMPLED, "num_return_sequences": 2}
    assert check_drafts(fast, plain, PROMPTS, tree=head.tree, shape=shape, max_new_tokens=NEW, **sampled) > 20
    assert fast.generate(PROMPTS, max_new_tokens=NEW) == plainly()
    assert fast.generate(PROMPTS, max_new_tokens=NEW, **sampled) == plainly(**sampled)


def test_a_chunk_at_a_time_a_prompt_leaves_what_it_leaves_at_once():
    """Keys and values of the text; and a threshold that no confidence reaches leaves no drafts."""
    found = []
    for chunk in (24, 96):
        fast = optimized(head_of("windows", confidence_threshold=1.0), prefill_chunk=chunk)
        assert fast.generate(PROMPTS[3:], max_new_tokens=2) == [row[:47] for row in plainly()[3:]]
        assert fast.stats.num_draft_tokens == 0
        caches = {name: value for name, value in fast._engine.tensors.items() if "_cache_" in name}
        assert len(caches) == 2 * (3 + 2)
        found.append({name: value[0, :45] for name, value in caches.items()})
    for name, value in found[0].items():
        assert value.abs().amax() > 0
        torch.testing.assert_close(value, found[1][name], rtol=1e-4, atol=1e-4)


@pytest.mark.long
@pytest.mark.parametrize("way", ["onnx", "inductor"])
def test_compiled_and_as_an_artifact_it_makes_the_same_drafts(way, tmp_path):
    """With all that layers may see, and all heads."""
    torch.manual_seed(0)
    options: dict[str, Any] = {
        **_DSPARK,
        "taps": (1,),
        "markov_head": "rnn",
        "block_size": 2,
        "sample_from_anchor": True,
    }
    config = BlockConfig(HIDDEN, VOCABULARY, sliding_window=4, sliding_layers=(0,), **options)
    eager = optimized(BlockDrafter(config, confidence_threshold=0.5))
    decoder: Any
    if way == "onnx":
        pytest.importorskip("onnxruntime")
        eager.export_onnx(tmp_path / "onnx", check=False)
        decoder = emssd_compile.load(tmp_path / "onnx")
    else:
        decoder = optimized(copy.deepcopy(eager.drafter), backend=way)
    for one in (eager, decoder):
        one.stats.reset()
        assert one.generate(PROMPTS, max_new_tokens=NEW) == plainly()
    assert decoder.stats == eager.stats
    assert 0 < eager.stats.num_draft_tokens < 2 * ROWS * eager.stats.num_steps


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_it_is_trained_on_what_it_does_when_it_drafts(name, monkeypatch):
    """Of each place in a text, the logits of each draft are those of drafting behind it, drafts being the text's."""
    head = prepared(head_of(name))
    plain, texts = PlainBlock(head, target()), [prompt(11), prompt(12)[:11]]
    features = features_of(texts, head)
    steps = list(head.rollout(features))
    assert len(steps) == head.num_draft_tokens
    for index, logits in enumerate(steps):
        assert logits.shape == (2, 11, VOCABULARY)
        for row, text in enumerate(texts):
            for place in range(10 - index):
                expected = plain.logits(text[: place + 2], text[place + 2 : place + 2 + index])[index]
                torch.testing.assert_close(logits[row, place, plain.ids], expected, rtol=1e-3, atol=1e-3)
        undrafted = torch.ones(VOCABULARY, dtype=torch.bool).index_fill(0, plain.ids, False)
        assert (logits[..., undrafted] == -torch.inf).all()
    monkeypatch.setattr(anchors, "MOST_ANCHORS", 4)
    for training in (True, False):
        some = list(head.train(training).rollout(features))
        places = (some[0] > -torch.inf).any(-1)[0]
        assert places.sum() == 4
        for logits, part in zip(steps, some, strict=True):
            torch.testing.assert_close(part[:, places], logits[:, places])
            assert (part[:, ~places] == -torch.inf).all()


def test_a_head_is_trained(tmp_path):
    """By what `train-drafter` does; it reads what the target's layers give, and has a mask of its own."""
    sizes = {"num_layers": 1, "block_size": 3, "sample_from_anchor": True, "markov_rank": 4}
    given = options(sizes=sizes, epochs=8)
    head = train(toy_target(), BlockDrafter, Texts([TEXT], [], Characters()), tmp_path, given)
    with (tmp_path / "curve.csv").open() as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file) if row["windows"] == "train"]
    assert losses[-1] < 0.7 * losses[0]
    read = load_head(tmp_path)
    assert isinstance(read, BlockDrafter)
    assert read.config == head.config
    assert read.config.mask_token is None


def test_a_confidence_head_learns_what_is_accepted(tmp_path, monkeypatch):
    """It says of each draft what share of draws the target would accept; without the target's distribution, nothing."""
    sizes = {"num_layers": 1, "block_size": 3, "markov_rank": 4, "has_confidence": True, "confidence_reads_token": True}
    model, texts = toy_target(), Texts([TEXT], [], Characters())
    with pytest.raises(OptionError, match="loss='tokens' does not teach a BlockDrafter how sure to be"):
        train(model, BlockDrafter, texts, tmp_path / "no", options(sizes=sizes))
    monkeypatch.setattr(
        "emssd_compile.training.report.measure_acceptance", lambda *given: {"mean_acceptance_length": 1.0}
    )
    head = train(model, BlockDrafter, texts, tmp_path, options(sizes=sizes, epochs=24, loss="acceptance"))
    target = FrozenTarget(model, 2, 24)
    target.tap(head.taps)
    tokens = torch.tensor([*TEXT[:48].encode()]).view(2, 24)
    with torch.no_grad():
        features, teacher = target.read(tokens, with_logits=True)
        for drafts in drafts_of(head, features, torch.ones_like(tokens, dtype=torch.bool), teacher):
            accepted, said = acceptance(drafts).flatten(), torch.as_tensor(drafts.confidence).sigmoid().flatten()
            assert (accepted - said).abs().mean() < 0.1
            assert torch.corrcoef(torch.stack([accepted, said]))[0, 1] > 0.6


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("dflash", {"num_draft_tokens": 0}, "BlockDrafter num_draft_tokens=0 is out of range"),
        ("dflash", {"num_draft_tokens": 4}, "BlockDrafter num_draft_tokens=4 is out of range; pass at most 3"),
        ("dflash", {"num_draft_tokens": 3, "tree": TREE}, "num_draft_tokens=3 is for chains, and the tree says"),
        ("dflash", {"tree": (4, 2)}, "is no MarginalTree; pass tree=MarginalTree"),
        ("vanilla", {"tree": TREE}, "has a Markov head, which looks at the token before"),
        ("windows", {"tree": MarginalTree(8, 61)}, "takes 61 tokens of each depth, and 53 can be drafted"),
        ("dflash", {"tree": MarginalTree(15, 2)}, "nodes=15 are more than the 14 paths of up to 3 tokens"),
        ("dflash", {"confidence_threshold": 0.5}, "asks for a confidence head, and this one has none"),
        ("rnn", {"confidence_threshold": 1.5}, "confidence_threshold=1.5 is out of range; pass 0 to 1"),
        ("rnn", {"confidence_threshold": "high"}, "confidence_threshold='high' is not a number"),
        ("dflash", {"taps": (0, 1)}, "this BlockDrafter reads 3 layers"),
        ("dflash", {"taps": 3}, "BlockDrafter taps=3 is no list of layers; pass their numbers"),
    ],
)
def test_options_out_of_range_are_refused(name, options, message):
    with pytest.raises(OptionError, match=message):
        BlockDrafter(CONFIGS[name], **options)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"block_size": 1}, "block_size=1 drafts nothing unless sample_from_anchor"),
        ({"mask_token": VOCABULARY}, "BlockConfig mask_token="),
        ({"sliding_layers": (5,), "sliding_window": 9}, r"BlockConfig sliding_layers\[0\]=5 is out of range"),
        ({"sliding_layers": (0,), "sliding_window": 7}, "sliding_window=7 is less than a block of 8 tokens"),
        ({"markov_head": "hidden"}, "markov_head='hidden' is unknown; choose one of"),
        ({"has_confidence": True, "confidence_reads_token": True}, "looks tokens up in the Markov head"),
        ({"layer": _NARROW}, "of width 32 cannot read the embedding or LM head of a target of width 64"),
        ({"num_layers": 65}, "BlockConfig num_layers=65 is out of range"),
        ({"draft_vocabulary": VOCABULARY + 1}, "BlockConfig draft_vocabulary="),
        ({"sample_from_anchor": 1}, "sample_from_anchor=1 is not True or False"),
        ({"sliding_layers": 5, "sliding_window": 9}, "BlockConfig sliding_layers=5 is no list of layers"),
        ({"markov_head": []}, r"markov_head=\[\] is unknown"),
        ({"taps": 1}, "BlockConfig taps=1 is no list of layers"),
        ({"taps": None}, "nothing says which layers of the target this BlockDrafter reads"),
    ],
)
def test_sizes_that_make_no_head_are_refused(sizes, message):
    with pytest.raises(OptionError, match=message):
        BlockDrafter(BlockConfig(HIDDEN, VOCABULARY, **{"taps": (0, 1), **sizes}))


def test_a_target_that_does_not_fit_is_refused():
    few = TokenTables(torch.zeros(MASK, HIDDEN), torch.zeros(VOCABULARY, HIDDEN))
    with pytest.raises(DrafterError, match=f"mask token of the BlockDrafter is {MASK}, and the embedding has {MASK}"):
        head_of("dflash").prepare(target_of(None, ROWS, 96, VOCABULARY, HIDDEN, few))


def test_layers_are_read_that_lie_evenly():
    assert default_taps(36, 5) == (1, 9, 17, 25, 33)
    assert default_taps(36, 1) == (18,)
    assert default_taps(2, 3) == (1, 0, 0)
