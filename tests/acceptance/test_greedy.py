"""`GreedyMatch` against a loop that walks each row's drafts."""

import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import emssd_compile
from emssd_compile.acceptance import RULES, GreedyMatch, Rule, Verdict, Verification, make_rule
from emssd_compile.errors import OptionError, RuleError
from emssd_compile.step.nodes import Nodes
from tests.passes.graphs import Scripted, model_with_attention
from tests.step.forests import forests


def _verify(
    choices: list[list[int]], drafts: list[list[int]], width: int, tail: int = 0, filler: int = 7
) -> tuple[list[int], list[int]]:
    """Rows whose target chooses `choices[b][i]` after `i` drafts; no choices: a row that verifies nothing."""
    flat = [token for row in choices for token in row] + [0] * tail
    logits = torch.zeros(max(len(flat), 1), 8)
    for place, token in enumerate(flat):
        logits[place, token] = 1.0
    tokens = torch.full((len(drafts), width), filler)
    for row, draft in enumerate(drafts):
        tokens[row, : len(draft)] = torch.tensor(draft, dtype=torch.int64)
    counts = torch.tensor([len(row) for row in choices])
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    unused = torch.zeros(len(logits), dtype=torch.int64)
    nodes = Nodes(tokens, torch.tensor([len(d) for d in drafts]), torch.zeros_like(tokens), None, width)
    verdict = GreedyMatch()(Verification(logits, offsets, nodes, row_ids=unused, seeds=unused, positions=unused))
    return verdict.accept_lengths.tolist(), verdict.next_tokens.tolist()


def _walk(choices: list[int], drafts: list[int]) -> tuple[int, int]:
    accepted = 0
    while accepted < len(drafts) and drafts[accepted] == choices[accepted]:
        accepted += 1
    return accepted, choices[accepted]


@pytest.mark.parametrize(
    ("choices", "drafts", "accepted", "following"),
    [
        ([1, 2, 3, 4], [1, 2, 3], 3, 4),
        ([1, 2, 3, 4], [1, 5, 3], 1, 2),
        ([1, 2, 3, 4], [5, 2, 3], 0, 1),
        ([1], [], 0, 1),
    ],
    ids=["all", "a match behind a mismatch does not count", "none", "nothing drafted"],
)
def test_accepts_the_leading_drafts_that_agree(choices, drafts, accepted, following):
    assert _verify([choices], [drafts], width=3) == ([accepted], [following])


def test_what_lies_behind_a_short_draft_is_not_accepted():
    """The unused places hold token 7, which the target would choose there."""
    assert _verify([[1, 7], [7, 7]], [[1], [3]], width=2) == ([1, 0], [7, 7])


_ROW = st.integers(0, 4).flatmap(
    lambda size: st.tuples(
        st.lists(st.integers(0, 2), min_size=size + 1, max_size=size + 1),
        st.lists(st.integers(0, 2), min_size=size, max_size=size),
    )
)


@given(rows=st.lists(_ROW, min_size=1, max_size=5), tail=st.integers(0, 3), filler=st.integers(0, 2))
@settings(max_examples=200)
def test_agrees_with_the_loop(rows, tail, filler):
    choices, drafts = [row[0] for row in rows], [row[1] for row in rows]
    accepted, following = _verify(choices, drafts, width=4, tail=tail, filler=filler)
    assert list(zip(accepted, following, strict=True)) == [_walk(*row) for row in rows]


@given(forest=forests(rows=3, num_drafts=5, max_depth=3), data=st.data())
@settings(max_examples=200)
def test_of_a_tree_the_path_of_the_argmax_is_accepted(forest, data):
    """Rows lie side by side; one that verifies nothing has none, and what follows them all is rubbish."""
    drafts = [len(tree.parents) for tree in forest.trees]
    idle = data.draw(st.lists(st.sampled_from([False, False, True]), min_size=3, max_size=3))
    counts = [0 if skip else count + 1 for count, skip in zip(drafts, idle, strict=True)]
    chosen = data.draw(st.lists(st.integers(0, 2), min_size=sum(counts) + 2, max_size=sum(counts) + 2))
    offsets = [sum(counts[:row]) for row in range(4)]
    unused = torch.zeros(len(chosen), dtype=torch.int64)
    logits = torch.nn.functional.one_hot(torch.tensor(chosen), 3).float()
    verdict = GreedyMatch()(
        Verification(logits, torch.tensor(offsets), forest.nodes, row_ids=unused, seeds=unused, positions=unused)
    )
    assert verdict.path is not None
    for row, tree in enumerate(forest.trees):
        if not idle[row]:
            wanted = chosen[offsets[row] : offsets[row + 1]]
            path = tree.walk(wanted)
            assert verdict.path[row, : len(path)].tolist() == path
            assert verdict.accept_lengths[row] == len(path) - 1
            assert verdict.next_tokens[row] == wanted[path[-1]]


def test_it_gives_the_tokens_of_plain_decoding_and_is_taken_by_its_name():
    assert GreedyMatch.guarantees == "tokens"
    assert GreedyMatch().lossless
    assert isinstance(make_rule("greedy"), GreedyMatch)
    rule = GreedyMatch()
    assert make_rule(rule) is rule


def test_an_unknown_rule_lists_the_known_ones():
    with pytest.raises(OptionError, match=r"unknown acceptance rule 'judge'.*auto.*greedy.*typical"):
        make_rule("judge")


class _AcceptAll(Rule):
    """Keeps whatever is drafted."""

    guarantees = "lossy"

    def __init__(self) -> None:
        super().__init__()
        self.greedy = GreedyMatch()

    def forward(self, verification: Verification) -> Verdict:
        verdict = self.greedy(verification)
        last = verification.offsets[:-1] + verification.draft.lengths
        choice = verification.logits.argmax(-1)
        return replace(
            verdict,
            accept_lengths=verification.draft.lengths,
            next_tokens=choice[last.clamp(max=choice.shape[0] - 1)],
        )


def test_a_lossy_rule_is_refused_as_an_object_before_any_work(monkeypatch):
    monkeypatch.setattr(torch.export, "export", lambda *args, **kwargs: pytest.fail("work was done"))
    message = r"_AcceptAll is lossy .*taken only by a name: emssd_compile\.acceptance\.RULES\['...'\] = _AcceptAll"
    with pytest.raises(OptionError, match=message):
        emssd_compile.optimize(model_with_attention(), max_length=32, acceptance=_AcceptAll())


def test_a_lossy_rule_is_taken_by_its_name_and_everything_says_so(monkeypatch, tmp_path):
    monkeypatch.setitem(RULES, "accept-all", _AcceptAll)
    model, drafter = model_with_attention(), Scripted([7, 8])
    fast = emssd_compile.optimize(
        model, drafter, max_batch=2, max_length=32, backend="eager", layout="packed", acceptance="accept-all"
    )
    (row,) = fast.generate([[3]], max_new_tokens=9)
    assert row[2:4] == [7, 8], "it does what it says"
    assert fast.stats.lossless is False
    fast.stats.reset()
    assert fast.stats.lossless is False, "a reset forgets counts only"
    note = "_AcceptAll is lossy: the tokens need not be the model's own"
    assert note in fast.explain().record("fuse_step").notes
    assert "_AcceptAll is lossy" in str(fast.explain())
    pytest.importorskip("onnxruntime")
    fast.export_onnx(tmp_path / "artifact", check=False)
    loaded = emssd_compile.load(tmp_path / "artifact")
    said = loaded.manifest.acceptance, loaded.manifest.guarantee, loaded.stats.lossless
    assert said == ("_AcceptAll", "lossy", False)
    assert loaded.generate([[3]], max_new_tokens=9) == [row]


def test_a_lossless_rule_of_ones_own_is_taken_as_an_object():
    rule = GreedyMatch()
    model = model_with_attention()
    fast = emssd_compile.optimize(model, max_batch=2, max_length=32, backend="eager", acceptance=rule)
    assert fast.stats.lossless
    assert fast.explain().record("fuse_step").notes == ()


@pytest.mark.parametrize(
    ("attribute", "value", "remedy"),
    [
        ("guarantees", None, "set it to one of"),
        ("guarantees", True, "set it to one of"),
        ("guarantees", "exact", r"set it to one of \['tokens', 'distribution', 'lossy'\]"),
        ("accepts", (), "set it to a tuple of some of"),
        ("accepts", ("drawn",), "'without replacement'"),
        ("shapes", "chain", r"some of \['chain', 'tree'\]"),
        ("reads_proposal", 1, "set it to True or False"),
    ],
)
def test_a_rule_that_does_not_say_what_it_guarantees_and_accepts_is_refused(attribute, value, remedy):
    rule = GreedyMatch()
    setattr(rule, attribute, value)
    with pytest.raises(RuleError, match=rf"GreedyMatch\.{attribute} = {re.escape(repr(value))}; .*{remedy}"):
        make_rule(rule)
