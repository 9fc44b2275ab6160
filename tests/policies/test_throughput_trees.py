"""`Throughput` on trees: its definition by loops, a search through all trees, and chains given as trees."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from emssd_compile.policies import PolicyContext, Throughput
from emssd_compile.policies.throughput import GRADE_DECAY, GRADE_PRIOR_WEIGHT, PRIOR, ROW_DECAY, ROW_PRIOR_WEIGHT, TIE
from emssd_compile.step.nodes import Nodes
from tests.policies.contexts import chosen, context_of, zeros
from tests.policies.test_throughput import evidence, times
from tests.step.forests import Forest, Tree, closed_masks, forests, nodes_of

POLICY = Throughput()
ROWS, K, D, GRADES = 2, 4, 3, 2


@st.composite
def _proposals(draw: st.DrawFn, rows: int = ROWS, num_drafts: int = K) -> tuple[Forest, Tensor]:
    """Trees with grades, and which of their drafts may be verified: with each the one that it follows."""
    forest = draw(forests(rows, num_drafts, D))
    grades = st.lists(st.integers(0, GRADES - 1), min_size=num_drafts, max_size=num_drafts)
    forest = replace(forest, nodes=replace(forest.nodes, grades=torch.tensor([draw(grades) for _ in range(rows)])))
    return forest, draw(closed_masks(forest))


@st.composite
def _states(draw: st.DrawFn, rows: int = ROWS) -> dict[str, Tensor]:
    state = {}
    state["row_accepted"], state["row_tried"] = draw(evidence(rows))
    state["grade_accepted"], state["grade_tried"] = draw(evidence(GRADES, D))
    return state


def _survival(forest: Forest, proposed: Tensor, state: dict[str, Tensor]) -> dict[tuple[int, int], float]:
    """That of each draft that is proposed, by its row and node, from the definition."""
    row_rate = (state["row_accepted"] + PRIOR * ROW_PRIOR_WEIGHT) / (state["row_tried"] + ROW_PRIOR_WEIGHT)
    grade_rate = (state["grade_accepted"] + PRIOR * GRADE_PRIOR_WEIGHT) / (state["grade_tried"] + GRADE_PRIOR_WEIGHT)
    found: dict[tuple[int, int], float] = {}
    for row, tree in enumerate(forest.trees):
        own = {
            i + 1: float(grade_rate[forest.nodes.grades[row, i], tree.depth(i + 1) - 1])
            for i in range(len(tree.parents))
            if proposed[row, i]
        }
        for node, rate in own.items():
            parent = tree.parents[node - 1]
            among = sum(own[child] for child in tree.children(parent) if child in own)
            above = 1.0 if parent == 0 else found[row, parent]
            found[row, node] = above * (float(row_rate[row]) * rate / among * rate) ** 0.5
    return found


@settings(max_examples=200)
@given(_proposals(rows=3, num_drafts=6), _states(rows=3), st.data())
def test_no_draft_comes_before_the_one_that_it_follows(proposals, state, data):
    forest, proposed = proposals
    seconds = data.draw(times(3 * (6 + 1)))
    ranking = POLICY(context_of(forest.nodes, proposed, state, seconds=seconds))
    assert sorted(ranking.ranks.flatten().tolist()) == list(range(3 * 6)), "no place is taken twice or left out"
    for row, tree in enumerate(forest.trees):
        for i, parent in enumerate(tree.parents):
            assert parent == 0 or not proposed[row, i] or ranking.ranks[row, parent - 1] < ranking.ranks[row, i]
    assert 0 <= int(ranking.wanted) <= int(proposed.sum())
    best = ranking.ranks[proposed]
    assert best.numel() == 0 or int(best.max()) < best.numel(), "what cannot be verified takes no room"


def _is_closed(forest: Forest, nodes: set[tuple[int, int]]) -> bool:
    return all(
        (row, parent) in nodes or parent == 0 for row, node in nodes for parent in [forest.trees[row].parents[node - 1]]
    )


@settings(max_examples=100)
@given(_proposals(), _states(), st.data())
def test_no_other_trees_promise_more_tokens_per_second(proposals, state, data):
    forest, proposed = proposals
    seconds = data.draw(times(ROWS * (K + 1)))
    seen = context_of(forest.nodes, proposed, state, seconds=seconds)
    ranking = POLICY(seen)
    kept = {(row, i + 1) for row, i in chosen(ranking, seen).nonzero().tolist()}
    survival = _survival(forest, proposed, ranking.state)

    def speed(nodes) -> float:
        return (ROWS + sum(survival[node] for node in nodes)) / float(seconds[ROWS + len(nodes)])

    subsets = itertools.chain.from_iterable(itertools.combinations(survival, n) for n in range(len(survival) + 1))
    choices = [set(nodes) for nodes in subsets if _is_closed(forest, set(nodes))]
    best = max(map(speed, choices))
    assert _is_closed(forest, kept)
    assert len(kept) == int(ranking.wanted)
    assert speed(kept) >= (1 - TIE) * best * (1 - 1e-5)
    assert speed(kept) == pytest.approx(max(speed(c) for c in choices if len(c) == len(kept)), rel=1e-5)
    assert all(speed(c) < (1 - TIE) * best * (1 + 1e-5) for c in choices if len(c) > len(kept))


def _as_tree(chain: Nodes) -> Nodes:
    rows, most = chain.tokens.shape
    return replace(chain, parents=torch.arange(most).expand(rows, most))


@settings(max_examples=150)
@given(st.data())
def test_a_chain_given_as_a_tree_ranks_and_teaches_as_the_chain_does(data):
    each = st.lists(st.integers(0, D), min_size=ROWS, max_size=ROWS)
    grade = st.lists(st.integers(0, GRADES - 1), min_size=ROWS * D, max_size=ROWS * D)
    state, seconds = data.draw(_states()), data.draw(times(ROWS * (D + 1)))

    def draw_chain(lengths: list[int]) -> Nodes:
        grades = torch.tensor(data.draw(grade)).view(ROWS, D)
        return Nodes(torch.zeros_like(grades), torch.tensor(lengths), grades, None, D)

    drafted = data.draw(each)
    accepted = [min(pair) for pair in zip(drafted, data.draw(each), strict=True)]
    draft, verified = draw_chain(data.draw(each)), draw_chain(drafted)
    path = torch.arange(D + 1).expand(ROWS, D + 1)
    as_chain, as_tree = (
        POLICY(context_of(*given, state, verified=before, accepted=accepted, path=path, seconds=seconds))
        for given, before in (
            ((draft, draft.exist), verified),
            ((_as_tree(draft), draft.exist), _as_tree(verified)),
        )
    )
    assert torch.equal(as_chain.ranks, as_tree.ranks)
    assert torch.equal(as_chain.wanted, as_tree.wanted)
    for name, value in as_chain.state.items():
        torch.testing.assert_close(as_tree.state[name], value, msg=name)


TREE = Tree([0, 0, 1, 2], [0, 1, 0, 1])
"""0 with the children 1 and 2; 3 follows 1, 4 follows 2."""


def _after(path: list[int], state: dict[str, Tensor]) -> PolicyContext:
    """After a step that accepted this path of `TREE`, whose drafts have the grades 0, 1, 0, 1."""
    nodes = replace(nodes_of([TREE], K, D), grades=torch.tensor([[0, 1, 0, 1]]))
    padded = torch.tensor([[*path, *[0] * (D + 1 - len(path))]])
    none = torch.zeros((1, K), dtype=torch.bool)
    return context_of(nodes, none, state, verified=nodes, accepted=[len(path) - 1], path=padded)


@pytest.mark.parametrize(
    ("path", "row", "tried", "accepted"),
    [
        ([0], (1, 0), [[1, 0, 0], [1, 0, 0]], [[0, 0, 0], [0, 0, 0]]),
        ([0, 1], (2, 1), [[1, 1, 0], [1, 0, 0]], [[1, 0, 0], [0, 0, 0]]),
        ([0, 2, 4], (2, 2), [[1, 0, 0], [1, 1, 0]], [[0, 0, 0], [1, 1, 0]]),
    ],
    ids=["nothing accepted", "one of two", "to its end"],
)
def test_siblings_are_one_trial_of_the_row_and_one_each_of_their_grades(path, row, tried, accepted):
    learnt = POLICY(_after(path, zeros(POLICY, 1, K, GRADES, D))).state
    assert (float(learnt["row_tried"]), float(learnt["row_accepted"])) == row
    assert learnt["grade_tried"].tolist() == tried
    assert learnt["grade_accepted"].tolist() == accepted


def test_what_was_seen_fades():
    state = zeros(POLICY, 1, K, GRADES, D)
    once = POLICY(_after([0, 1], state)).state
    twice = POLICY(_after([0], once)).state
    assert float(twice["row_tried"]) == pytest.approx(2 * ROW_DECAY + 1)
    assert float(twice["grade_accepted"][0, 0]) == pytest.approx(GRADE_DECAY)


def test_of_siblings_the_one_whose_grade_proves_right_comes_first():
    state = zeros(POLICY, 1, K, GRADES, D)
    for _ in range(10):
        state = POLICY(_after([0, 2, 4], state)).state
    nodes = replace(nodes_of([TREE], K, D), grades=torch.tensor([[0, 1, 0, 1]]))
    ranking = POLICY(context_of(nodes, nodes.exist, state))
    assert ranking.ranks.tolist() == [[2, 0, 3, 1]]


def test_a_sibling_that_cannot_be_verified_takes_no_share():
    nodes = nodes_of([Tree([0, 0], [0, 1]), Tree([0], [0])], K, D, parents=[1] * 2 * K)
    nodes = replace(nodes, grades=torch.zeros_like(nodes.tokens))
    proposed = torch.tensor([[True, False, False, False]] * 2)
    ranking = POLICY(context_of(nodes, proposed, zeros(POLICY, 2, K, GRADES, D)))
    assert ranking.ranks[:, 0].tolist() == [0, 1], "as good as an only child, so the first row goes first"
