"""`Medusa`: each depth by a head of its own, ranks put where the tree wants them, and the tokens stay the target's."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from emssd_compile.drafters import Medusa, load_head
from emssd_compile.drafters.head import Features
from emssd_compile.drafters.medusa_config import MedusaConfig
from emssd_compile.drafters.sparse_tree import SparseTree
from emssd_compile.errors import CheckpointError, DrafterError, OptionError
from emssd_compile.step.drafting import TokenTables
from tests.drafters.alone import nodes_of
from tests.drafters.contexts import target_of
from tests.drafters.head_cases import (
    GREEDY,
    SAMPLING,
    TEXTS,
    Largest,
    fast,
    grade,
    in_speculators,
    ranked,
    seen,
    target,
    write,
)
from tests.passes.graphs import HIDDEN, VOCABULARY

TREE = ((0,), (1,), (3,), (0, 0), (0, 2), (1, 0), (0, 2, 0), (0, 2, 1))
TABLES = TokenTables(head=torch.randn(VOCABULARY, HIDDEN), head_bias=torch.randn(VOCABULARY))
CONFIGS = {
    "LM heads of its own": MedusaConfig(HIDDEN, VOCABULARY, 3),
    "a shared one": MedusaConfig(HIDDEN, VOCABULARY, 4, num_lm_heads=1, bias=False),
    "the target's": MedusaConfig(HIDDEN, VOCABULARY, 3, num_layers=2, num_lm_heads=0),
    "few tokens": MedusaConfig(HIDDEN, VOCABULARY, 3, draft_vocabulary=9),
}


def _head(config, tree=TREE):
    """A random head that has seen a target."""
    torch.manual_seed(2)
    head = Medusa(config, tree=tree)
    if config.draft_vocabulary:
        head.token_map.copy_(torch.randperm(VOCABULARY)[: config.draft_vocabulary])
    head.prepare(target_of(None, len(TEXTS), 24, VOCABULARY, HIDDEN, TABLES))
    return head


def _logits(head, hidden, k):
    """The formula: those of head k, from 0, of all tokens, `[V]`."""
    config, w = head.config, head.state_dict()
    for j in range(config.num_layers):
        bias = w[f"blocks.{k}.layers.{j}.bias"] if config.bias else 0
        hidden = hidden + F.silu(w[f"blocks.{k}.layers.{j}.weight"] @ hidden + bias)
    if config.num_lm_heads == 0:
        return TABLES.head @ hidden + TABLES.head_bias
    known = w[f"lm_heads.{min(k, config.num_lm_heads - 1)}.weight"] @ hidden
    if config.draft_vocabulary is None:
        return known
    logits = torch.full((VOCABULARY,), -torch.inf)
    for token, logit in zip(w["token_map"], known, strict=True):
        logits[token] = logit
    return logits


@pytest.mark.parametrize("sampling", [False, True])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@torch.no_grad()
def test_each_node_is_the_token_of_its_rank_by_the_head_of_its_depth(config, sampling):
    """In rows that may be drafted to depths 3, 2 and 0: shorter trees are the first nodes."""
    head, limits = _head(config), [3, 2, 0]
    found = replace(seen(3, sampling), max_drafts=torch.tensor(limits))
    draft = head(found)
    paths = sorted(TREE, key=lambda path: (len(path), path))
    for row, limit in enumerate(limits):
        drafted = [path for path in paths if len(path) <= limit]
        nodes = nodes_of(draft, row)
        assert len(nodes) == len(drafted)
        for path, (token, parent, of_grade) in zip(drafted, nodes, strict=True):
            depth, rank = len(path) - 1, path[-1]
            tokens, q = ranked(_logits(head, found.hidden[row], depth), found, row, depth)
            assert parent == ([(), *paths].index(path[:-1]))
            assert of_grade == grade(q[tokens[rank]])
            if q[tokens[rank]] > 0:  # top-k may leave fewer tokens than the tree wants: then any will do
                assert token == tokens[rank]


def test_rows_that_are_not_to_draft_do_not():
    found = replace(seen(3, False), can_draft=torch.tensor([True, False, True]))
    with torch.no_grad():
        assert _head(CONFIGS["the target's"])(found).lengths.tolist() == [len(TREE), 0, len(TREE)]


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@torch.no_grad()
def test_rollout_gives_the_logits_of_all_heads_at_each_token(config):
    head, hidden = _head(config), torch.randn(2, 5, HIDDEN)
    found = [*head.rollout(Features(torch.zeros(2, 5, dtype=torch.int64), hidden, {}))]
    assert len(found) == config.num_heads, "also those below the tree"
    for k, logits in enumerate(found):
        for row, t in ((0, 0), (1, 4)):
            torch.testing.assert_close(logits[row, t], _logits(head, hidden[row, t], k))


def test_the_default_tree_has_31_nodes_and_as_few_as_there_are_heads_and_tokens():
    head = Medusa(MedusaConfig(HIDDEN, 1000))
    assert (head.num_draft_tokens, head.max_depth) == (31, 4)
    assert Medusa(MedusaConfig(HIDDEN, 1000, 1)).num_draft_tokens == 10
    assert Medusa(MedusaConfig(HIDDEN, 3, 2)).tree.widths == (3, 3)


def test_a_branching_is_a_tree_too():
    assert Medusa(CONFIGS["the target's"], tree=(2, 1)).tree.paths == ((0,), (1,), (0, 0), (1, 0))


@pytest.mark.parametrize(("num_lm_heads", "depths"), [(3, 1), (1, 3)])
@torch.no_grad()
def test_without_sampling_nothing_is_larger_than_the_logits_of_the_depths(num_lm_heads, depths):
    """Those of one depth, or where an LM head is read once for all, of three; of 31 nodes there are no logits."""
    head = Medusa(MedusaConfig(2, 512, 3, num_lm_heads=num_lm_heads))
    head.prepare(target_of(None, len(TEXTS), 24, 512, 2))
    found = replace(seen(3, False), vocabulary=512, hidden=torch.randn(len(TEXTS), 2))
    with Largest() as largest:
        assert head(found).tokens.shape == (len(TEXTS), 31)
    assert largest.elements == len(TEXTS) * 512 * depths


# Whole steps


def _hearing(model, **options):
    """A head that at each depth expects what the target expected last."""
    config = MedusaConfig(HIDDEN, VOCABULARY, 3, **options)
    head = Medusa(config, tree=TREE)
    head.start_from(TokenTables(head=model.lm_head.weight))
    return head


@pytest.mark.parametrize(
    "options", [pytest.param(GREEDY, marks=pytest.mark.long, id="greedy"), pytest.param(SAMPLING, id="sampling")]
)
@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda model: _hearing(model), id="hearing"),
        pytest.param(lambda model: _hearing(model, num_lm_heads=0), marks=pytest.mark.long, id="no LM heads"),
        pytest.param(lambda model: _head(CONFIGS["few tokens"]), marks=pytest.mark.long, id="few tokens"),
    ],
)
def test_tokens_are_the_targets(make, options):
    model = target()
    plain = fast(model, "none").generate(TEXTS, max_new_tokens=20, **options)
    drafted = fast(model, make(model))
    assert drafted.generate(TEXTS, max_new_tokens=20, **options) == plain
    assert 0 < drafted.stats.num_accepted_draft_tokens < drafted.stats.num_draft_tokens


@pytest.mark.parametrize("options", [GREEDY, SAMPLING], ids=["greedy", "sampling"])
def test_a_fresh_head_expects_again_what_the_target_has_just_chosen_from(options):
    """Where all tokens look alike to the target, it is right at each depth, and draws with the target's noise."""
    model = target()
    with torch.no_grad():
        model.embed.weight.copy_(model.embed.weight[:1].expand(VOCABULARY, HIDDEN))
    head = Medusa(MedusaConfig(HIDDEN, VOCABULARY, 3))
    head.prepare(target_of(None, 2, 48, VOCABULARY, HIDDEN, TokenTables(head=model.lm_head.weight)))
    head.begin(torch.zeros(VOCABULARY, dtype=torch.int64))
    drafted = fast(model, head)
    tokens = 1 + 4 * (1 + head.tree.depth)
    plain = fast(model, "none").generate(TEXTS, max_new_tokens=tokens, **options)
    assert drafted.generate(TEXTS, max_new_tokens=tokens, **options) == plain
    assert drafted.stats.acceptance_histogram == [*[0] * head.tree.depth, 4 * len(TEXTS)]


def test_it_drafts_for_a_target_in_bfloat16():
    model = target().bfloat16()
    drafted = fast(model, _hearing(model))
    assert [len(row) for row in drafted.generate(TEXTS, max_new_tokens=12)] == [len(row) + 12 for row in TEXTS]
    assert drafted.stats.num_accepted_draft_tokens > 0


# Checkpoints

VLLM = {
    "model_type": "medusa",
    "hidden_size": 4,
    "vocab_size": 12,
    "num_heads": 2,
    "num_hidden_layers": 1,
    "truncated_vocab_size": 12,
    "medusa_fc_bias": True,
    "original_lm_head": False,
}


def _vllm(**changed):
    """Tensors of a checkpoint with the config `VLLM`."""
    blocks = {f"blocks.{k}.layers.0.weight": torch.randn(4, 4) for k in range(2)}
    biases = {f"blocks.{k}.layers.0.bias": torch.randn(4) for k in range(2)}
    return {**blocks, **biases, **{f"lm_heads.{k}.weight": torch.randn(12, 4) for k in range(2)}, **changed}


def _same(found, expected):
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_a_checkpoint_of_vllm_is_read_and_written(tmp_path):
    weights = _vllm()
    config = {**VLLM, "medusa_choices": [[0], [1], [0, 2]]}
    head = Medusa.from_pretrained(write(tmp_path, config, weights))
    assert head.config == MedusaConfig(4, 12, 2, tree=((0,), (1,), (0, 2)))
    assert head.tree == SparseTree(((0,), (1,), (0, 2)))
    head.save_pretrained(tmp_path / "again")
    _same(load_file(tmp_path / "again/model.safetensors"), weights)
    assert json.loads((tmp_path / "again/config.json").read_text()).items() >= config.items()
    assert Medusa.from_pretrained(tmp_path, tree=(2,)).tree.paths == ((0,), (1,)), "an option wins over the config"


@pytest.mark.parametrize("name", ["lm_heads.0.weight", "lm_head.weight"])
def test_heads_of_vllm_may_share_an_lm_head_or_read_the_targets(tmp_path, name):
    weights = {f"medusa_heads.{n}": v for n, v in _vllm(**{"lm_heads.1.weight": None}).items()}
    weights[f"medusa_heads.{name}"] = weights.pop("medusa_heads.lm_heads.0.weight")
    config = {**VLLM, "original_lm_head": True}
    head = Medusa.from_pretrained(write(tmp_path / "shared", config, weights))
    assert (head.config.num_lm_heads, head.borrows) == (1, ())
    assert torch.equal(head.get_parameter("lm_heads.0.weight"), weights[f"medusa_heads.{name}"])
    del weights[f"medusa_heads.{name}"]
    head = Medusa.from_pretrained(write(tmp_path / "none", config, weights))
    assert (head.config.num_lm_heads, head.borrows) == (0, ("head",))


@pytest.mark.parametrize("is_cut", [True, False])
def test_of_a_truncated_vocabulary_the_rows_are_those_of_the_token_map(tmp_path, is_cut):
    known, whole = torch.tensor([7, 2, 11], dtype=torch.int32), _vllm()
    cut = {n: v[known] if n.startswith("lm_heads.") and is_cut else v for n, v in whole.items()}
    head = Medusa.from_pretrained(write(tmp_path, {**VLLM, "truncated_vocab_size": 3}, {**cut, "token_map": known}))
    assert head.config.draft_vocabulary == 3
    assert torch.equal(head.get_parameter("lm_heads.1.weight"), whole["lm_heads.1.weight"][known])
    head.save_pretrained(tmp_path / "again")
    again = Medusa.from_pretrained(tmp_path / "again")
    _same(again.state_dict(), head.state_dict())
    assert again.token_map.tolist() == [7, 2, 11]


def _faster_decoding(prefix="", num_heads=3, has_lm_heads=True):
    tensors = {}
    for k in range(num_heads):
        for j in range(2):
            tensors[f"{prefix}{k}.{j}.linear.weight"] = torch.randn(4, 4)
            tensors[f"{prefix}{k}.{j}.linear.bias"] = torch.randn(4)
        if has_lm_heads:
            tensors[f"{prefix}{k}.2.weight"] = torch.randn(12, 4)
    return tensors


def test_heads_of_faster_decoding_are_counted_whatever_the_config_says(tmp_path):
    tensors = _faster_decoding()
    head = Medusa.from_pretrained(write(tmp_path, {"medusa_num_heads": 2, "medusa_num_layers": 1}, tensors))
    assert head.config == MedusaConfig(4, 12, 3, num_layers=2)
    assert torch.equal(head.get_parameter("blocks.2.layers.1.bias"), tensors["2.1.linear.bias"])
    assert torch.equal(head.get_parameter("lm_heads.1.weight"), tensors["1.2.weight"])
    _, written = Medusa.layouts[1].write(head.config, head.state_dict())
    _same(written, tensors)


def test_version_2_has_no_lm_heads_and_a_medusa_2_model_holds_its_target_too(tmp_path):
    folder = write(tmp_path / "v2", {"vocab_size": 12}, _faster_decoding(has_lm_heads=False))
    assert Medusa.from_pretrained(folder).config == MedusaConfig(4, 12, 3, num_layers=2, num_lm_heads=0)
    tensors = {**_faster_decoding("medusa_head."), "model.embed_tokens.weight": torch.randn(12, 4)}
    folder = write(tmp_path / "full", {"model_type": "llama", "vocab_size": 12}, tensors)
    assert Medusa.from_pretrained(folder).config == MedusaConfig(4, 12, 3, num_layers=2)


@pytest.mark.parametrize("tensors", [_vllm(), _faster_decoding(num_heads=2)], ids=["vllm", "faster-decoding"])
def test_the_entries_of_speculators_may_be_around_either_layout(tmp_path, tensors):
    sizes = {"hidden_size": 4, "vocab_size": 12}
    config = in_speculators("medusa", {"transformer_layer_config": sizes})
    head = load_head(write(tmp_path / "chain", config, tensors))
    assert isinstance(head, Medusa)
    assert head.tree.paths == ((0,), (0, 0))
    assert torch.equal(
        head.get_parameter("lm_heads.1.weight"), tensors.get("lm_heads.1.weight", tensors.get("1.2.weight"))
    )
    head = Medusa.from_pretrained(write(tmp_path / "tree", {**config, **sizes, "medusa_choices": [[0], [1]]}, tensors))
    assert head.config.tree == ((0,), (1,))
    for method in ({"verifier_accept_k": 2}, {"accept_tolerance": 0.1}):
        with pytest.raises(CheckpointError, match="choose a lossy rule where one is wanted"):
            load_head(write(tmp_path / "lossy", in_speculators("medusa", sizes, **method), tensors))
    with pytest.raises(OptionError, match="Medusa tree is 3 deep, and there are 2 heads"):
        load_head(write(tmp_path / "deep", in_speculators("medusa", sizes, speculative_tokens=3), tensors))
    with pytest.raises(CheckpointError, match="names of tensors are not those of: vLLM, FasterDecoding"):
        load_head(write(tmp_path / "other", config, {"fc.weight": torch.ones(1)}))


@pytest.mark.parametrize(
    ("config", "weights", "message"),
    [
        ({"model_type": "llama"}, {}, "no checkpoint of a Medusa; these layouts are read: vLLM, FasterDecoding"),
        ({"hidden_size": None}, {}, "hidden_size is missing"),
        ({"vocab_size": 0, "truncated_vocab_size": None}, {}, "MedusaConfig vocabulary=0 is out of range"),
        ({"logit_scale": 2}, {}, r"logit_scale is 2.0; only heads without one"),
        ({"medusa_choices": [[1, 0]]}, {}, r"tree has \(1, 0\) without its parent"),
        ({"truncated_vocab_size": 3}, {}, "truncated_vocab_size is 3, and there is no tensor token_map"),
        ({}, {"token_map": torch.tensor([1, 2])}, "truncated_vocab_size is 12, and token_map has 2 ids"),
        ({"truncated_vocab_size": 2}, {"token_map": torch.tensor([1, 12])}, "token_map is to hold different ids below"),
        ({"truncated_vocab_size": 2}, {"token_map": torch.tensor([1, 1])}, "token_map is to hold different ids below"),
        ({"truncated_vocab_size": 1}, {"token_map": torch.tensor([1.0])}, "token_map is to hold different ids below"),
        ({}, {"lm_heads.1.weight": None}, "lacks 1 tensors of a Medusa: lm_heads.1.weight"),
        ({}, {"blocks.1.layers.0.bias": None}, "lacks 1 tensors of a Medusa: blocks.1.layers.0.bias"),
        ({}, {"extra.weight": torch.zeros(1)}, "holds 1 tensors that a Medusa does not know: extra.weight"),
        ({"hidden_size": 5}, {}, r"is \[4\]; expected \[5\]|is \[4, 4\]; expected \[5, 5\]"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_by_name(tmp_path, config, weights, message):
    with pytest.raises(CheckpointError, match=message):
        Medusa.from_pretrained(write(tmp_path, {**VLLM, **config}, _vllm(**weights)))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"1.2.weight": None}, "lacks 1 tensors of a Medusa: lm_heads.1.weight"),
        ({"0.7.weight": torch.zeros(12, 4)}, "holds 1 tensors that a Medusa does not know: 0.7.weight"),
        ({"0.0.linear.weight": torch.zeros(4)}, r"a weight is \[4\]; expected a matrix"),
        ({f"{k}.2.weight": None for k in range(3)}, "vocab_size is missing"),
    ],
)
def test_a_checkpoint_of_faster_decoding_that_does_not_fit_is_refused(tmp_path, weights, message):
    with pytest.raises(CheckpointError, match=message):
        Medusa.from_pretrained(write(tmp_path, {}, {**_faster_decoding(), **weights}))


@pytest.mark.parametrize(
    ("config", "hidden", "vocabulary", "tables", "message"),
    [
        ("LM heads of its own", 8, VOCABULARY, TABLES, "hidden states of size 16; the target's have 8"),
        ("LM heads of its own", HIDDEN, 4000, TABLES, "predicts 32 tokens and the target 4000"),
        ("the target's", HIDDEN, VOCABULARY, TokenTables(), "reads the target's head, and the target has none"),
        ("few tokens", HIDDEN, VOCABULARY, TABLES, "has rank 9, and its heads know 9 tokens: draft lower ranks"),
    ],
)
def test_a_target_that_does_not_fit_is_refused(config, hidden, vocabulary, tables, message):
    head = Medusa(CONFIGS[config], tree=[(9,)])
    with pytest.raises(DrafterError, match=message):
        head.prepare(target_of(None, 1, 8, vocabulary, hidden, tables))


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (3, "Medusa tree=3 is no tree"),
        ([(1, 0)], r"Medusa tree has \(1, 0\) without its parent"),
        ((1, 1, 1, 1), "Medusa tree is 4 deep, and there are 3 heads"),
    ],
)
def test_a_tree_that_makes_no_sense_is_refused(tree, message):
    with pytest.raises(OptionError, match=message):
        Medusa(CONFIGS["the target's"], tree=tree)


@pytest.mark.parametrize(
    "sizes",
    [
        {"hidden_size": 0},
        {"num_heads": 0},
        {"num_heads": 513},
        {"num_layers": 0},
        {"num_lm_heads": 2},
        {"draft_vocabulary": 33},
        {"draft_vocabulary": 9, "num_lm_heads": 0},
        {"bias": 1},
        {"tree": ((1, 0),)},
    ],
)
def test_sizes_out_of_range_are_refused(sizes):
    with pytest.raises(OptionError, match=f"MedusaConfig {next(iter(sizes))}"):
        MedusaConfig(**{"hidden_size": 16, "vocabulary": 32, **sizes})
