"""`fuse_step`: the step ends with the drafts that the next one verifies, or names the drafter that broke."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, fx

from emssd_compile.drafters import Draft, DraftContext, Drafter, PartSizes, TensorSpec
from emssd_compile.errors import DrafterError
from emssd_compile.passes.graph import inputs
from emssd_compile.policies import LengthPolicy, PolicyContext, Ranking
from emssd_compile.step.commit import REPORT_FIELDS
from emssd_compile.step.state import StepState
from tests.passes.graphs import BATCH, LONGEST, VOCABULARY, Scripted, returned, step_of, step_with


class _Counts(Scripted):
    """Remembers how often it was asked."""

    def tensors(self, sizes: PartSizes) -> dict[str, TensorSpec]:
        return {"asked": TensorSpec((sizes.rows,), torch.int64)}

    def forward(self, context: DraftContext) -> Draft:
        draft = super().forward(context)
        return Draft(draft.tokens, draft.lengths, {"asked": context.state["asked"] + 1})


def _first_step(drafter: Drafter, limits: list[int]) -> dict[str, Tensor]:
    """What the first step returns for three rows whose prompt is token 5."""
    return _run(step_of(drafter), drafter.num_draft_tokens, limits)


def _run(step: fx.GraphModule, num_draft_tokens: int, limits: list[int], draft_budget: int = 99) -> dict[str, Tensor]:
    state = StepState.empty(PartSizes(BATCH.rows, LONGEST, VOCABULARY, num_draft_tokens), torch.device("cpu")).tensors()
    state["draft_budget"] = torch.tensor(draft_budget)
    state["history"][:, 0] = 5
    state["known"][:] = 1
    state["limits"][:] = torch.tensor(limits)
    state["active"][:] = True
    for node in inputs(step.graph):
        if node.target not in state:
            shape = [int(s) if isinstance(s, int) else 8 for s in node.meta["val"].shape]
            state[str(node.target)] = torch.arange(8) if "_range" in str(node.target) else torch.zeros(shape)
    state["drafter_asked"] = torch.zeros(BATCH.rows, dtype=torch.int64)
    with torch.inference_mode():
        results: dict[str, Tensor] = step(*(state[str(node.target)] for node in inputs(step.graph)))
    return results


def _drafts(results: dict[str, Tensor]) -> list[list[int]]:
    """What the next step verifies of each row."""
    lengths = results["draft_lengths"].tolist()
    return [row[:length] for row, length in zip(results["draft_tokens"].tolist(), lengths, strict=True)]


def test_drafts_are_those_of_the_drafter_and_never_past_the_limit():
    results = _first_step(Scripted([7, 8, 9]), limits=[20, 4, 3])
    assert results["known"].tolist() == [2, 2, 2]
    assert results["draft_lengths"].tolist() == [3, 1, 0], "one place is kept for the bonus token"
    assert _drafts(results) == [[7, 8, 9], [7], []]
    assert not results["history"][:, 2:].any(), "nothing is written before it is decided"


def test_a_draft_ends_at_its_first_id_outside_the_vocabulary():
    results = _first_step(Scripted([7, VOCABULARY, 9]), limits=[20, 20, 20])
    assert results["draft_lengths"].tolist() == [1, 1, 1]
    assert _drafts(results) == [[7]] * 3


def test_a_drafters_state_goes_in_and_comes_out():
    step = step_of(_Counts([7]))
    assert "drafter_asked" in {node.target for node in inputs(step.graph)}
    assert "drafter_asked" in returned(step)
    assert _first_step(_Counts([7]), limits=[20, 20, 20])["drafter_asked"].tolist() == [1, 1, 1]


class _Raises(Drafter):
    num_draft_tokens = 2

    def forward(self, context: DraftContext) -> Draft:
        raise RuntimeError("no idea")


class _ReadsToTheHost(Drafter):
    num_draft_tokens = 2

    def forward(self, context: DraftContext) -> Draft:
        return Draft(torch.full((3, 2), int(context.known.sum())), context.known)


class _ReadsASize(Scripted):
    def forward(self, context: DraftContext) -> Draft:
        return super().forward(replace(context, known=context.known + int(context.draft_range.shape[0])))


class _TakesSizesForEqual(Scripted):
    def forward(self, context: DraftContext) -> Draft:
        return super().forward(replace(context, known=context.known + (context.draft_range + context.row_range).sum()))


class _WrongShape(Scripted):
    def forward(self, context: DraftContext) -> Draft:
        return Draft(torch.zeros(3, 7, dtype=torch.int64), context.known)


class _WrongGrades(Scripted):
    def forward(self, context: DraftContext) -> Draft:
        draft = super().forward(context)
        return Draft(draft.tokens, draft.lengths, grades=context.known)


class _UndeclaredState(Scripted):
    def forward(self, context: DraftContext) -> Draft:
        draft = super().forward(context)
        draft.state["memory"] = context.known
        return draft


BROKEN = {
    "raises": (_Raises(), "_Raises failed while it was traced: RuntimeError: no idea"),
    "reads a size": (_ReadsASize([7, 8]), "_ReadsASize .*: a size of draft_range differs .* and was taken for 7"),
    "takes two sizes for equal": (_TakesSizesForEqual([7, 8]), "_TakesSizesForEqual .*: a size of .* was taken for s"),
    "reads a value to the host": (_ReadsToTheHost(), "_ReadsToTheHost failed while it was traced"),
    "wrong shape": (_WrongShape([1, 2]), r"tokens of shape \(3, 7\); expected \[B, K\] = \[3, 2\]"),
    "wrong shape of grades": (_WrongGrades([1, 2]), r"grades of shape \(3,\); expected \[B, K\] = \[3, 2\]"),
    "undeclared state": (_UndeclaredState([1, 2]), r"returned state \['memory'\]; it declares \[\]"),
}


@pytest.mark.parametrize(("drafter", "reason"), BROKEN.values(), ids=BROKEN)
def test_a_drafter_that_breaks_its_contract_is_named(drafter, reason):
    with pytest.raises(DrafterError, match=reason):
        step_of(drafter)


class _Wild(LengthPolicy):
    """Gives every draft the same rank, and wants as many as it is told."""

    def __init__(self, wanted: int) -> None:
        super().__init__()
        self.wanted = wanted

    def forward(self, context: PolicyContext) -> Ranking:
        return Ranking(torch.zeros_like(context.draft.tokens), torch.full_like(context.num_tokens, self.wanted))


@pytest.mark.parametrize(("wanted", "told", "lengths"), [(10**12, 9, [3, 1, 0]), (-5, 0, [0, 0, 0]), (2, 2, [2, 0, 0])])
def test_a_policy_that_ranks_wrongly_makes_no_step_too_large(wanted, told, lengths):
    """The host gives the next step room for so many drafts, and no more."""
    step = step_with(Scripted([7, 8, 9]), policy=_Wild(wanted)).graph_module
    results = _run(step, 3, limits=[20, 20, 20], draft_budget=4)
    assert results["report"][:, REPORT_FIELDS.index("wanted")].tolist() == [told] * 3
    assert results["draft_lengths"].tolist() == lengths
