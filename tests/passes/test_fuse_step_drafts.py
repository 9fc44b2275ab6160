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
from tests.passes.graphs import BATCH, LONGEST, VOCABULARY, Scripted, ScriptedTree, returned, step_of, step_with


class _Counts(Scripted):
    """Remembers how often it was asked."""

    def tensors(self, sizes: PartSizes) -> dict[str, TensorSpec]:
        return {"asked": TensorSpec((sizes.rows,), torch.int64)}

    def forward(self, context: DraftContext) -> Draft:
        draft = super().forward(context)
        return Draft(draft.tokens, draft.lengths, {"asked": context.state["asked"] + 1})


def _first_step(drafter: Drafter, limits: list[int]) -> dict[str, Tensor]:
    """What the first step returns for three rows whose prompt is token 5."""
    return _run(step_of(drafter), drafter, limits)


def _run(step: fx.GraphModule, drafter: Drafter, limits: list[int], draft_budget: int = 99) -> dict[str, Tensor]:
    sizes = PartSizes(BATCH.rows, LONGEST, VOCABULARY, drafter.num_draft_tokens, max_depth=drafter.max_depth)
    state = StepState.empty(sizes, torch.device("cpu")).tensors()
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


def _trees(results: dict[str, Tensor]) -> list[list[tuple[int, int]]]:
    """Parent and token of each draft."""
    parents = results["draft_parents"].tolist()
    return [[*zip(own, tokens, strict=False)] for own, tokens in zip(parents, _drafts(results), strict=True)]


def test_of_a_tree_what_is_too_deep_for_a_rows_limit_is_left_out():
    results = _first_step(ScriptedTree([7, 8, 9, 4, 5], [0, 0, 1, 2, 4], max_depth=3), limits=[20, 5, 4])
    whole = [(0, 7), (0, 8), (1, 9), (2, 4), (4, 5)]
    assert _trees(results) == [whole, whole[:4], whole[:2]], "one place is kept for the bonus token"


def test_of_a_tree_what_cannot_be_a_draft_is_left_out_with_what_follows_it_and_the_others_move_up():
    tokens = [7, VOCABULARY, 9, 4, 5, 6, 3]
    parents = [0, 0, 2, 1, 5, -1, 4]  # 2 is no token, and 3 follows it; 5 follows itself; 6 follows nothing
    results = _first_step(ScriptedTree(tokens, parents, max_depth=3), limits=[20] * 3)
    assert _trees(results) == [[(0, 7), (1, 4), (2, 3)]] * 3
    assert 0 <= int(results["draft_parents"].min()) <= int(results["draft_parents"].max()) <= 7


@pytest.mark.parametrize(("length", "count"), [(2, 2), (-1, 0), (99, 3)])
def test_of_a_tree_no_more_than_its_length_is_verified(length, count):
    results = _first_step(ScriptedTree([7, 8, 9], [0, 1, 1], max_depth=2, length=length), limits=[20] * 3)
    assert _trees(results) == [[(0, 7), (1, 8), (1, 9)][:count]] * 3


@pytest.mark.parametrize(
    "drafter",
    [Scripted([7, VOCABULARY, -1, 9]), ScriptedTree([-1, VOCABULARY, 9, 4], [0, 0, 2, 9], max_depth=2)],
    ids=["chains", "trees"],
)
def test_what_lies_behind_the_drafts_can_be_read_by_the_model(drafter):
    """A dry run verifies as many as there may be, whatever they are."""
    results = _first_step(drafter, limits=[20] * 3)
    assert int(results["draft_lengths"].max()) < 4
    assert 0 <= int(results["draft_tokens"].min()) <= int(results["draft_tokens"].max()) < VOCABULARY


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
    "reads a value to the host": (_ReadsToTheHost(), "_ReadsToTheHost.forward reads a value to the host"),
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
    drafter = Scripted([7, 8, 9])
    step = step_with(drafter, policy=_Wild(wanted)).graph_module
    results = _run(step, drafter, limits=[20, 20, 20], draft_budget=4)
    assert results["report"][:, REPORT_FIELDS.index("wanted")].tolist() == [told] * 3
    assert results["draft_lengths"].tolist() == lengths
