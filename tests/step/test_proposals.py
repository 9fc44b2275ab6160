"""Which way of drawing a rule and a drafter have in common, and what is said where they have none."""

from dataclasses import replace

import pytest
import torch

import emssd_compile
from emssd_compile.acceptance import RULES, Rule
from emssd_compile.drafters import (
    Draft,
    DraftContext,
    Drafter,
    DraftModel,
    NoDrafter,
    PartSizes,
    PromptLookup,
    TensorSpec,
)
from emssd_compile.errors import OptionError, RuleError
from emssd_compile.layouts import LAYOUTS, PackedLayout
from emssd_compile.policies import AllDrafts, LengthPolicy, PolicyContext, Ranking
from emssd_compile.step.proposals import DETERMINISTIC, SAMPLED, WITHOUT_REPLACEMENT, how_drawn, misfit
from tests.acceptance.draws import Tiny
from tests.passes.graphs import ScriptedTree

DRAFTERS = {
    "lookup": PromptLookup(),
    "scripted tree": ScriptedTree([1, 2], [0, 0], 1),
    "model chain": DraftModel(Tiny(1), 2),
    "model tree": DraftModel(Tiny(1), tree=(2, 2)),
}
TABLE = {
    "match": (DETERMINISTIC, DETERMINISTIC, DETERMINISTIC, DETERMINISTIC),
    "greedy": (DETERMINISTIC, DETERMINISTIC, DETERMINISTIC, DETERMINISTIC),
    "token-level": (DETERMINISTIC, None, SAMPLED, None),
    "block": (None, None, SAMPLED, None),
    "rrs": (None, None, SAMPLED, WITHOUT_REPLACEMENT),
    "rrs-with-replacement": (None, None, SAMPLED, SAMPLED),
    "k-seq": (None, None, None, SAMPLED),
    "largest-ratio": (None, None, None, SAMPLED),
    "traversal": (None, None, SAMPLED, WITHOUT_REPLACEMENT),
    "typical": (DETERMINISTIC, DETERMINISTIC, DETERMINISTIC, DETERMINISTIC),
}


@pytest.mark.parametrize("name", RULES)
def test_the_way_is_the_first_that_both_know(name):
    for drafter, expected in zip(DRAFTERS.values(), TABLE[name], strict=True):
        rule = RULES[name]()
        if expected is None:
            with pytest.raises(RuleError, match=type(drafter).__name__):
                how_drawn(rule, drafter)
        else:
            assert how_drawn(rule, drafter) == expected
        assert bool(misfit(rule, drafter)) == (expected is None)


@pytest.mark.parametrize("name", RULES)
def test_every_rule_goes_with_no_drafts_at_all(name):
    assert how_drawn(RULES[name](), NoDrafter()) == DETERMINISTIC


@pytest.mark.parametrize(
    ("rule", "drafter", "message"),
    [
        ("block", "lookup", r"BlockVerification needs drafts that are 'sampled', and those of PromptLookup are "),
        ("rrs", "lookup", r"'without replacement' or 'sampled'.*acceptance= one of \['match', 'greedy', 'token-level'"),
        (
            "token-level",
            "model tree",
            r"TokenLevel verifies chains, and DraftModel proposes trees; .*'rrs', .*'k-seq', .*'traversal'",
        ),
        ("k-seq", "model chain", r"KSeq verifies trees, and DraftModel proposes chains; .*'rrs-with-replacement'"),
        ("largest-ratio", "scripted tree", r"LargestRatio needs drafts that are 'sampled', and those of ScriptedTree"),
    ],
)
def test_what_does_not_go_together_is_refused_before_any_work(monkeypatch, rule, drafter, message):
    monkeypatch.setattr(torch.export, "export", lambda *args, **kwargs: pytest.fail("work was done"))
    with pytest.raises(OptionError, match=message):
        emssd_compile.optimize(Tiny(0), DRAFTERS[drafter], max_length=16, acceptance=rule)


class _Drawn(Drafter):
    """Draws from a distribution that is the same everywhere, and says so or not."""

    num_draft_tokens = 2
    proposes = (SAMPLED,)

    def __init__(self, says: bool) -> None:
        super().__init__()
        self.says = says

    def forward(self, context: DraftContext) -> Draft:
        tokens = context.known[:, None] * torch.tensor([3, 5]) % context.vocabulary
        shape = len(tokens), 3, context.vocabulary
        proposal = torch.full(shape, 1 / context.vocabulary) if self.says else None
        return Draft(tokens, torch.full_like(context.known, 2), proposal=proposal)


def _fast(drafter: Drafter, acceptance: str | Rule):
    return emssd_compile.optimize(
        Tiny(0), drafter, max_batch=2, max_length=24, backend="eager", layout="packed", acceptance=acceptance
    )


def test_the_state_holds_what_drafts_are_drawn_from_where_it_is_asked_for_and_nowhere_else():
    fast = _fast(_Drawn(says=True), "block")
    fast.generate([[3, 1]], max_new_tokens=4)
    assert "draft_proposal" not in fast._engine.tensors
    fast.generate([[3, 1]], max_new_tokens=4, do_sample=True)
    assert fast._engine.tensors["draft_proposal"].shape == (2, 3, 5)
    match = _fast(_Drawn(says=False), "match")
    match.generate([[3, 1]], max_new_tokens=4, do_sample=True)
    assert "draft_proposal" not in match._engine.tensors


class _Curious(AllDrafts):
    """Wants all drafts, and remembers what it was shown of them."""

    def tensors(self, sizes: PartSizes) -> dict[str, TensorSpec]:
        return {"tokens": TensorSpec((sizes.rows, sizes.num_draft_tokens), torch.int64, kept="forever")}

    def forward(self, context: PolicyContext) -> Ranking:
        assert context.draft.proposal is None
        return replace(super().forward(context), state={"tokens": context.draft.tokens + context.draft.grades})


class _CuriousLayout(PackedLayout):
    def policy(self) -> LengthPolicy:
        return _Curious()


@pytest.mark.parametrize(("rule", "is_shown"), [("match", True), ("block", False)])
def test_no_policy_can_choose_drafts_by_what_they_are_where_they_are_divided_by_q(monkeypatch, rule, is_shown):
    monkeypatch.setitem(LAYOUTS, "curious", _CuriousLayout())
    fast = emssd_compile.optimize(
        Tiny(0), _Drawn(says=True), max_batch=2, max_length=24, backend="eager", layout="curious", acceptance=rule
    )
    fast.generate([[3, 1]], max_new_tokens=6, do_sample=True)
    assert bool((fast._engine.tensors["policy_tokens"] > 0).any()) == is_shown


def test_a_drafter_that_does_not_say_what_it_drew_from_is_refused():
    fast = _fast(_Drawn(says=False), "block")
    with pytest.raises(
        emssd_compile.errors.DrafterError, match="_Drawn returned no proposal: where a drafter is to draw"
    ):
        fast.generate([[3, 1]], max_new_tokens=4, do_sample=True)
