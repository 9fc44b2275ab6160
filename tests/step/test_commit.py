"""`commit`: accepted drafts and the next token enter the history; rejected ones leave no trace."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from emssd_compile.step.acceptance import Verdict
from emssd_compile.step.commit import REPORT_FIELDS, commit, make_report, plain_counts, write
from emssd_compile.step.pack import Packed, pack
from emssd_compile.step.parts import PartSizes
from emssd_compile.step.state import COUNTERS, StepState

EOS, K = 9, 3


def _state(known: list[int], drafts: list[list[int]], lengths: list[int] | None = None) -> StepState:
    """Rows whose token `t` is `t`, and their drafts; rubbish behind these."""
    rows = len(known)
    state = StepState.empty(PartSizes(rows, 16, 12, K), torch.device("cpu"))
    tokens = torch.tensor([[*draft, *[EOS] * (K - len(draft))] for draft in drafts])
    return replace(
        state,
        history=torch.arange(16).repeat(rows, 1).clamp(max=8),
        known=torch.tensor(known),
        lengths=torch.tensor(lengths or [k - 1 for k in known]),
        draft=replace(state.draft, tokens=tokens, lengths=torch.tensor([len(d) for d in drafts])),
        active=torch.ones(rows, dtype=torch.bool),
        limits=torch.full((rows,), 16),
        is_eos=torch.arange(12) == EOS,
    )


def _pack(state: StepState, tokens: int = 16) -> Packed:
    slots = torch.arange(tokens)
    return pack(state.history, state.known, state.lengths, state.active, slots, slots, K + 1, state.draft)


def _commit(state: StepState, accepted: list[int], following: list[int], tokens: int = 16):
    new, emission = commit(state, _pack(state, tokens), Verdict(torch.tensor(accepted), torch.tensor(following)))
    emitted = [row[:count].tolist() for row, count in zip(emission.tokens, emission.counts.tolist(), strict=True)]
    return new, emitted


PARENTS = [0, 0, 2, 1, 3]
"""Of nodes 1 to 5: the longest path is 2, 3, 5."""


def _with_trees(tokens: list[list[int]], known: int = 4) -> StepState:
    """Rows that decode, each with a tree of `PARENTS`."""
    rows = len(tokens)
    state = StepState.empty(PartSizes(rows, 16, 12, 5, max_depth=3), torch.device("cpu"))
    parents = torch.tensor(PARENTS).expand(rows, 5)
    return replace(
        state,
        history=torch.arange(16).repeat(rows, 1).clamp(max=8),
        known=torch.full((rows,), known),
        lengths=torch.full((rows,), known - 1),
        draft=replace(state.draft, tokens=torch.tensor(tokens), lengths=torch.full((rows,), 5), parents=parents),
        active=torch.ones(rows, dtype=torch.bool),
        limits=torch.full((rows,), 16),
        is_eos=torch.arange(12) == EOS,
    )


def _commit_paths(state: StepState, paths: list[list[int]], following: list[int]):
    """The nodes accepted behind the root; rubbish behind them."""
    slots = torch.arange(16)
    packed = pack(state.history, state.known, state.lengths, state.active, slots, slots, 6, state.draft)
    path = torch.tensor([[0, *nodes, *[5] * (3 - len(nodes))] for nodes in paths])
    verdict = Verdict(torch.tensor([len(nodes) for nodes in paths]), torch.tensor(following), path=path)
    new, emission = commit(state, packed, verdict)
    emitted = [row[:count].tolist() for row, count in zip(emission.tokens, emission.counts.tolist(), strict=True)]
    return new, emitted, emission.accepted.tolist()


def _counters(state: StepState) -> dict[str, int]:
    return dict(zip(COUNTERS, state.counters.tolist(), strict=True))


def test_accepted_drafts_and_the_next_token_are_emitted():
    state = _state(known=[4, 5], drafts=[[1, 2, 3], [6, 7]])
    new, emitted = _commit(state, accepted=[3, 0], following=[10, 11])
    assert emitted == [[1, 2, 3, 10], [11]]
    assert new.known.tolist() == [8, 6]
    assert new.history[0, :8].tolist() == [0, 1, 2, 3, 1, 2, 3, 10]
    assert new.history[1, :6].tolist() == [0, 1, 2, 3, 4, 11], "a rejected draft leaves no trace"
    assert new.lengths.tolist() == [7, 5], "the newest token's KV is written by the next step"
    assert new.active.tolist() == [True, True]


@pytest.mark.parametrize(
    ("draft", "accepted", "following", "emitted", "ends"),
    [
        ([1, EOS, 3], 3, 5, [1, EOS], True),
        ([EOS, 1, 2], 1, 5, [EOS], True),
        ([1, 2, EOS], 2, 5, [1, 2, 5], False),
        ([1, 2, 3], 1, EOS, [1, EOS], True),
        ([1, 2, 3], 3, EOS, [1, 2, 3, EOS], True),
        ([], 0, EOS, [EOS], True),
    ],
    ids=["inside the drafts", "first draft", "in a rejected draft", "as correction", "as bonus", "without drafts"],
)
def test_a_row_ends_behind_its_first_eos(draft, accepted, following, emitted, ends):
    new, found = _commit(_state([4], [draft]), [accepted], [following])
    assert found == [emitted]
    assert bool(new.active[0]) is not ends
    assert int(new.known) == 4 + len(emitted)


@pytest.mark.parametrize(("limit", "emitted"), [(5, [1]), (6, [1, 2]), (8, [1, 2, 3, 10]), (9, [1, 2, 3, 10])])
def test_a_row_ends_at_its_limit(limit, emitted):
    state = replace(_state([4], [[1, 2, 3]]), limits=torch.tensor([limit]))
    new, found = _commit(state, [3], [10])
    assert found == [emitted]
    assert bool(new.active[0]) is (limit == 9)


def test_eos_behind_the_limit_does_not_count():
    state = replace(_state([4], [[1, EOS]]), limits=torch.tensor([5]))
    new, found = _commit(state, [2], [10])
    assert found == [[1]]
    assert new.active.tolist() == [False]


def test_a_row_that_reads_its_prompt_emits_nothing():
    state = _state(known=[12], drafts=[[]], lengths=[0])
    new, emitted = _commit(state, [0], [3], tokens=5)
    assert emitted == [[]]
    assert (new.known.tolist(), new.lengths.tolist(), new.active.tolist()) == ([12], [5], [True])
    assert torch.equal(new.history, state.history)


def test_an_inactive_row_stays_as_it_is():
    state = replace(_state([4, 4], [[1], [1]]), active=torch.tensor([False, True]))
    new, emitted = _commit(state, [1, 1], [10, 10])
    assert emitted == [[], [1, 10]]
    assert torch.equal(new.history[0], state.history[0])
    assert (int(new.known[0]), int(new.lengths[0])) == (4, 3)


def test_counters_and_histogram():
    state = _state(known=[4, 5, 6], drafts=[[1, 2, 3], [6, 7], []])
    new, _ = _commit(state, accepted=[3, 0, 0], following=[10, 11, 3])
    assert _counters(new) == {
        "num_steps": 1,
        "num_row_steps": 3,
        "num_spec_steps": 2,
        "num_draft_tokens": 5,
        "num_accepted_draft_tokens": 3,
        "num_emitted_tokens": 6,
        "num_fed_tokens": 8,
        "num_padding_tokens": 8,
    }
    assert new.histogram.tolist() == [1, 0, 0, 1], "rows without drafts verify nothing"


def test_drafts_cut_by_eos_are_not_counted_as_accepted():
    new, _ = _commit(_state([4], [[1, EOS, 3]]), [3], [10])
    assert _counters(new)["num_accepted_draft_tokens"] == 2


def test_the_accepted_path_of_a_tree_is_emitted_and_no_other_node():
    state = _with_trees([[1, 2, 3, 4, 5], [5, 4, 3, 2, 1]])
    new, emitted, accepted = _commit_paths(state, [[2, 3, 5], [1]], following=[10, 11])
    assert emitted == [[2, 3, 5, 10], [5, 11]]
    assert accepted == [3, 1]
    assert new.known.tolist() == [8, 6]
    assert new.lengths.tolist() == [7, 5]
    assert new.history[0].tolist() == [0, 1, 2, 3, 2, 3, 5, 10, *state.history[0, 8:].tolist()]
    assert new.history[1].tolist() == [0, 1, 2, 3, 5, 11, *state.history[1, 6:].tolist()]
    assert new.histogram.tolist() == [0, 1, 0, 1]
    assert _counters(new)["num_draft_tokens"] == 10
    assert _counters(new)["num_accepted_draft_tokens"] == 4


@pytest.mark.parametrize(
    ("tokens", "path", "following", "emitted", "accepted", "ends"),
    [
        ([1, 2, EOS, 4, 5], [2, 3, 5], 10, [2, EOS], 2, True),
        ([1, EOS, 3, 4, 5], [2, 3], 10, [EOS], 1, True),
        ([EOS, 2, 3, EOS, 5], [2, 3, 5], 10, [2, 3, 5, 10], 3, False),
        ([1, 2, 3, 4, EOS], [2, 3], 10, [2, 3, 10], 2, False),
        ([1, 2, 3, 4, EOS], [2, 3, 5], 10, [2, 3, EOS], 3, True),
        ([1, 2, 3, 4, 5], [2, 3], EOS, [2, 3, EOS], 2, True),
    ],
    ids=["inside the path", "at its start", "on another path", "behind the path", "at its end", "as correction"],
)
def test_a_path_ends_behind_its_first_eos(tokens, path, following, emitted, accepted, ends):
    new, found, kept = _commit_paths(_with_trees([tokens]), [path], [following])
    assert (found, kept) == ([emitted], [accepted])
    assert bool(new.active[0]) is not ends
    assert (int(new.known), int(new.lengths)) == (4 + len(emitted), 3 + len(emitted))


@pytest.mark.parametrize(
    ("limit", "emitted", "accepted"), [(5, [2], 1), (6, [2, 3], 2), (7, [2, 3, 5], 3), (8, [2, 3, 5, 10], 3)]
)
def test_a_path_ends_at_the_rows_limit(limit, emitted, accepted):
    state = replace(_with_trees([[1, 2, 3, 4, 5]]), limits=torch.tensor([limit]))
    new, found, kept = _commit_paths(state, [[2, 3, 5]], [10])
    assert (found, kept) == ([emitted], [accepted])
    assert new.active.tolist() == [False]
    assert int(new.known) == limit


def test_a_row_that_does_not_emit_keeps_nothing_of_its_path():
    state = replace(_with_trees([[1, 2, 3, 4, 5]] * 2), active=torch.tensor([False, True]))
    new, emitted, _ = _commit_paths(state, [[2, 3, 5], [2]], [10, 10])
    assert emitted == [[], [2, 10]]
    assert torch.equal(new.history[0], state.history[0])
    assert (int(new.known[0]), int(new.lengths[0])) == (4, 3)


def test_write_leaves_the_rest_of_the_history_alone():
    history = torch.zeros(2, 6, dtype=torch.int64)
    tokens = torch.tensor([[1, 2, 3], [4, 5, 6]])
    assert write(history, torch.tensor([1, 4]), tokens, torch.tensor([2, 3])).tolist() == [
        [0, 1, 2, 0, 0, 0],
        [0, 0, 0, 0, 4, 5],
    ]


@pytest.mark.parametrize(
    ("costly", "expected"),
    [
        ((), [0, 1, 3, 4, 2]),
        ((range(4),), [0, 1, 1, 1, 1]),
        ((range(2, 4),), [0, 1, 2, 4, 2]),
        ((range(1), range(3, 4)), [0, 1, 2, 3, 1]),
    ],
)
def test_plain_counts_leave_out_accepted_drafts_of_costly_grades(costly, expected):
    """One row reads its prompt, one had its drafts rejected, one took two, one three; its last draft ended one."""
    counts = torch.tensor([0, 1, 3, 4, 2])
    grades = torch.tensor([[0, 1, 2], [2, 2, 3], [1, 3, 3], [0, 1, 1], [0, 0, 1]])
    accepted = torch.tensor([[False] * 3, [False] * 3, [True, True, False], [True] * 3, [True, True, False]])
    assert plain_counts(counts, grades, accepted, costly).tolist() == expected


def test_the_report_holds_the_fields_and_then_the_tokens():
    columns: dict[str, Tensor] = {
        "counts": torch.tensor([2]),
        "active": torch.tensor([True]),
        "pending": torch.tensor([1]),
        "draft_lengths": torch.tensor([3]),
        "wanted": torch.tensor([5]),
        "plain_counts": torch.tensor([1]),
    }
    report = make_report(torch.tensor([[7, 8, 0, 0]]), columns)
    assert tuple(columns) == REPORT_FIELDS
    assert report.tolist() == [[2, 1, 1, 3, 5, 1, 7, 8, 0, 0]]
