"""`MLPSpeculator`: drafts as its formula says, for chains and trees, and the tokens stay the target's."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from emssd_compile.drafters import MLPSpeculator, load_head
from emssd_compile.drafters.head import Features
from emssd_compile.drafters.mlp_speculator import MLPSpeculatorConfig
from emssd_compile.errors import CheckpointError, DrafterError, OptionError
from emssd_compile.step.proposals import SAMPLED, WITHOUT_REPLACEMENT
from tests.drafters.contexts import target_of
from tests.drafters.head_cases import GREEDY, SAMPLING, TEXTS, fast, grade, in_speculators, ranked, seen, target, write
from tests.passes.graphs import HIDDEN, VOCABULARY

CONFIGS = {
    "plain": MLPSpeculatorConfig(HIDDEN, VOCABULARY, 3, inner_size=12),
    "tied": MLPSpeculatorConfig(HIDDEN, VOCABULARY, 4, inner_size=12, tie_weights=True, scale_input=True),
    "as wide": MLPSpeculatorConfig(HIDDEN, VOCABULARY, 3, scale_input=True),
}


def _head(config, **options):
    """A random head that has seen a target."""
    torch.manual_seed(2)
    head = MLPSpeculator(config, **options)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_()
    head.prepare(target_of(None, len(TEXTS), 24, VOCABULARY, HIDDEN))
    return head


def _logits(head, hidden, path):
    """The formula, for the path of tokens that begins with the root: `[V]`."""
    config, w = head.config, head.state_dict()
    n, inner = config.num_heads, config.inner_size
    rms = lambda x: x / (x.square().mean() + 1e-6).sqrt()  # noqa: E731
    state_weight = 0.5 ** (1 / (2 * n))
    emb_weight = ((1 - state_weight**2) * inner / 2) ** 0.5
    state = rms(hidden) / 2**0.5 if config.scale_input else hidden
    for i, token in enumerate(path):
        k, p = (0, min(i, 1)) if config.tie_weights else (i, i)
        mixed = w[f"proj.{p}.weight"] @ state + emb_weight / state_weight * w[f"emb.{k}.weight"][token]
        state = F.gelu(w[f"ln.{k}.weight"] * rms(mixed) + w[f"ln.{k}.bias"])
        logits = w[f"head.{k}.weight"] @ state
    return logits


def _expected(head, found, row, branching):
    """Token, parent and grade of each draft of a row, written out."""
    nodes, level = [], [(0, [TEXTS[row][-1]])]  # number of each node, and the path up to it
    for depth, width in enumerate(branching):
        below = []
        for parent, path in level:
            tokens, q = ranked(_logits(head, found.hidden[row], path), found, row, depth)
            for token in tokens[:width]:
                nodes.append((token, parent, grade(q[token])))
                below.append((len(nodes), [*path, token]))
        level = below
    return nodes


@pytest.mark.parametrize("sampling", [False, True])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("options", [{}, {"num_draft_tokens": 2}, {"tree": (2, 1, 2)}], ids=["chain", "short", "tree"])
@torch.no_grad()
def test_drafts_are_what_the_formula_says_behind_each_path(config, options, sampling):
    """In rows that may be drafted as deep as there are heads, to depth 1 and not at all."""
    head, limits = _head(config, **options), [4, 1, 0]
    branching = options.get("tree", (1,) * options.get("num_draft_tokens", config.num_heads))
    found = replace(seen(4, sampling), max_drafts=torch.tensor(limits))
    draft = head(found)
    assert (draft.parents is None) == ("tree" not in options)
    parents = torch.arange(head.num_draft_tokens).expand(len(TEXTS), -1) if draft.parents is None else draft.parents
    for row, limit in enumerate(limits):
        fields = [field[row, : draft.lengths[row]].tolist() for field in (draft.tokens, parents, draft.grades)]
        assert list(zip(*fields, strict=True)) == _expected(head, found, row, branching[:limit])


def test_rows_that_are_not_to_draft_do_not():
    found = replace(seen(3, False), can_draft=torch.tensor([True, False, True]))
    with torch.no_grad():
        assert _head(CONFIGS["plain"])(found).lengths.tolist() == [3, 0, 3]


@pytest.mark.parametrize(
    ("options", "drawn"), [({}, SAMPLED), ({"tree": (2, 2)}, WITHOUT_REPLACEMENT), ({"tree": (2, 2)}, SAMPLED)]
)
@torch.no_grad()
def test_what_drafts_are_drawn_from_is_what_the_formula_says(options, drawn):
    head, found = _head(CONFIGS["plain"], **options), replace(seen(3, True), drawn=drawn)
    draft = head(found)
    parents = torch.arange(head.num_draft_tokens).expand(len(TEXTS), -1) if draft.parents is None else draft.parents
    assert draft.proposal.shape == (len(TEXTS), head.num_draft_tokens + 1, VOCABULARY)
    for row, text in enumerate(TEXTS):
        paths = [text[-1:]]
        for token, parent in zip(draft.tokens[row].tolist(), parents[row].tolist(), strict=True):
            paths.append([*paths[parent], token])
            _, q = ranked(_logits(head, found.hidden[row], paths[parent]), found, row, len(paths[parent]) - 1)
            torch.testing.assert_close(draft.proposal[row, parent], q)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@torch.no_grad()
def test_rollout_gives_the_logits_behind_the_texts_own_tokens(config):
    head = _head(config, num_draft_tokens=1)
    tokens, hidden = torch.randint(VOCABULARY, (2, 7)), torch.randn(2, 7, HIDDEN)
    found = [*head.rollout(Features(tokens, hidden, {}))]
    assert len(found) == config.num_heads, "also those that are not drafted"
    for k, logits in enumerate(found, 1):
        assert logits.shape == (2, 7, VOCABULARY)
        for t in range(7 - k):
            expected = _logits(head, hidden[1, t], tokens[1, t + 1 : t + 1 + k].tolist())
            torch.testing.assert_close(logits[1, t], expected)


@torch.no_grad()
def test_a_root_past_its_own_vocabulary_is_read_as_its_last_token():
    """The target's vocabulary is padded to four tokens more."""
    torch.manual_seed(0)
    head = MLPSpeculator(MLPSpeculatorConfig(HIDDEN, 4096, 2))
    head.prepare(target_of(None, len(TEXTS), 24, 4100, HIDDEN))
    found = replace(seen(2, False), vocabulary=4100)
    drafts = [head(replace(found, history=torch.full_like(found.history, root))).tokens for root in (4099, 4095, 7)]
    assert torch.equal(drafts[0], drafts[1])
    assert not torch.equal(drafts[0], drafts[2])


# Whole steps


def _knowing(model, **options):
    """A head that expects what the target would, had that no attention: GELU(x + 30) is x + 30."""
    embedding, lm_head = model.embed.weight, model.lm_head.weight
    head = MLPSpeculator(MLPSpeculatorConfig(HIDDEN, VOCABULARY, 3, 2 * HIDDEN), **options)
    with torch.no_grad():
        for i in range(3):
            head.get_parameter(f"proj.{i}.weight").zero_()
            head.get_parameter(f"emb.{i}.weight").copy_(torch.cat([embedding, -embedding], 1))
            head.get_parameter(f"ln.{i}.bias").fill_(30)
            head.get_parameter(f"head.{i}.weight").copy_(torch.cat([lm_head, -lm_head], 1) / 2)
    return head


@pytest.mark.parametrize(
    "options", [pytest.param(GREEDY, marks=pytest.mark.long, id="greedy"), pytest.param(SAMPLING, id="sampling")]
)
@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda model: _knowing(model), marks=pytest.mark.long, id="chain"),
        pytest.param(lambda model: _knowing(model, tree=(4, 3, 2)), id="tree"),
        pytest.param(lambda model: _head(CONFIGS["tied"], tree=(5, 1)), marks=pytest.mark.long, id="tied"),
    ],
)
def test_tokens_are_the_targets(make, options):
    model = target()
    plain = fast(model, "none").generate(TEXTS, max_new_tokens=20, **options)
    drafted = fast(model, make(model))
    assert drafted.generate(TEXTS, max_new_tokens=20, **options) == plain
    assert 0 < drafted.stats.num_accepted_draft_tokens < drafted.stats.num_draft_tokens


@pytest.mark.parametrize(("options", "rule"), [({}, "token-level"), ({"tree": (2, 2)}, "rrs")])
def test_it_goes_with_rules_that_divide_by_q(options, rule):
    model = target()
    drafted = fast(model, _knowing(model, **options), acceptance=rule)
    assert [len(row) for row in drafted.generate(TEXTS, max_new_tokens=12, **SAMPLING)] == [15, 13, 23]
    assert drafted.stats.num_accepted_draft_tokens > 0


def test_it_drafts_for_a_target_in_bfloat16():
    model = target().bfloat16()
    drafted = fast(model, _knowing(model, tree=(4, 2)))
    assert [len(row) for row in drafted.generate(TEXTS, max_new_tokens=12)] == [len(row) + 12 for row in TEXTS]
    assert drafted.stats.num_accepted_draft_tokens > 0


# Checkpoints

IBM = {
    "model_type": "mlp_speculator",
    "emb_dim": 4,
    "vocab_size": 12,
    "n_predict": 3,
    "inner_dim": 6,
    "tie_weights": False,
    "scale_input": True,
}


def _weights(num_heads=3, **changed):
    """Tensors of a checkpoint with the config `IBM`."""
    tensors = {}
    for i in range(num_heads):
        tensors[f"speculator.emb.{i}.weight"] = torch.randn(12, 6)
        tensors[f"speculator.proj.{i}.weight"] = torch.randn(6, 6 if i else 4)
        tensors[f"speculator.head.{i}.weight"] = torch.randn(12, 6)
        tensors[f"speculator.ln.{i}.weight"], tensors[f"speculator.ln.{i}.bias"] = torch.randn(6), torch.randn(6)
    return {**tensors, **{f"speculator.{name}": value for name, value in changed.items()}}


def _same(found, expected):
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_a_checkpoint_of_ibm_is_read_and_written(tmp_path):
    weights = _weights()
    head = MLPSpeculator.from_pretrained(write(tmp_path, IBM, weights), tree=(2, 2))
    assert head.config == MLPSpeculatorConfig(4, 12, 3, inner_size=6, scale_input=True)
    assert (head.num_draft_tokens, head.max_depth) == (6, 2)
    head.save_pretrained(tmp_path / "again")
    _same(load_file(tmp_path / "again/model.safetensors"), weights)
    written = json.loads((tmp_path / "again/config.json").read_text())
    assert written.items() >= IBM.items()
    assert written["top_k_tokens_per_head"] == [1, 1, 1]


def test_the_entries_of_speculators_may_be_around_it(tmp_path):
    of_layers = {"transformer_layer_config": {"vocab_size": 99}}  # the head's own entries count
    head = load_head(write(tmp_path / "two", in_speculators("mlp_speculator", IBM | of_layers), _weights()))
    assert head.config == MLPSpeculatorConfig(4, 12, 3, inner_size=6, scale_input=True, speculative_tokens=2)
    assert (head.num_draft_tokens, head.max_depth) == (2, None)
    head.save_pretrained(tmp_path / "again")
    again = load_head(tmp_path / "again")
    assert again.config == head.config
    _same(again.state_dict(), head.state_dict())
    for method, message in (
        ({"verifier_accept_k": 2}, "choose a lossy rule where one is wanted"),
        ({"proposal_type": "sample"}, "only 'greedy' is supported"),
        ({"speculative_tokens": 4}, "MLPSpeculatorConfig speculative_tokens=4 is out of range; pass at most 3"),
    ):
        with pytest.raises(CheckpointError, match=message):
            load_head(write(tmp_path / "refused", in_speculators("mlp_speculator", IBM, **method), _weights()))


def test_an_inner_size_of_0_is_the_targets(tmp_path):
    config = {"model_type": "mlp_speculator", "emb_dim": 6, "vocab_size": 12, "n_predict": 1, "inner_dim": 0}
    head = MLPSpeculator.from_pretrained(write(tmp_path, config, _weights(1, **{"proj.0.weight": torch.randn(6, 6)})))
    assert head.config == MLPSpeculatorConfig(6, 12, 1)
    assert (head.num_draft_tokens, head.max_depth) == (1, None)


@pytest.mark.parametrize("num_heads", [2, 3, 12])
def test_tied_weights_may_be_stored_once_or_as_often_as_they_are_used(tmp_path, num_heads):
    first, config = _weights(2), {**IBM, "tie_weights": True, "n_predict": num_heads}
    once = {n: v for n, v in first.items() if n.split(".")[1] == "proj" or n.split(".")[2] == "0"}
    often = dict(once)
    for i in range(1, num_heads):
        for name, value in once.items():
            part = name.split(".")
            if part[2] == ("1" if part[1] == "proj" else "0"):
                often[".".join([*part[:2], str(i), part[3]])] = value
    heads = [
        MLPSpeculator.from_pretrained(write(tmp_path / str(len(stored)), config, stored)) for stored in (once, often)
    ]
    _same(heads[1].state_dict(), heads[0].state_dict())
    heads[1].save_pretrained(tmp_path / "again")
    _same(load_file(tmp_path / "again/model.safetensors"), once)


@pytest.mark.parametrize(
    ("config", "weights", "message"),
    [
        ({"model_type": "llama"}, {}, "no checkpoint of a MLPSpeculator; these layouts are read: IBM"),
        ({"n_predict": None}, {}, "n_predict is missing"),
        ({"n_predict": 0}, {}, "MLPSpeculatorConfig num_heads=0 is out of range"),
        ({"inner_dim": -1}, {}, "MLPSpeculatorConfig inner_size=-1 is out of range"),
        ({"scale_input": "yes"}, {}, "scale_input is 'yes'; it is to be of type bool"),
        ({"tie_weights": True}, {}, r"tie_weights is true, and emb.1.weight is not the same as emb.0.weight"),
        ({"n_predict": 2}, {}, "holds 5 tensors that a MLPSpeculator does not know: emb.2.weight"),
        ({}, {"ln.1.bias": None}, "lacks 1 tensors of a MLPSpeculator: ln.1.bias"),
        ({}, {"ln0.weight": torch.zeros(4)}, "holds 1 tensors that a MLPSpeculator does not know: ln0.weight"),
        ({"emb_dim": 5}, {}, r"proj.0.weight is \[6, 4\]; expected \[6, 5\]"),
        ({"vocab_size": 13}, {}, r"emb.0.weight is \[12, 6\]; expected \[13, 6\]"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_by_name(tmp_path, config, weights, message):
    with pytest.raises(CheckpointError, match=message):
        MLPSpeculator.from_pretrained(write(tmp_path, {**IBM, **config}, _weights(**weights)))


@pytest.mark.parametrize(
    ("hidden", "vocabulary", "message"),
    [
        (8, VOCABULARY, "hidden states of size 16; the target's have 8"),
        (HIDDEN, 4000, "predicts 32 tokens and the target 4000"),
        (HIDDEN, VOCABULARY, "drafts 33 tokens behind one node, and there are only 32"),
    ],
)
def test_a_target_that_does_not_fit_is_refused(hidden, vocabulary, message):
    with pytest.raises(DrafterError, match=message):
        MLPSpeculator(CONFIGS["plain"], tree=(33,)).prepare(target_of(None, 1, 8, vocabulary, hidden))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_draft_tokens": 4}, "MLPSpeculator num_draft_tokens=4 is out of range; pass at most 3"),
        ({"num_draft_tokens": 0}, "MLPSpeculator num_draft_tokens=0 is out of range"),
        ({"tree": (2, 0)}, r"MLPSpeculator tree\[1\]=0 is out of range"),
        ({"tree": (1, 1, 1, 1)}, "is 4 deep, and there are 3 heads"),
        ({"tree": (2,), "num_draft_tokens": 2}, r"num_draft_tokens=2 is for chains, and tree=\(2,\) says"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(OptionError, match=message):
        MLPSpeculator(CONFIGS["plain"], **options)


@pytest.mark.parametrize(
    "sizes", [{"hidden_size": 0}, {"vocabulary": 0}, {"num_heads": 0}, {"inner_size": -1}, {"tie_weights": 1}]
)
def test_sizes_out_of_range_are_refused(sizes):
    with pytest.raises(OptionError, match=f"MLPSpeculatorConfig {next(iter(sizes))}="):
        MLPSpeculatorConfig(**{"hidden_size": 16, "vocabulary": 32, **sizes})
