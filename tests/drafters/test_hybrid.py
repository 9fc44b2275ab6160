"""`Hybrid`: which of two drafters each row takes, what each of them is told, and whole models that decode with both."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import emssd_compile
from emssd_compile.drafters import (
    Corpus,
    Draft,
    DraftContext,
    Drafter,
    DraftModel,
    Hybrid,
    PartSizes,
    PromptLookup,
    SuffixLookup,
    TensorSpec,
)
from emssd_compile.errors import DrafterError, OptionError
from emssd_compile.step.drafting import check_drafter
from emssd_compile.step.options import RowOption
from emssd_compile.step.proposals import SAMPLED
from tests.drafters.contexts import context
from tests.exactness.drafters import Oracle
from tests.exactness.models import Reference
from tests.export.subjects import Small, prompt

NEW = 24
PROMPTS = [prompt(n) for n in (1, 2, 7, 30, 61)]  # more than there are rows
SIZES = PartSizes(rows=3, capacity=24, vocabulary=48, num_draft_tokens=3, num_grades=5)


class Says(Drafter):
    """Drafts one token over and over, as many as it is told, and scores them as it is told; keeps what it was asked."""

    def __init__(self, token: int, lengths: list[int], scores: list[float] | None = None, **attributes: Any) -> None:
        super().__init__()
        self.token, self.lengths, self.scores = token, lengths, scores
        self.num_draft_tokens, self.num_grades = 3, 2
        for name, value in attributes.items():
            setattr(self, name, value)
        self.asked: list[DraftContext] = []
        self.heard: list[tuple[list[int], int, object]] = []

    def tensors(self, sizes: PartSizes) -> dict[str, TensorSpec]:
        return {
            "steps": TensorSpec((sizes.rows, sizes.num_draft_tokens), torch.int64),
            "known": TensorSpec((1,), torch.int64, kept="host"),
        }

    def options(self) -> dict[str, RowOption]:
        return {f"of_{self.token}": RowOption(0)}

    def host_tensors(self) -> dict[str, Tensor]:
        return {"known": torch.tensor([self.token])}

    def ended(self, tokens: Tensor, prompt_length: int, options: Any) -> None:
        self.heard.append((tokens.tolist(), prompt_length, options))

    def forward(self, context: DraftContext) -> Draft:
        self.asked.append(context)
        tokens = torch.full((len(context.known), self.num_draft_tokens), self.token)
        return Draft(
            tokens,
            torch.where(context.can_draft, torch.tensor(self.lengths), 0),
            {"steps": context.state["steps"] + 1},
            torch.ones_like(tokens),
            scores=None if self.scores is None else torch.tensor(self.scores),
        )


def _asked(hybrid: Hybrid, texts: list[list[int]], state: dict[str, Tensor] | None = None, **changes: Any) -> Draft:
    specs = hybrid.tensors(SIZES)
    zeros = {name: torch.zeros(spec.shape, dtype=spec.dtype) for name, spec in specs.items()}
    options = {name: torch.zeros(len(texts), dtype=torch.int64) for name in hybrid.options()}
    seen = replace(context(texts, 3), options=options, state={**zeros, **(state or {})}, **changes)
    return hybrid(seen)


TEXTS = [[1, 2], [3], [4, 5, 6]]


def test_a_row_takes_the_first_where_it_scores_more_than_the_threshold():
    first, second = Says(7, [3, 3, 2], [2.5, 1.5, 1.4]), Says(8, [1, 2, 3], num_draft_tokens=4)
    draft = _asked(Hybrid(first, second, threshold=1.5), TEXTS)
    assert draft.tokens.tolist() == [[7, 7, 7, 0], [8] * 4, [8] * 4]
    assert draft.lengths.tolist() == [3, 2, 3]
    assert draft.scores is not None
    assert draft.scores.tolist() == [2.5, 1.5, 1.5]
    assert draft.grades is not None
    assert draft.grades.tolist() == [[1, 1, 1, 0], [3] * 4, [3] * 4], "kept apart"


def test_without_a_score_the_length_counts():
    draft = _asked(Hybrid(Says(7, [3, 2, 1]), Says(8, [3, 3, 3]), threshold=2), TEXTS)
    assert draft.tokens[:, 0].tolist() == [7, 8, 8]


def test_a_row_for_which_one_drafts_nothing_takes_the_other():
    draft = _asked(Hybrid(Says(7, [0, 2, 0], [9.0, 0.1, 9.0]), Says(8, [3, 0, 0]), threshold=1), TEXTS)
    assert draft.lengths.tolist() == [3, 2, 0]
    assert draft.tokens[:2, 0].tolist() == [8, 7]


def test_the_second_drafts_for_the_other_rows_only_and_each_is_asked_as_if_it_were_alone():
    first, second = Says(7, [3, 3, 3], [9.0, 0.0, 0.0]), Says(8, [3, 3, 3], num_draft_tokens=2)
    draft = _asked(Hybrid(first, second, threshold=1), TEXTS)
    (one,), (two,) = first.asked, second.asked
    assert one.can_draft.tolist() == [True] * 3
    assert two.can_draft.tolist() == [False, True, True]
    assert one.max_drafts.tolist() == [3, 3, 3]
    assert two.max_drafts.tolist() == [0, 2, 2]
    assert [*one.options, *two.options] == ["of_7", "of_8"]
    assert [one.state["steps"].shape[1], two.state["steps"].shape[1]] == [3, 2]
    assert {name: value.unique().tolist() for name, value in draft.state.items()} == {
        "first__steps": [1],
        "second__steps": [1],
    }


def test_what_the_second_is_expected_to_get_accepted_is_learned():
    """Two rows had drafts of the second and went on by 3 and 1 tokens, so 2 and 0 were accepted."""
    hybrid = Hybrid(Says(7, [3, 3, 3], [1.1, 0.9, 1.1]), Says(8, [3, 3, 3]))
    known = torch.tensor([5, 5, 5])
    before = {"own__known": torch.tensor([2, 4, 0])}
    draft = _asked(hybrid, TEXTS, before, known=known)
    assert draft.state["own__accepted"].tolist() == [2.0, 2.0]
    assert draft.tokens[:, 0].tolist() == [7, 8, 7], "(2 + 1) / (2 + 1) is expected, since one is taken to have been"
    assert draft.state["own__known"].tolist() == [0, 5, 0]
    later = _asked(hybrid, TEXTS, {"own__accepted": torch.tensor([0.0, 9.0])}, known=known)
    assert later.tokens[:, 0].tolist() == [7, 7, 7]


def test_drafts_that_are_drawn_are_not_chosen_by_what_they_are():
    ways: dict[str, Any] = {"proposes": ("deterministic", SAMPLED)}
    first, second = Says(7, [1, 0, 1], [0.0, 9.0, 0.0], **ways), Says(8, [3, 3, 3], **ways)
    hybrid = Hybrid(first, second, threshold=1)
    assert hybrid.proposes == ("deterministic", SAMPLED)
    assert _asked(hybrid, TEXTS, drawn=SAMPLED).tokens[:, 0].tolist() == [7, 8, 7]
    assert Hybrid(Says(7, [1]), second).proposes == ("deterministic",)


def test_a_chain_beside_a_tree_is_a_tree_without_branches():
    tree = Says(8, [3, 3, 3], max_depth=2)
    hybrid = Hybrid(Says(7, [3, 3, 3], [9.0, 0.0, 0.0]), tree, threshold=1)
    tree.forward = lambda context: replace(Says.forward(tree, context), parents=torch.tensor([[0, 0, 1]] * 3))  # type: ignore[method-assign]
    draft = _asked(hybrid, TEXTS)
    assert draft.parents is not None
    assert draft.parents.tolist() == [[0, 1, 2], [0, 0, 1], [0, 0, 1]]
    assert hybrid.max_depth == 3


def test_it_has_what_both_have():
    first = Says(7, [1], taps=(1, -1), reads_options=("do_sample",))
    second = Says(
        8,
        [1],
        taps=(0, 1),
        reads_logits=True,
        is_costly=True,
        reads_ahead=True,
        reads_options=("top_k",),
        writes_kv=True,
        remembers_features=True,
    )
    hybrid = Hybrid(first, second)
    assert hybrid.taps == (1, -1, 0)
    assert (hybrid.reads_logits, hybrid.is_costly, hybrid.reads_ahead, hybrid.writes_kv) == (True,) * 4
    assert hybrid.remembers_features
    assert (hybrid.num_draft_tokens, hybrid.max_depth, hybrid.num_grades) == (3, None, 4)
    assert hybrid.reads_options == ("do_sample", "top_k")
    assert hybrid.options().keys() == {"of_7", "of_8"}
    assert {name: value.tolist() for name, value in hybrid.host_tensors().items()} == {
        "first__known": [7],
        "second__known": [8],
    }
    hybrid.ended(torch.tensor([1, 2]), 1, {})
    assert first.heard == second.heard == [([1, 2], 1, {})]
    assert hybrid.suited(()) is hybrid


@pytest.mark.parametrize("max_depth", [None, 2], ids=["chain", "tree"])
def test_what_is_cheap_of_it_drafts_as_it_does_where_the_other_one_drafts_nothing(max_depth):
    """In the same shape, with the same grades, and the same books are kept of what the second got accepted."""
    first = Says(7, [3, 0, 2], [9.0, 9.0, 0.0])
    hybrid = Hybrid(first, Says(8, [0, 0, 0], num_draft_tokens=4, max_depth=max_depth, is_costly=True, taps=(1,)))
    cheap = hybrid.cheaper()
    assert isinstance(cheap, Hybrid)
    assert cheap.first is first
    assert not cheap.is_costly
    assert check_drafter(cheap).cheaper() is cheap
    for name in ("num_draft_tokens", "num_grades", "max_depth", "proposes", "taps"):
        assert getattr(cheap, name) == getattr(hybrid, name), name
    assert cheap.tensors(SIZES).items() <= hybrid.tensors(SIZES).items()
    before = {"own__known": torch.tensor([2, 4, 0]), "own__accepted": torch.tensor([3.0, 4.0])}
    known = torch.tensor([5, 5, 5])
    expected, draft = (_asked(each, TEXTS, before, known=known) for each in (hybrid, cheap))
    assert torch.equal(draft.lengths, expected.lengths)
    is_draft = torch.arange(4) < draft.lengths[:, None]
    for name in ("tokens", "grades", *(["parents"] if max_depth else [])):
        one, other = getattr(draft, name), getattr(expected, name)
        assert torch.equal(torch.where(is_draft, one, 0), torch.where(is_draft, other, 0)), name
    own = {name: value for name, value in expected.state.items() if not name.startswith("second")}
    assert draft.state.keys() == own.keys()
    assert all(torch.equal(draft.state[name], value) for name, value in own.items())


def test_what_is_costly_of_it_goes_wherever_it_stands():
    cheap, costly = PromptLookup(3, max_ngram=2), DraftModel(Small(), 3)
    assert cheap.cheaper() is cheap
    assert costly.cheaper() is None
    assert (cheap.costly_grades, costly.costly_grades) == ((), (range(costly.num_grades),))
    assert Hybrid(cheap, PromptLookup()).costly_grades == ()
    both = Hybrid(cheap, PromptLookup())
    assert both.cheaper() is both
    tree = DraftModel(Small(), tree=(2, 2))
    assert Hybrid(tree, costly).cheaper() is None
    inner = Hybrid(tree, cheap)
    hybrid = Hybrid(costly_last := Says(1, [3, 3, 3], is_costly=True), inner, threshold=0.5)
    assert hybrid.costly_grades == (range(2), range(2, 2 + tree.num_grades))
    left = hybrid.cheaper()
    assert isinstance(left, Hybrid)
    assert isinstance(left.second, Hybrid)
    assert left.second.second is cheap
    assert left.threshold == 0.5
    assert left.max_depth == hybrid.max_depth
    assert Hybrid(cheap, costly_last).costly_grades == (range(3, 5),)


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"num_draft_tokens": 4}, r"Says.cheaper\(\) has num_draft_tokens = 4; it must be 3"),
        ({"taps": (1,)}, r"Says.cheaper\(\) has taps = \(1,\); it must be \(\)"),
        ({"is_costly": True}, r"Says.cheaper\(\) is costly itself"),
    ],
)
def test_what_is_not_cheap_or_has_another_shape_is_refused_before_any_work(attributes, message):
    drafter = Says(1, [1], is_costly=True)
    drafter.cheaper = lambda: Says(2, [1], **attributes)  # type: ignore[method-assign]
    with pytest.raises(DrafterError, match=message):
        emssd_compile.optimize(Small(), drafter, max_length=64, backend="eager")


def test_drafts_that_are_drawn_are_left_out_with_what_they_are_drawn_from():
    ways: dict[str, Any] = {"proposes": (SAMPLED,)}
    hybrid = Hybrid(Says(7, [1, 0, 1], **ways), Says(8, [3, 3, 3], is_costly=True, **ways))
    cheap = hybrid.cheaper()
    assert isinstance(cheap, Hybrid)
    assert cheap.proposes == (SAMPLED,)
    proposal = cheap.second(replace(context(TEXTS, 3), drawn=SAMPLED, vocabulary=48)).proposal
    assert proposal.shape == (3, 4, 48)
    assert proposal.dtype == torch.float32


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Hybrid(PromptLookup, PromptLookup()), OptionError, "first=.* is no Drafter"),  # type: ignore[arg-type]
        (lambda: Hybrid(PromptLookup(), DraftModel(Small()), -1), OptionError, "threshold=-1.0"),
        (lambda: Hybrid(DraftModel(Small()), PromptLookup()), OptionError, "first=DraftModel reads its own chains"),
        (lambda: Hybrid(PromptLookup(), Says(1, [1], proposes=(SAMPLED,))), OptionError, "share a way"),
        (lambda: Hybrid(PromptLookup(), Says(1, [1], num_grades=0)), DrafterError, "num_grades"),
    ],
)
def test_refuses_what_makes_no_sense(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.fixture(scope="module")
def reference():
    return Reference(Small())


def _hybrid(kind: str) -> Hybrid:
    if kind == "tree":
        return Hybrid(PromptLookup(5), DraftModel(Small(1), tree=(2, 2)))
    if kind == "corpus":
        return Hybrid(SuffixLookup(5, corpus=Corpus(2048)), DraftModel(Small(1), 3))
    return Hybrid(PromptLookup(5), DraftModel(Small(1), 3))


@pytest.mark.parametrize("kind", ["chain", "tree", "corpus"])
def test_tokens_are_the_models_own(kind, reference):
    sizes: dict[str, Any] = {"max_batch": 3, "max_length": 128, "layout": "packed"}
    decoder = emssd_compile.optimize(Small(), _hybrid(kind), backend="eager", **sizes)
    expected = [[*ids, *reference(ids, NEW)] for ids in PROMPTS]
    assert [decoder.generate(PROMPTS, max_new_tokens=NEW) for _ in range(2)] == [expected] * 2
    assert decoder.stats.num_accepted_draft_tokens > 0


@pytest.mark.parametrize("kind", [pytest.param("chain", marks=pytest.mark.long), "tree"])
def test_sampled_tokens_are_those_without_drafts(kind):
    sizes: dict[str, Any] = {"max_batch": 3, "max_length": 128, "backend": "eager"}
    sample: dict[str, Any] = {"do_sample": True, "seed": 5, "temperature": 0.7, "max_new_tokens": NEW}
    expected = emssd_compile.optimize(Small(), "none", **sizes).generate(PROMPTS, **sample)
    decoder = emssd_compile.optimize(Small(), _hybrid(kind), layout="packed", **sizes)
    assert decoder.generate(PROMPTS, **sample) == expected


def test_the_second_has_read_what_the_first_drafted(reference):
    """Both know the text: but for the ends of rows no step accepts fewer than 3, which the second drafts, or the first.

    Where the first drafts 3 to 5 tokens, the second has as many to read before it can draft again.
    """
    expected = [[*ids, *reference(ids, NEW)] for ids in PROMPTS]
    oracle = Oracle(expected, 128, 5, wrong_of_seven=0, ragged=True)
    hybrid = Hybrid(oracle, DraftModel(Small(), 3), threshold=2)
    decoder = emssd_compile.optimize(Small(), hybrid, max_batch=3, max_length=128, backend="eager", layout="packed")
    assert decoder.generate(PROMPTS, max_new_tokens=NEW) == expected
    assert decoder.stats.num_accepted_draft_tokens == decoder.stats.num_draft_tokens
    assert sum(decoder.stats.acceptance_histogram[:3]) <= len(PROMPTS)
    assert min(decoder.stats.acceptance_histogram[3:]) > 0


@pytest.mark.long
def test_an_artifact_of_a_hybrid_decodes_the_same(reference, tmp_path):
    pytest.importorskip("onnxruntime")
    decoder = emssd_compile.optimize(
        Small(), _hybrid("chain"), max_batch=3, max_length=128, backend="eager", layout="packed"
    )
    decoder.export_onnx(tmp_path / "artifact", check=False)
    loaded = emssd_compile.load(tmp_path / "artifact")
    assert loaded.generate(PROMPTS, max_new_tokens=NEW) == [[*ids, *reference(ids, NEW)] for ids in PROMPTS]
